"""The model of the LSTM and GRU families: layers in one or both directions, with the dropout of AWD-LSTM.

``lstm.py`` and ``gru.py`` have the configs and the variants. A config chooses the cell (:attr:`RecurrentConfig.cell`).

Merity et al. 2017 ("Regularizing and Optimizing LSTM Language Models") drop recurrent weights (``weight_dropout``,
DropConnect), the embeddings of whole token ids (``embedding_dropout``), and activations with one mask for all steps of
a row (``input_dropout``, ``hidden_dropout``, ``output_dropout``). This module follows the code of Merity et al.

Shapes: B batch, T time, D width, V vocabulary.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.models import common, heads
from jaxlm.nn.dropout import dropout
from jaxlm.nn.embedding import embed
from jaxlm.nn.segments import segment_boundaries
from jaxlm.sharding import constrain
from jaxlm.spec import ArraySpec, Initializer, Params, State, Uniform, fold_in_name

Direction = Literal["forward", "both"]
DropoutMask = Literal["locked", "fresh"]


class LayerFunctions(NamedTuple):
    """The functions of a kind of recurrent layer.

    Attributes:
        layer: ``recurrence.lstm`` or ``recurrence.gru``.
        specs: a function that returns the specs of the parameters: ``specs(inputs, width, init)``.
        state_specs: a function that returns the specs of the state: ``state_specs(batch, width)``.
    """

    layer: Callable[..., tuple[jax.Array, dict[str, jax.Array]]]
    specs: Callable[[int, int, Initializer | None], dict[str, ArraySpec]]
    state_specs: Callable[[int, int], dict[str, ArraySpec]]


@dataclasses.dataclass(frozen=True)
class RecurrentConfig(common.ModelConfig, abc.ABC):
    """Base class of the ``Config`` of ``lstm`` and ``gru``. The defaults are AWD-LSTM on the Penn Treebank."""

    vocab_size: int = 10000
    """Number of token ids."""
    num_layers: int = 3
    """Number of layers."""
    embed_dim: int = 400
    """Width of the embeddings, and of the last layer if tie_embeddings is True and the direction is forward."""
    hidden_dim: int = 1150
    """Width of each direction of a layer. The last layer has the width embed_dim instead if tie_embeddings is True and
    the direction is forward."""
    direction: Direction = "forward"
    """Read forward (forward), or in both directions with concatenated outputs (both; an encoder)."""
    tie_embeddings: bool = True
    """Use the token table as output head (task causal). If True and the direction is forward, the last layer has the
    width embed_dim for every task, so that a language model can be fine-tuned for another task."""
    embedding_dropout: float = 0.1
    """Dropout rate on whole token embeddings: all occurrences of a token id in a batch are dropped together."""
    input_dropout: float = 0.4
    """Dropout rate on the embedded tokens."""
    hidden_dropout: float = 0.25
    """Dropout rate between layers."""
    output_dropout: float = 0.4
    """Dropout rate on the output of the last layer."""
    weight_dropout: float = 0.5
    """Dropout rate on the hidden-to-hidden weights (DropConnect)."""
    dropout_mask: DropoutMask = "locked"
    """Dropout mask of activations: one for all steps of a row (locked), or one for each step (fresh)."""
    init_bound: float = 0.1
    """Initial embeddings and heads are uniform in [-init_bound, init_bound]."""
    recurrent_init_bound: float | None = None
    """Bound of the uniform initial weights of the layers; None means 1 / sqrt(width of the layer)."""
    task: heads.DecoderTask = "causal"
    """Output head: next token (causal), label of the text (classification), label of each token (token_classification),
    answer span (span_qa), or none."""
    num_labels: int = 2
    """Number of labels if the task is classification or token_classification."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.direction == "both" and self.task == "causal":
            raise ValueError("direction='both' reads the tokens that task='causal' predicts: use direction='forward'")

    @property
    @abc.abstractmethod
    def cell(self) -> LayerFunctions:
        """The functions of the recurrent layers."""


def apply(
    cfg: RecurrentConfig,
    params: Params,
    tokens: jax.Array,
    *,
    state: State | None = None,
    segment_ids: jax.Array | None = None,
    key: jax.Array | None = None,
) -> tuple[jax.Array, State | None]:
    """The outputs of the last layer after dropout, [B, T, D], and the new state (None without a state).

    Args:
        tokens: [B, T] integer ids. An id outside the vocabulary gives NaN, also for later tokens of its document
            (direction both: for all tokens of its document).
        state: the state that the previous call returned, or the initial state (``state_specs``).
        segment_ids: [B, T] int32, 0 for padding and n for document n. Documents do not interact. Default: one document.
        key: random key for dropout; None: no dropout.

    Raises:
        ValueError: the inputs are not integers of the same shape, or there is a state and the model reads in both
            directions.
    """
    dropped, _, state = apply_with_outputs(cfg, params, tokens, state=state, segment_ids=segment_ids, key=key)
    return dropped, state


