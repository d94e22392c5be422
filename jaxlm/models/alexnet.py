"""Convolutional networks over characters (Zhang et al. 2015): a classifier, and a causal language model.

By default, both networks have six convolutions, with max pooling after the first, the second and the last convolution,
and two hidden layers with dropout. The classifier reads ``max_positions`` characters: by default, the text from its
last character to its first, then zero vectors. The padding tokens of a row (segment 0) are removed first, so they do
not change the result. A row of the classifier must contain only one text; a row with several documents gives NaN.

The published input is a one-hot vector. So the token table is an identity matrix that is not trained. Ids of at least
``embed_dim``, for characters outside the alphabet, have zero rows. With ``embedding="learned"``, the table is trained;
its initial values are Gaussian.

The convolutions of the language model are causal. Where the classifier pools with stride s, the language model pools
with stride 1 and multiplies the dilation of all later layers by s (the a trous algorithm, Holschneider et al. 1989), so
that the receptive field stays the same. The hidden layers of the language model are applied to each position
separately.

Shapes: B batch, T time, S length of the classifier's features, C channels, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxlm.models import common, heads
from jaxlm.nn.convolution import causal_convolution, convolution, convolution_specs
from jaxlm.nn.convolution.pooling import causal_max_pool, max_pool
from jaxlm.nn.convolution.window import tail_specs
from jaxlm.nn.dropout import dropout
from jaxlm.nn.embedding import embed, round_up
from jaxlm.nn.linear import linear, linear_specs
from jaxlm.nn.token_layout import move_padding_last, past_segment_specs, restore_order
from jaxlm.sharding import constrain
from jaxlm.spec import ArraySpec, Identity, Normal, Params, State, fold_in_name

Task = Literal["causal", "classification", "none"]
Embedding = Literal["one_hot", "learned"]


@dataclasses.dataclass(frozen=True)
class Config(common.ModelConfig):
    """Shape and behavior of a character-level network. The defaults are the small published classifier."""

    vocab_size: int = 71
    """Number of ids: one per character of the alphabet, and one for all other characters (also the space, as
    published)."""
    max_positions: int = 1014
    """Length to which a classifier pads every text; longer texts are an error. A language model has no limit."""
    embed_dim: int = 70
    """Width of the token table; for one_hot, the size of the alphabet."""
    embedding: Embedding = "one_hot"
    """Token table: a fixed identity matrix with zeros for ids of embed_dim or more (one_hot), or trained (learned)."""
    reverse: bool = True
    """Read texts from the last character to the first, as published; language models ignore this field."""
    channels: int = 256
    """Channels of every convolution."""
    kernels: tuple[int, ...] = (7, 7, 3, 3, 3, 3)
    """Kernel size of each convolution."""
    pools: tuple[int, ...] = (3, 3, 1, 1, 1, 3)
    """Window and stride of the pooling after each convolution; 1 means no pooling."""
    fc_dim: int = 1024
    """Width of the two hidden (fully connected) layers."""
    dropout: float = 0.5
    """Dropout rate after each hidden layer."""
    init_stddev: float = 0.05
    """Standard deviation of initial weights."""
    task: Task = "classification"
    """Type of the model and its head: label of the text (classification), next token (causal), or none."""
    num_labels: int = 2
    """Number of labels if the task is classification."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.kernels or len(self.kernels) != len(self.pools) or min(*self.kernels, *self.pools) < 1:
            raise ValueError(
                f"kernels={self.kernels} and pools={self.pools} must have the same length, at least one entry, "
                "and entries of at least 1"
            )
        if self.task != "causal" and _feature_length(self) < 1:
            raise ValueError(
                f"max_positions={self.max_positions} is too short for kernels={self.kernels} and pools={self.pools}: "
                "increase it, or use fewer or smaller layers"
            )


