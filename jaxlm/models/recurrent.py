"""What the families of recurrent layers share: stacks of layers in one or both directions, with AWD regularization.

Merity et al. 2017 ("Regularizing and Optimizing LSTM Language Models"), whose code is followed, drop: recurrent weights
(``weight_dropout``, DropConnect), whole word types (``embedding_dropout``), and activations with one mask for all steps
of a row (``input_dropout``, ``hidden_dropout``, ``output_dropout``).

Legend: B batch, T time, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from jaxlm.models import common, heads
from jaxlm.nn.dropout import dropout
from jaxlm.nn.embedding import embed, padded, unembed
from jaxlm.nn.recurrence import borders
from jaxlm.sharding import constrain
from jaxlm.spec import ArraySpec, Initializer, Uniform, fold_name

Direction = Literal["forward", "both"]
DropoutMask = Literal["locked", "fresh"]
RATES = ("embedding_dropout", "input_dropout", "hidden_dropout", "output_dropout", "weight_dropout")

Layer = Callable[..., tuple[jax.Array, dict[str, jax.Array]]]
"""``recurrence.lstm`` or ``recurrence.gru``."""


Config = Any
"""The config of a family: see its fields there."""


def check(cfg: Config) -> None:
    """Raise ``ValueError`` for a config that cannot be."""
    common.check_positive(cfg, "vocab_size", "num_layers", "embed_dim", "hidden_dim", "num_labels", "vocab_multiple")
    common.check_rates(cfg, *RATES)
    common.check_choices(
        cfg, direction=get_args(Direction), dropout_mask=get_args(DropoutMask), dtype=get_args(common.ComputeDtype),
        task=("causal", "classification", "tagging", "none"),
    )  # fmt: skip
    if cfg.direction == "both" and cfg.task == "causal":
        raise ValueError("direction='both' reads what task='causal' has to predict: take direction='forward'")


def widths(cfg: Config) -> list[int]:
    """Width of each layer (of one direction). Before a tied head, the last is as wide as the embeddings."""
    last = cfg.embed_dim if cfg.task == "causal" and cfg.tie_embeddings else cfg.hidden_dim
    return [cfg.hidden_dim] * (cfg.num_layers - 1) + [last]


def specs(cfg: Config, layer_specs: Callable[[int, int, Initializer | None], dict[str, ArraySpec]]) -> dict[str, Any]:
    """Every parameter: ``layer_0``, ``layer_1``, ... because layers differ in width."""
    V, directions = padded(cfg.vocab_size, cfg.vocab_multiple), 2 if cfg.direction == "both" else 1
    uniform = Uniform(cfg.init_bound)
    recurrent = None if cfg.recurrent_init_bound is None else Uniform(cfg.recurrent_init_bound)
    tree: dict[str, Any] = {"token_embedding": ArraySpec((V, cfg.embed_dim), ("vocab", "embed"), uniform, decay=True)}
    inputs = cfg.embed_dim
    for index, width in enumerate(widths(cfg)):
        layer = layer_specs(inputs, width, recurrent)
        tree[f"layer_{index}"] = {"forward": layer, "backward": layer} if cfg.direction == "both" else layer
        inputs = directions * width
    if cfg.task == "causal":
        tree["head"] = {"bias": ArraySpec((V,), ("vocab",))}
        if not cfg.tie_embeddings:
            tree["head"]["weight"] = ArraySpec((V, inputs), ("vocab", "embed"), uniform, decay=True)
    return tree | heads.head_specs(cfg.task, inputs, cfg.num_labels, uniform)


def state_specs(
    cfg: Config, batch: int, layer_state_specs: Callable[[int, int], dict[str, ArraySpec]]
) -> dict[str, Any]:
    """The state of each layer, and the document (segment) that each row was in: constant in size.

    Raises:
        TypeError: the model reads in both directions.
    """
    if cfg.direction == "both":
        raise TypeError("direction='both' needs the whole sequence at once: only direction='forward' carries a state")
    layers = {f"layer_{index}": layer_state_specs(batch, width) for index, width in enumerate(widths(cfg))}
    return {**layers, "last_segment": ArraySpec((batch,), ("batch",), dtype=jnp.int32)}


def apply(
    cfg: Config,
    layer: Layer,
    params: dict[str, Any],
    tokens: jax.Array,
    state: Any,
    segment_ids: jax.Array | None,
    key: jax.Array | None,
) -> tuple[jax.Array, jax.Array, Any]:
    """The last layer's outputs after dropout and before it, both [B, T, D], and the new state."""
    common.check_tokens(tokens, segment_ids, None, None)
    if state is not None and cfg.direction == "both":
        raise ValueError("direction='both' needs the whole sequence at once and carries no state: leave state out")
    x = embed(params["token_embedding"], tokens, jnp.dtype(cfg.dtype))
    if key is not None and cfg.embedding_dropout > 0.0:
        # Whole words: every occurrence of a word in the batch is dropped, or scaled up, together.
        ones_V1 = jnp.ones((params["token_embedding"].shape[0], 1))
        x = x * embed(dropout(ones_V1, cfg.embedding_dropout, fold_name(key, "words")), tokens, x.dtype)
    x = constrain(_drop(cfg, x, cfg.input_dropout, fold_name(key, "input")), ("batch", "seq", "activation_embed"))

    ahead, back, last_segment = {}, {}, None  # the masks of the two directions
    if segment_ids is not None or state is not None:
        segments = common.segments_of(tokens, segment_ids)
        reset, keep, last_segment = borders(segments, None if state is None else state["last_segment"])
        ahead = {"reset_BT": reset, "keep_BT": keep}
        back = {"reset_BT": borders(segments, reverse=True)[0], "keep_BT": keep}
    new_state: dict[str, Any] = {"last_segment": last_segment}
    for index in range(cfg.num_layers):
        name = f"layer_{index}"
        layer_key = fold_name(key, name)
        if index > 0:
            x = _drop(cfg, x, cfg.hidden_dropout, fold_name(layer_key, "input"))
        if cfg.direction == "both":
            weights = {side: _drop_weights(cfg, own, fold_name(layer_key, side)) for side, own in params[name].items()}
            x = jnp.concatenate(
                [layer(weights["forward"], x, **ahead)[0], layer(weights["backward"], x, **back, reverse=True)[0]],
                axis=-1,
            )
        else:
            old = None if state is None else state[name]
            x, new_state[name] = layer(_drop_weights(cfg, params[name], layer_key), x, old, **ahead)
        x = constrain(x, ("batch", "seq", "activation_embed"))
    return _drop(cfg, x, cfg.output_dropout, fold_name(key, "output")), x, None if state is None else new_state