def apply_with_outputs(
    cfg: RecurrentConfig,
    params: Params,
    tokens: jax.Array,
    *,
    state: State | None = None,
    segment_ids: jax.Array | None = None,
    key: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, State | None]:
    """The outputs of the last layer after and before dropout, both [B, T, D], and the new state; see :func:`apply`.

    :func:`regularization` needs both outputs.
    """
    common.check_tokens(tokens, segment_ids)
    if state is not None and cfg.direction == "both":
        raise ValueError("direction='both' needs the whole sequence at once and carries no state: leave state out")
    common.check_numbered_layers(params, state, cfg.num_layers)
    layer = cfg.cell.layer
    x = embed(params["token_embedding"], tokens, jnp.dtype(cfg.dtype), size=cfg.vocab_size)
    if key is not None and cfg.embedding_dropout > 0.0:
        # All occurrences of a token id in the batch share one entry of the mask.
        ones_V1 = jnp.ones((params["token_embedding"].shape[0], 1))
        x = x * embed(dropout(ones_V1, cfg.embedding_dropout, fold_in_name(key, "words")), tokens, x.dtype)
    x = constrain(_dropout(cfg, x, cfg.input_dropout, fold_in_name(key, "input")), ("batch", "seq", "activation_embed"))

    segments, masks, last_segment = None, {}, None
    if segment_ids is not None or state is not None:
        segments = common.segment_ids_or_ones(tokens, segment_ids)
        reset, keep, last_segment = segment_boundaries(segments, None if state is None else state["last_segment"])
        masks = {"reset_BT": reset, "keep_BT": keep}
    new_state: dict[str, Any] = {"last_segment": last_segment}
    for index in range(cfg.num_layers):
        name = f"layer_{index}"
        layer_key = fold_in_name(key, name)
        if index > 0:
            x = _dropout(cfg, x, cfg.hidden_dropout, fold_in_name(layer_key, "input"))
        if cfg.direction == "both":
            weights = {
                direction: _drop_connect(cfg, layer_weights, fold_in_name(layer_key, direction))
                for direction, layer_weights in params[name].items()
            }
            x = bidirectional(layer, weights, x, segments)
        else:
            layer_state = None if state is None else state[name]
            layer_weights = _drop_connect(cfg, params[name], layer_key)
            x, new_state[name] = layer(layer_weights, x, layer_state, **masks)
        x = constrain(x, ("batch", "seq", "activation_embed"))
    return _dropout(cfg, x, cfg.output_dropout, fold_in_name(key, "output")), x, None if state is None else new_state


def bidirectional(
    layer: Callable[..., Any], weights: Params, x_BTD: jax.Array, segment_ids_BT: jax.Array | None
) -> jax.Array:
    """The outputs of a layer that reads forward and a layer that reads backward, concatenated, [B, T, 2H].

    Args:
        layer: ``recurrence.lstm`` or ``recurrence.gru``.
        weights: the parameters of both layers, ``forward`` and ``backward``.
        segment_ids_BT: 0 for padding and n for document n; None: each row is one document.
    """
    forward_masks, backward_masks = {}, {}
    if segment_ids_BT is not None:
        reset, keep, _ = segment_boundaries(segment_ids_BT)
        forward_masks = {"reset_BT": reset, "keep_BT": keep}
        backward_masks = {"reset_BT": segment_boundaries(segment_ids_BT, reverse=True)[0], "keep_BT": keep}
    forward, _ = layer(weights["forward"], x_BTD, **forward_masks)
    backward, _ = layer(weights["backward"], x_BTD, **backward_masks, reverse=True)
    return jnp.concatenate([forward, backward], axis=-1)