def apply(
    cfg: Config,
    params: Params,
    tokens: jax.Array,
    *,
    state: State | None = None,
    segment_ids: jax.Array | None = None,
    key: jax.Array | None = None,
) -> tuple[jax.Array, State | None]:
    """The hidden states of a language model, [B, T, fc_dim], and the new state (None without a state).

    A classifier, or a model with the task none, instead returns the features of the text, [B, S, C], and None.

    Args:
        tokens: [B, T] integer ids; T at most ``max_positions`` for a classifier. An id outside the vocabulary
            gives NaN, also for other positions whose receptive field contains it.
        state: for a language model, the state that the previous call returned, or the initial state (``state_specs``).
        segment_ids: [B, T] int32, 0 for padding and n for document n. Documents do not interact. A classifier gives NaN
            for a row with several documents. Default: one document.
        key: random key for dropout of a language model; None: no dropout. A classifier applies dropout in :func:`pool`.

    Raises:
        ValueError: the inputs are not integers of the same shape; a classifier gets a state; or a classifier gets more
            than ``max_positions`` tokens per row.
    """
    common.check_tokens(tokens, segment_ids)
    table = params["token_embedding"]
    if cfg.embedding == "one_hot":
        table = jax.lax.stop_gradient(table)
    if state is not None and cfg.task != "causal":
        raise ValueError(f"a model with task={cfg.task!r} reads whole texts and carries no state: leave state=None")
    num_stateful = sum(kernel > 1 for kernel in cfg.kernels)
    common.check_numbered_layers(params, state, len(cfg.kernels), num_stateful)
    if cfg.task == "causal":
        return _causal_hidden_states(cfg, params, table, tokens, state, segment_ids, key)
    return _text_features(cfg, params, table, tokens, segment_ids), None


def _text_features(
    cfg: Config, params: Params, table: jax.Array, tokens: jax.Array, segment_ids: jax.Array | None
) -> jax.Array:
    """The features of the classifier after all convolutions and poolings, [B, S, C]."""
    x = common.embed_padded_text(cfg, table, tokens, segment_ids, reverse=cfg.reverse)
    for layer, window in enumerate(cfg.pools):
        x = jax.nn.relu(convolution(params[f"layer_{layer}"], x, padding="valid"))
        if window > 1:
            x = max_pool(x, window, padding="valid", stride=window)
        x = constrain(x, ("batch", None, "activation_embed"))  # not "seq": the mesh may not divide the length
    return x


def _causal_hidden_states(
    cfg: Config,
    params: Params,
    table: jax.Array,
    tokens: jax.Array,
    state: State | None,
    segment_ids: jax.Array | None,
    key: jax.Array | None,
) -> tuple[jax.Array, State | None]:
    """The hidden states of the language model, [B, T, fc_dim], and its new state."""
    tails = {} if state is None else state
    tokens, layout = move_padding_last(tokens, segment_ids, tails.get("segment_ids"))
    x, new_tails = embed(table, tokens, jnp.dtype(cfg.dtype), size=cfg.vocab_size), {}
    for layer, dilation in enumerate(_dilations(cfg)):
        name, pool_name = f"layer_{layer}", f"pool_{layer}"
        x, new_tails[name] = causal_convolution(params[name], layout, x, tails.get(name), dilation=dilation)
        x = jax.nn.relu(x)
        x, new_tails[pool_name] = causal_max_pool(layout, x, tails.get(pool_name), cfg.pools[layer], dilation=dilation)
        x = constrain(x, ("batch", "seq", "activation_embed"))
    hidden, past_segment_ids = restore_order(layout, _hidden_layers(cfg, params, x, key))
    if state is None:
        return hidden, None
    return hidden, {
        "segment_ids": past_segment_ids,
        **{name: tail for name, tail in new_tails.items() if tail is not None},
    }


def _hidden_layers(cfg: Config, params: Params, x: jax.Array, key: jax.Array | None) -> jax.Array:
    for name in ("fc_1", "fc_2"):
        x = dropout(jax.nn.relu(linear(params[name], x)), cfg.dropout, fold_in_name(key, name))
    return x


def pool(
    cfg: Config,
    params: Params,
    hidden: jax.Array,
    segment_ids: jax.Array | None = None,
    key: jax.Array | None = None,
) -> jax.Array:
    """The pooled output, [B, 1, fc_dim]: the output of the hidden layers for the concatenated features of a row.

    With a ``key``, dropout is applied. ``segment_ids`` has no effect, because :func:`apply` has already replaced the
    padding by zeros.

    Raises:
        ValueError: the task is not classification.
    """
    heads.require_pooled_output(cfg.task, params, "classifier")
    return _hidden_layers(cfg, params, heads.concatenate_features(hidden), key)