def _drop(cfg: Config, x_BTD: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    if key is None or rate == 0.0 or cfg.dropout_mask == "fresh":
        return dropout(x_BTD, rate, key)
    B, _, D = x_BTD.shape
    return x_BTD * dropout(jnp.ones((B, 1, D), x_BTD.dtype), rate, key)


def _drop_weights(cfg: Config, params: dict[str, Any], key: jax.Array | None) -> dict[str, Any]:
    """DropConnect (Wan et al. 2013) on the hidden-to-hidden weights: one mask for all steps and rows of a call."""
    dropped = dropout(params["weight_hidden"], cfg.weight_dropout, fold_name(key, "weight_hidden"))
    return {**params, "weight_hidden": dropped}


def logits(cfg: Config, params: dict[str, Any], hidden: jax.Array) -> jax.Array:
    """What the head of the task says of hidden states [B, P, D]."""
    if cfg.task != "causal":
        return heads.head_logits(cfg.task, params, hidden)
    table = params["token_embedding"] if cfg.tie_embeddings else params["head"]["weight"]
    scores = unembed(table, hidden, cfg.vocab_size) + params["head"]["bias"].astype(jnp.float32)[None, None, :]
    return constrain(scores, ("batch", None, "vocab"))


def largest(hidden_BTD: jax.Array, segment_ids_BT: jax.Array | None) -> jax.Array:
    """The largest of each feature over the real tokens of each row, [B, 1, D]; zeros where there are none."""
    if segment_ids_BT is None:
        return jnp.max(hidden_BTD, axis=1, keepdims=True)
    real_BT1 = (segment_ids_BT > 0)[:, :, None]
    top_B1D = jnp.max(jnp.where(real_BT1, hidden_BTD, -jnp.inf), axis=1, keepdims=True)
    return jnp.where(jnp.any(real_BT1, axis=1, keepdims=True), top_B1D, 0.0)


def regularization(
    dropped_BTD: jax.Array,
    raw_BTD: jax.Array,
    segment_ids: jax.Array | None = None,
    *,
    activation: float = 2.0,
    slowness: float = 1.0,
) -> jax.Array:
    """What AWD-LSTM adds to the mean loss of a batch (Merity et al. 2017, section 5), a float32 scalar:
    ``activation * mean(dropped ** 2) + slowness * mean((raw[t + 1] - raw[t]) ** 2)``.

    As in their code, means and not norms; over real tokens, and neighbours of one document.

    Args:
        dropped_BTD, raw_BTD: the last layer's outputs after and before dropout, from ``apply_with_outputs``.
        activation: alpha, weight of the activation regularization.
        slowness: beta, weight of the temporal one.
    """
    ones_BT = jnp.ones(raw_BTD.shape[:2], jnp.int32)
    segments = ones_BT if segment_ids is None else segment_ids
    steps_BTD = raw_BTD[:, 1:].astype(jnp.float32) - raw_BTD[:, :-1].astype(jnp.float32)
    inside_BT = (segments[:, 1:] > 0) & (segments[:, 1:] == segments[:, :-1])
    return activation * _mean_square(dropped_BTD.astype(jnp.float32), segments > 0) + slowness * _mean_square(
        steps_BTD, inside_BT
    )


def _mean_square(x_BTD: jax.Array, counts_BT: jax.Array) -> jax.Array:
    total = jnp.sum(jnp.where(counts_BT[:, :, None], jnp.square(x_BTD), 0.0))
    return total / jnp.maximum(jnp.sum(counts_BT) * x_BTD.shape[-1], 1)