def _dropout(cfg: RecurrentConfig, x_BTD: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    if key is None or rate == 0.0 or cfg.dropout_mask == "fresh":
        return dropout(x_BTD, rate, key)
    B, _, D = x_BTD.shape
    return x_BTD * dropout(jnp.ones((B, 1, D), x_BTD.dtype), rate, key)


def _drop_connect(cfg: RecurrentConfig, params: Params, key: jax.Array | None) -> dict[str, Any]:
    """The parameters of a layer, with DropConnect (Wan et al. 2013) on the hidden-to-hidden weights.

    All steps of a call share one mask.
    """
    dropped = dropout(params["weight_hidden"], cfg.weight_dropout, fold_in_name(key, "weight_hidden"))
    return {**params, "weight_hidden": dropped}


logits = heads.decoder_logits


def pool(
    cfg: RecurrentConfig,
    params: Params,
    hidden: jax.Array,
    segment_ids: jax.Array | None = None,
    key: jax.Array | None = None,
) -> jax.Array:
    """The pooled output: the maximum of each feature over the real tokens, [B, 1, D]; zeros for a row of padding.

    Conneau et al. 2017 ("InferSent") find max pooling better than mean pooling for bidirectional encoders.
    """
    if segment_ids is None:
        return jnp.max(hidden, axis=1, keepdims=True)
    real_BT1 = (segment_ids > 0)[:, :, None]
    top_B1D = jnp.max(jnp.where(real_BT1, hidden, -jnp.inf), axis=1, keepdims=True)
    return jnp.where(jnp.any(real_BT1, axis=1, keepdims=True), top_B1D, 0.0)


def regularization(
    dropped_BTD: jax.Array,
    raw_BTD: jax.Array,
    segment_ids: jax.Array | None = None,
    *,
    activation_weight: float = 2.0,
    slowness_weight: float = 1.0,
) -> jax.Array:
    """The regularization term of AWD-LSTM, a float32 scalar to add to the mean loss (Merity et al. 2017, section 4.6):
    ``activation_weight * mean(dropped ** 2) + slowness_weight * mean((raw[t + 1] - raw[t]) ** 2)``.

    As in the published code, these are means of squares. The paper has L2 norms. The first mean is over real tokens,
    the second mean over pairs of adjacent tokens of the same document.

    Args:
        dropped_BTD, raw_BTD: outputs of the last layer after and before dropout, from ``apply_with_outputs``.
        segment_ids: [B, T] int32, 0 for padding. Default: one document.
        activation_weight: alpha, weight of the activation regularization.
        slowness_weight: beta, weight of the temporal activation regularization.
    """
    ones_BT = jnp.ones(raw_BTD.shape[:2], jnp.int32)
    segments = ones_BT if segment_ids is None else segment_ids
    differences_BTD = raw_BTD[:, 1:].astype(jnp.float32) - raw_BTD[:, :-1].astype(jnp.float32)
    same_document_BT = (segments[:, 1:] > 0) & (segments[:, 1:] == segments[:, :-1])
    return activation_weight * _mean_square(
        dropped_BTD.astype(jnp.float32), segments > 0
    ) + slowness_weight * _mean_square(differences_BTD, same_document_BT)


def _mean_square(x_BTD: jax.Array, mask_BT: jax.Array) -> jax.Array:
    total = jnp.sum(jnp.where(mask_BT[:, :, None], jnp.square(x_BTD), 0.0))
    count = jnp.sum(mask_BT, dtype=jnp.float32) * x_BTD.shape[-1]  # the product may be above the maximum of int32
    return total / jnp.maximum(count, 1.0)


def layer_widths(cfg: RecurrentConfig) -> list[int]:
    """The width of each layer (of one direction). See ``tie_embeddings`` for the last layer."""
    last = cfg.embed_dim if cfg.tie_embeddings and cfg.direction == "forward" else cfg.hidden_dim
    return [cfg.hidden_dim] * (cfg.num_layers - 1) + [last]


def specs(cfg: RecurrentConfig) -> dict[str, Any]:
    """The specs of all parameters. Layers are separate (``layer_0``, ``layer_1``, ...), because their widths differ."""
    directions, uniform = 2 if cfg.direction == "both" else 1, Uniform(cfg.init_bound)
    recurrent_init = None if cfg.recurrent_init_bound is None else Uniform(cfg.recurrent_init_bound)
    tree: dict[str, Any] = {"token_embedding": heads.table_specs(cfg, cfg.embed_dim, uniform)}
    inputs = cfg.embed_dim
    for index, width in enumerate(layer_widths(cfg)):
        layer = cfg.cell.specs(inputs, width, recurrent_init)
        tree[f"layer_{index}"] = {"forward": layer, "backward": layer} if cfg.direction == "both" else layer
        inputs = directions * width
    if cfg.task == "causal":
        tree["head"] = {"bias": heads.vocab_bias_specs(cfg)}
        if not cfg.tie_embeddings:
            tree["head"]["weight"] = heads.table_specs(cfg, inputs, uniform)
    return tree | heads.head_specs(cfg.task, inputs, cfg.num_labels, uniform)


def state_specs(cfg: RecurrentConfig, batch: int, length: int) -> dict[str, Any]:
    """The specs of the state: the state of each layer, and the last segment id of each row; ``length`` is not used.

    Raises:
        TypeError: the model reads in both directions.
    """
    if cfg.direction == "both":
        raise TypeError("direction='both' needs the whole sequence at once: only direction='forward' carries a state")
    layers = {f"layer_{index}": cfg.cell.state_specs(batch, width) for index, width in enumerate(layer_widths(cfg))}
    return {**layers, "last_segment": ArraySpec((batch,), ("batch",), dtype=jnp.int32)}


carried_state_length = common.fixed_size_state_length