def max_positions(cfg: Config) -> int | None:
    """The maximum number of tokens of a row; None for a language model, which has no limit."""
    return None if cfg.task == "causal" else cfg.max_positions


logits = heads.decoder_logits


def _feature_length(cfg: Config) -> int:
    """S, the length of a text after all convolutions and poolings of the classifier."""
    length = cfg.max_positions
    for kernel, pool in zip(cfg.kernels, cfg.pools, strict=True):
        length = (length - kernel + 1) // pool
    return length


def _dilations(cfg: Config) -> list[int]:
    """The dilation of each layer of the language model: the product of the classifier's strides before the layer."""
    dilations = [1]
    for pool in cfg.pools[:-1]:
        dilations.append(dilations[-1] * pool)
    return dilations


def specs(cfg: Config) -> dict[str, Any]:
    """The specs of all parameters."""
    V, normal = round_up(cfg.vocab_size, cfg.vocab_multiple), Normal(cfg.init_stddev)
    is_learned = cfg.embedding == "learned"
    table = ArraySpec((V, cfg.embed_dim), ("vocab", "embed"), normal if is_learned else Identity(), decay=is_learned)
    tree: dict[str, Any] = {"token_embedding": table}
    inputs = cfg.embed_dim
    for layer, kernel in enumerate(cfg.kernels):
        tree[f"layer_{layer}"] = convolution_specs((kernel, inputs, cfg.channels), ("embed", "mlp"), normal)
        inputs = cfg.channels
    if cfg.task == "none":
        return tree
    num_features = cfg.channels * (1 if cfg.task == "causal" else _feature_length(cfg))
    for name, width in (("fc_1", num_features), ("fc_2", cfg.fc_dim)):
        tree[name] = linear_specs((width, cfg.fc_dim), ("embed", "mlp"), normal)
    if cfg.task == "causal":
        tree["head"] = heads.table_specs(cfg, cfg.fc_dim, normal)
    return tree | heads.head_specs(cfg.task, cfg.fc_dim, cfg.num_labels, normal)


def state_specs(cfg: Config, batch: int, length: int) -> dict[str, ArraySpec]:
    """The specs of the state: the last inputs of each convolution and pooling, and the last segment ids.

    The state has the same size for every ``length``.

    Raises:
        TypeError: the model is not a language model.
    """
    if cfg.task != "causal":
        raise TypeError(f"a model with task={cfg.task!r} reads whole texts and carries no state: use task='causal'")
    tails, inputs, dtype = {}, cfg.embed_dim, jnp.dtype(cfg.dtype)
    for layer, dilation in enumerate(_dilations(cfg)):
        for name, taps, width in (
            (f"layer_{layer}", cfg.kernels[layer], inputs), (f"pool_{layer}", cfg.pools[layer], cfg.channels)
        ):  # fmt: skip
            if taps > 1:
                tails[name] = tail_specs(batch, (taps - 1) * dilation, width, dtype)
        inputs = cfg.channels
    longest_tail = max((tail.shape[1] for tail in tails.values()), default=0)
    return {"segment_ids": past_segment_specs(batch, longest_tail), **tails}


HAS_LOCAL_RECEPTIVE_FIELD = True
"""The output at a position depends only on the inputs in its receptive field."""

VARIANTS = {
    "alexnet-small": Config(),
    "alexnet-large": Config(channels=1024, fc_dim=2048, init_stddev=0.02),
    "alexnet-tiny": Config(
        vocab_size=65, max_positions=64, embed_dim=64, channels=32, kernels=(5, 3), pools=(3, 2), fc_dim=32,
        init_stddev=0.1,
    ),
    "alexnet-lm-tiny": Config(
        vocab_size=64, embed_dim=16, embedding="learned", channels=32, kernels=(4, 3), pools=(3, 3), fc_dim=32,
        init_stddev=0.2, task="causal",
    ),
}  # fmt: skip
