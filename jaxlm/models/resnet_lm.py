"""GCNN (Dauphin et al. 2017): a causal language model of gated convolutions with residual connections.

Each block pads on the left, convolves to twice its channels, and multiplies the first half by the sigmoid of the second
(GLU); what an earlier block said is added and the sum is scaled by sqrt(0.5). Every convolution and linear map is
weight-normalised. There are no positions: what a token sees are the last tokens of its document, the same however the
row is padded. Follows fairseq's ``fconv_lm``, but for its adaptive softmax: here the head is a plain table.

Legend: B batch, T time, C channels, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from jaxlm.models import common, heads
from jaxlm.nn.convolution import causal_convolution, convolution_specs, weight_norm, weight_norm_specs
from jaxlm.nn.dropout import dropout
from jaxlm.nn.embedding import embed, padded, unembed
from jaxlm.nn.linear import linear, linear_specs
from jaxlm.nn.window import close_stream, open_stream, past_specs, tail_specs
from jaxlm.sharding import constrain
from jaxlm.spec import ArraySpec, Normal, fold_name

Task = Literal["causal", "none"]
Block = tuple[int, int, int]
"""Channels, kernel, and how many blocks back the residual starts (1: what this block reads; 0: there is none)."""


def _wikitext_103() -> tuple[Block, ...]:
    wide = (((850, 6, 1),) * 3, ((850, 1, 1),), ((850, 5, 1),) * 4, ((850, 1, 1),), ((850, 4, 1),) * 3)
    return (*(block for group in wide for block in group), (1024, 4, 1), (2048, 4, 1))


def _bottleneck(narrow: int, wide: int) -> tuple[Block, ...]:
    return (narrow, 1, 0), (narrow, 5, 0), (wide, 1, 3)


@dataclasses.dataclass(frozen=True)
class Config:
    """Shape and behaviour of a GCNN. The defaults are the published model of WikiText-103."""

    vocab_size: int = 267744
    """Number of token ids."""
    embed_dim: int = 280
    """Width of the token embeddings."""
    blocks: tuple[Block, ...] = _wikitext_103()
    """For each block its channels, its kernel, and how many blocks back its residual starts: 1 adds what the block
    reads, 0 nothing, 3 on the last block of a bottleneck what its first block read."""
    dropout: float = 0.1
    """Dropout rate on embeddings and on what each block reads, while training; initial weights allow for it."""
    task: Task = "causal"
    """What the model is for, and so its head: the next token, or none."""
    vocab_multiple: int = 1
    """Pad the token tables to a multiple of this many rows, so that they divide over devices."""
    dtype: common.ComputeDtype = "float32"
    """Compute dtype of activations; parameters keep their own."""

    def __post_init__(self) -> None:
        common.check_positive(self, "vocab_size", "embed_dim", "vocab_multiple")
        common.check_rates(self, "dropout")
        common.check_choices(self, task=get_args(Task), dtype=get_args(common.ComputeDtype))
        if not self.blocks:
            raise ValueError("blocks=() must name at least one block")
        for number, (channels, kernel, residual) in enumerate(self.blocks):
            if channels < 1 or kernel < 1 or not 0 <= residual <= number + 1:
                raise ValueError(
                    f"block {number} of blocks is {(channels, kernel, residual)}: it needs at least 1 channel, a "
                    f"kernel of at least 1, and a residual from 0 to {number + 1} blocks back"
                )


def _widths(cfg: Config) -> list[int]:
    """Channels of what stands before each block, and after the last."""
    return [cfg.blocks[0][0], *(channels for channels, _, _ in cfg.blocks)]


def specs(cfg: Config) -> dict[str, Any]:
    """Every parameter of the model. Initial scales keep the variance through GLU and dropout (Gehring et al. 2017)."""
    V, kept, widths = padded(cfg.vocab_size, cfg.vocab_multiple), 1.0 - cfg.dropout, _widths(cfg)

    def linear_map(before: int, after: int) -> dict[str, ArraySpec]:
        plain = linear_specs((before, after), ("embed", "mlp"), Normal((kept / before) ** 0.5))
        return weight_norm_specs(plain, inputs=1)

    tree: dict[str, Any] = {
        "token_embedding": ArraySpec((V, cfg.embed_dim), ("vocab", "embed"), Normal(0.1), decay=True),
        "input": linear_map(cfg.embed_dim, widths[0]),
    }
    for number, (channels, kernel, residual) in enumerate(cfg.blocks):
        init = Normal((4 * kept / (kernel * widths[number])) ** 0.5)
        # The two halves of the output stand apart, so that a split of the channels splits both alike.
        gated = convolution_specs((kernel, widths[number], 2, channels), ("embed", None, "mlp"), init)
        block = {"convolution": weight_norm_specs(gated, inputs=2)}
        if residual and widths[number + 1 - residual] != channels:
            block["residual"] = linear_map(widths[number + 1 - residual], channels)
        tree[f"layer_{number}"] = block
    if cfg.task == "causal":
        init = Normal((kept / widths[-1]) ** 0.5)
        tree["head"] = ArraySpec((V, widths[-1]), ("vocab", "embed"), init, decay=True)
    return tree


def state_specs(cfg: Config, batch: int, length: int) -> dict[str, ArraySpec]:
    """The last inputs of each block, and the documents of the last tokens. Of one size, whatever the ``length``."""
    widths, dtype = _widths(cfg), jnp.dtype(cfg.dtype)
    reaches = [kernel - 1 for _, kernel, _ in cfg.blocks]
    tails = {
        f"layer_{number}": tail_specs(batch, reach, widths[number], dtype)
        for number, reach in enumerate(reaches)
        if reach
    }
    return {"segment_ids": past_specs(batch, max(reaches)), **tails}


def apply(
    cfg: Config,
    params: dict[str, Any],
    tokens: jax.Array,
    *,
    state: Any = None,
    segment_ids: jax.Array | None = None,
    key: jax.Array | None = None,
) -> tuple[jax.Array, Any]:
    """What the last block says, [B, T, C], and the new state (None without one).

    Args:
        tokens: [B, T] integer ids. An id outside the vocabulary gives NaN.
        state: from ``state_specs``; the tokens then continue what it holds.
        segment_ids: [B, T] int32, 0 padding, 1.. documents that do not see each other. Default: one document.
        key: random key for dropout; None is deterministic.
    """
    common.check_tokens(tokens, segment_ids, None, None)
    tokens, stream = open_stream(tokens, segment_ids, None if state is None else state["segment_ids"])
    x = embed(params["token_embedding"], tokens, jnp.dtype(cfg.dtype))
    x = dropout(x, cfg.dropout, fold_name(key, "embedding"))
    x = linear(weight_norm(params["input"], inputs=1), x)
    said, new_state = [x], {}
    for number, (_, _, residual) in enumerate(cfg.blocks):
        name = f"layer_{number}"
        weights, tail = params[name], None if state is None else state.get(name)
        read = dropout(x, cfg.dropout, fold_name(key, name))
        halves, tail = causal_convolution(weight_norm(weights["convolution"], inputs=2), stream, read, tail)
        x = halves[:, :, 0] * jax.nn.sigmoid(halves[:, :, 1])
        if residual:
            earlier = said[-residual]
            if "residual" in weights:
                earlier = linear(weight_norm(weights["residual"], inputs=1), earlier)
            x = (x + earlier) * 0.5**0.5
        x = constrain(x, ("batch", "seq", "activation_embed"))
        said.append(x)
        if tail is not None:
            new_state[name] = tail
    hidden, past = close_stream(stream, x)
    return hidden, None if state is None else {"segment_ids": past, **new_state}


def logits(cfg: Config, params: dict[str, Any], hidden: jax.Array) -> jax.Array:
    """Unnormalised log-probabilities of the next token, [B, T, V] float32 (V padded to ``vocab_multiple``)."""
    if cfg.task != "causal":
        return heads.head_logits(cfg.task, params, hidden)
    return constrain(unembed(params["head"], hidden, cfg.vocab_size), ("batch", None, "vocab"))


_8_BOTTLENECK = (
    *((512, 1, 1), *_bottleneck(128, 512) * 3, *_bottleneck(256, 512) * 3),
    *((1024, 1, 0), (1024, 1, 0), (2048, 1, 3)),
)
_14_BOTTLENECK = (
    *((512, 5, 1), *_bottleneck(128, 512) * 3, *_bottleneck(512, 1024) * 3),
    *(*_bottleneck(1024, 2048) * 6, *_bottleneck(1024, 4096)),
)

VARIANTS = {
    "gcnn-14": Config(),
    # The Google Billion Word benchmark.
    "gcnn-13": Config(vocab_size=793471, embed_dim=128, blocks=((1268, 4, 1),) * 13),
    "gcnn-8b": Config(vocab_size=793471, embed_dim=128, blocks=_8_BOTTLENECK),
    "gcnn-14b": Config(vocab_size=793471, embed_dim=128, blocks=_14_BOTTLENECK),
    "resnet-lm-tiny": Config(vocab_size=128, embed_dim=16, blocks=((16, 6, 1), (8, 1, 0), (8, 4, 0), (24, 1, 3))),
}
