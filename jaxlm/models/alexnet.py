"""Convolutional networks over characters (Zhang et al. 2015): a classifier, and a causal language model of its layers.

Six convolutions, with pooling after the first, the second and the last, and two hidden layers with dropout. The
classifier reads texts of exactly ``max_positions`` characters, from the last character to the first; shorter ones are
padded with zeros at the end. So a text gives the published result, at whatever positions its row has padding (segment
0). A row holds one text; a row with several documents gives NaN.

The published input is a fixed one-hot vector: the token table is the identity and is not trained; its rows from
``embed_dim`` on (characters outside the alphabet) are zero. ``embedding="learned"`` trains the table, starting from a
Gaussian.

The language model pads on the left. Where the classifier pools with stride 3, it pools with stride 1 and dilates all
later layers by 3 (the a trous algorithm, Holschneider et al. 1989): the receptive field at each position is the one
that the classifier has at the end of its strides. Its hidden layers read one position at a time.

Shapes: B batch, T time, S time after the strides, C channels, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from jaxlm.models import common, heads
from jaxlm.nn.convolution import causal_convolution, convolution, convolution_specs
from jaxlm.nn.convolution.pooling import causal_max_pool, max_pool
from jaxlm.nn.convolution.window import close_stream, fixed_length, open_stream, past_specs, tail_specs
from jaxlm.nn.dropout import dropout
from jaxlm.nn.embedding import embed, round_up, unembed
from jaxlm.nn.linear import linear, linear_specs
from jaxlm.sharding import constrain
from jaxlm.spec import ArraySpec, Identity, Normal, fold_name

Task = Literal["causal", "classification", "none"]
Embedding = Literal["one_hot", "learned"]


@dataclasses.dataclass(frozen=True)
class Config(common.ModelConfig):
    """Shape and behaviour of a network over characters. The defaults are the small published classifier."""

    vocab_size: int = 71
    """Number of characters: the alphabet, and one id for all others (the space included, as published)."""
    max_positions: int = 1014
    """Length to which a classifier pads every text; longer texts are an error. A language model has no limit."""
    embed_dim: int = 70
    """Width of the token table; for one_hot, the size of the alphabet."""
    embedding: Embedding = "one_hot"
    """Token table: one_hot is the fixed identity (ids from embed_dim on are zero), learned is trained."""
    reverse: bool = True
    """Read texts from the last character to the first, as published; language models ignore it."""
    channels: int = 256
    """Channels of every convolution."""
    kernels: tuple[int, ...] = (7, 7, 3, 3, 3, 3)
    """Kernel of each convolution."""
    pools: tuple[int, ...] = (3, 3, 1, 1, 1, 3)
    """Window and stride of the pooling after each convolution; 1 means no pooling."""
    fc_dim: int = 1024
    """Width of the two hidden layers."""
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
        common.check_positive(self, "vocab_size", "max_positions", "embed_dim", "channels", "fc_dim", "num_labels")
        common.check_rates(self, "dropout")
        common.check_choices(self, embedding=get_args(Embedding), task=get_args(Task))
        if not self.kernels or len(self.kernels) != len(self.pools) or min(*self.kernels, *self.pools) < 1:
            raise ValueError(
                f"kernels={self.kernels} and pools={self.pools} must be equally many, at least one, and each at least 1"
            )
        if self.task != "causal" and _length(self) < 1:
            raise ValueError(
                f"max_positions={self.max_positions} leaves nothing after kernels={self.kernels} and "
                f"pools={self.pools}: lengthen it, or take fewer or smaller layers"
            )


def apply(
    cfg: Config,
    params: dict[str, Any],
    tokens: jax.Array,
    *,
    state: Any = None,
    segment_ids: jax.Array | None = None,
    key: jax.Array | None = None,
) -> tuple[jax.Array, Any]:
    """The hidden states of a language model, [B, T, fc_dim], and its new state (None without a state).

    For a classifier, the features of the text, [B, S, C], and None.

    Args:
        tokens: [B, T] integer ids; T at most ``max_positions`` for a classifier. An id outside the vocabulary
            gives NaN.
        state: of a language model, from ``state_specs``; the tokens continue the tokens in it.
        segment_ids: [B, T] int32, 0 for padding, 1, 2, ... for documents, which do not interact. Default: one document.
        key: random key for dropout; None: no dropout.
    """
    common.check_tokens(tokens, segment_ids, None, None)
    table = params["token_embedding"]
    if cfg.embedding == "one_hot":
        table = jax.lax.stop_gradient(table)
    if cfg.task == "causal":
        return _causal_layers(cfg, params, table, tokens, state, segment_ids, key)
    if state is not None:
        raise ValueError(f"a model with task={cfg.task!r} reads whole texts and carries no state: leave state=None")
    return _layers(cfg, params, table, tokens, segment_ids), None


def _layers(cfg: Config, params: dict[str, Any], table: jax.Array, tokens: jax.Array, segment_ids: Any) -> jax.Array:
    """The features of whole texts after all convolutions and poolings, [B, S, C]."""
    tokens, real_BT, single_B = fixed_length(tokens, segment_ids, cfg.max_positions, reverse=cfg.reverse)
    x = jnp.where(real_BT[:, :, None], embed(table, tokens, jnp.dtype(cfg.dtype)), 0.0)
    x = jnp.where(single_B[:, None, None], x, jnp.nan)
    for layer, pool in enumerate(cfg.pools):
        x = jax.nn.relu(convolution(params[f"layer_{layer}"], x, padding="valid"))
        if pool > 1:
            x = max_pool(x, pool, padding="valid", stride=pool)
        x = constrain(x, ("batch", "seq", "activation_embed"))
    return x


def _causal_layers(
    cfg: Config, params: dict[str, Any], table: jax.Array, tokens: jax.Array, state: Any, segment_ids: Any, key: Any
) -> tuple[jax.Array, Any]:
    """The hidden states of the language model, [B, T, fc_dim], and its new state."""
    tails = {} if state is None else state
    tokens, stream = open_stream(tokens, segment_ids, tails.get("segment_ids"))
    x, new_tails = embed(table, tokens, jnp.dtype(cfg.dtype)), {}
    for layer, dilation in enumerate(_dilations(cfg)):
        name, pool_name = f"layer_{layer}", f"pool_{layer}"
        x, new_tails[name] = causal_convolution(params[name], stream, x, tails.get(name), dilation=dilation)
        x = jax.nn.relu(x)
        x, new_tails[pool_name] = causal_max_pool(stream, x, tails.get(pool_name), cfg.pools[layer], dilation=dilation)
        x = constrain(x, ("batch", "seq", "activation_embed"))
    hidden, past = close_stream(stream, _hidden_layers(cfg, params, x, key))
    if state is None:
        return hidden, None
    return hidden, {"segment_ids": past, **{name: tail for name, tail in new_tails.items() if tail is not None}}


def _hidden_layers(cfg: Config, params: dict[str, Any], x: jax.Array, key: jax.Array | None) -> jax.Array:
    for name in ("fc_1", "fc_2"):
        x = dropout(jax.nn.relu(linear(params[name], x)), cfg.dropout, fold_name(key, name))
    return x


def pool(
    cfg: Config,
    params: dict[str, Any],
    hidden: jax.Array,
    segment_ids: jax.Array | None = None,
    key: jax.Array | None = None,
) -> jax.Array:
    """The input of the classifier, [B, 1, fc_dim]: hidden layers over all features. ``key`` is for their dropout.

    ``segment_ids`` have no effect: padding is part of the text.
    """
    return _hidden_layers(cfg, params, hidden.reshape(hidden.shape[0], 1, -1), key)


def logits(cfg: Config, params: dict[str, Any], hidden: jax.Array) -> jax.Array:
    """The logits of the task's head, float32: next token [B, T, V] (V padded to ``vocab_multiple``), or labels.

    Those of the labels have shape [B, 1, num_labels], for ``hidden`` from :func:`pool`.
    """
    if cfg.task != "causal":
        return heads.head_logits(cfg.task, params, hidden)
    return constrain(unembed(params["head"], hidden, cfg.vocab_size), ("batch", None, "vocab"))


def _length(cfg: Config) -> int:
    """S: the length of a text after all convolutions and poolings."""
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
    learned = cfg.embedding == "learned"
    table = ArraySpec((V, cfg.embed_dim), ("vocab", "embed"), normal if learned else Identity(), decay=learned)
    tree: dict[str, Any] = {"token_embedding": table}
    inputs = cfg.embed_dim
    for layer, kernel in enumerate(cfg.kernels):
        tree[f"layer_{layer}"] = convolution_specs((kernel, inputs, cfg.channels), ("embed", "mlp"), normal)
        inputs = cfg.channels
    if cfg.task == "none":
        return tree
    features = cfg.channels * (1 if cfg.task == "causal" else _length(cfg))
    for name, width in (("fc_1", features), ("fc_2", cfg.fc_dim)):
        tree[name] = linear_specs((width, cfg.fc_dim), ("embed", "mlp"), normal)
    if cfg.task == "causal":
        tree["head"] = ArraySpec((V, cfg.fc_dim), ("vocab", "embed"), normal, decay=True)
    return tree | heads.head_specs(cfg.task, cfg.fc_dim, cfg.num_labels, normal)


def state_specs(cfg: Config, batch: int, length: int) -> dict[str, ArraySpec]:
    """The specs of the last inputs of each convolution and pooling, and of the segment ids of the last tokens.

    The size does not depend on ``length``.

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
    longest = max((tail.shape[1] for tail in tails.values()), default=0)
    return {"segment_ids": past_specs(batch, longest), **tails}


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
