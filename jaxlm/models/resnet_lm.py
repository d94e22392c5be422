"""GCNN (Dauphin et al. 2017): a causal language model with gated convolutions and residual connections.

A block with C channels applies a causal convolution with 2C outputs, and multiplies the first half of the outputs by
the sigmoid of the second half (GLU). If the block has a residual, which is its own input or the input of an earlier
block, it adds the residual and scales the sum by sqrt(0.5). All convolutions and linear layers except the head are
weight-normalized. There are no position embeddings. The output for a token depends only on the tokens of its document
in the receptive field, not on padding. The code follows fairseq's ``fconv_lm``, but the head is a linear layer without
bias instead of an adaptive softmax.

Shapes: B batch, T time, C channels.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.models import common, heads
from jaxlm.nn.convolution import causal_convolution, convolution_specs, weight_norm, weight_norm_specs
from jaxlm.nn.convolution.window import tail_specs
from jaxlm.nn.dropout import dropout
from jaxlm.nn.embedding import embed
from jaxlm.nn.linear import linear, linear_specs
from jaxlm.nn.token_layout import move_padding_last, past_segment_specs, restore_order
from jaxlm.sharding import constrain
from jaxlm.spec import ArraySpec, Normal, Params, State, fold_in_name

Block = tuple[int, int, int]
"""Channels, kernel size and residual of a block. Residual 0 adds nothing, 1 adds the input of the block itself, and n
adds the input of the block n - 1 blocks earlier. If the added input has another number of channels than the block, a
linear layer projects it."""


def _wikitext_103_blocks() -> tuple[Block, ...]:
    groups = (((850, 6, 1),) * 3, ((850, 1, 1),), ((850, 5, 1),) * 4, ((850, 1, 1),), ((850, 4, 1),) * 3)
    return (*(block for group in groups for block in group), (1024, 4, 1), (2048, 4, 1))


@dataclasses.dataclass(frozen=True)
class Config(common.ModelConfig):
    """Shape and behavior of a GCNN. The defaults are the published model for WikiText-103."""

    vocab_size: int = 267744
    """Number of token ids."""
    embed_dim: int = 280
    """Width of the token embeddings."""
    blocks: tuple[Block, ...] = _wikitext_103_blocks()
    """Channels, kernel size and residual of each block (``Block``). For example, a bottleneck has three blocks, and
    residual 3 in its last block adds the input of its first block."""
    dropout: float = 0.1
    """Dropout rate on embeddings and block inputs. The scale of the initial weights depends on this rate."""
    task: heads.DecoderTask = "causal"
    """Output head: next token (causal), label of the text (classification), label of each token (token_classification),
    answer span (span_qa), or none."""
    num_labels: int = 2
    """Number of labels if the task is classification or token_classification."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.blocks:
            raise ValueError("blocks=() must contain at least one block")
        for number, (channels, kernel, residual) in enumerate(self.blocks):
            if channels < 1 or kernel < 1 or not 0 <= residual <= number + 1:
                raise ValueError(
                    f"blocks[{number}]={(channels, kernel, residual)} must have at least 1 channel, a kernel size of "
                    f"at least 1, and a residual from 0 to {number + 1}"
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
    """The output of the last block, [B, T, C], and the new state (None without a state).

    Args:
        tokens: [B, T] integer ids. An id outside the vocabulary gives NaN, also for the later tokens of its document
            whose receptive field contains it.
        state: the state that the previous call returned, or the initial state (``state_specs``).
        segment_ids: [B, T] int32, 0 for padding and n for document n. Documents do not interact. Default: one document.
        key: random key for dropout; None: no dropout.
    """
    common.check_tokens(tokens, segment_ids)
    num_stateful = sum(kernel > 1 for _, kernel, _ in cfg.blocks)
    common.check_numbered_layers(params, state, len(cfg.blocks), num_stateful)
    tokens, layout = move_padding_last(tokens, segment_ids, None if state is None else state["segment_ids"])
    x = embed(params["token_embedding"], tokens, jnp.dtype(cfg.dtype), size=cfg.vocab_size)
    x = dropout(x, cfg.dropout, fold_in_name(key, "embedding"))
    x = linear(weight_norm(params["input"], num_input_axes=1), x)
    block_inputs, new_state = [x], {}
    for number, (_, _, residual) in enumerate(cfg.blocks):
        name = f"layer_{number}"
        weights, tail = params[name], None if state is None else state.get(name)
        x = dropout(x, cfg.dropout, fold_in_name(key, name))
        x, tail = causal_convolution(weight_norm(weights["convolution"], num_input_axes=2), layout, x, tail)
        x = x[:, :, 0] * jax.nn.sigmoid(x[:, :, 1])
        if residual:
            residual_input = block_inputs[-residual]
            if "residual" in weights:
                residual_input = linear(weight_norm(weights["residual"], num_input_axes=1), residual_input)
            x = (x + residual_input) * 0.5**0.5
        x = constrain(x, ("batch", "seq", "activation_embed"))
        block_inputs.append(x)
        if tail is not None:
            new_state[name] = tail
    hidden, past_segment_ids = restore_order(layout, x)
    return hidden, None if state is None else {"segment_ids": past_segment_ids, **new_state}


logits = heads.decoder_logits
pool = heads.pool_last_token


def _widths(cfg: Config) -> list[int]:
    """The number of channels of each block's input, and of the last block's output."""
    return [cfg.blocks[0][0], *(channels for channels, _, _ in cfg.blocks)]


def specs(cfg: Config) -> dict[str, Any]:
    """The specs of all parameters. Initial scales preserve variance through GLU and dropout (Gehring et al. 2017)."""
    keep_rate, widths = 1.0 - cfg.dropout, _widths(cfg)

    def normed_linear_specs(inputs: int, outputs: int) -> dict[str, ArraySpec]:
        unnormed = linear_specs((inputs, outputs), ("embed", "mlp"), Normal((keep_rate / inputs) ** 0.5))
        return weight_norm_specs(unnormed, num_input_axes=1)

    tree: dict[str, Any] = {
        "token_embedding": heads.table_specs(cfg, cfg.embed_dim, Normal(0.1)),
        "input": normed_linear_specs(cfg.embed_dim, widths[0]),
    }
    for number, (channels, kernel, residual) in enumerate(cfg.blocks):
        init = Normal((4 * keep_rate / (kernel * widths[number])) ** 0.5)
        # The two halves of the GLU have their own axis, so that both halves have the same sharding over channels.
        gated = convolution_specs((kernel, widths[number], 2, channels), ("embed", None, "mlp"), init)
        block = {"convolution": weight_norm_specs(gated, num_input_axes=2)}
        if residual and widths[number + 1 - residual] != channels:
            block["residual"] = normed_linear_specs(widths[number + 1 - residual], channels)
        tree[f"layer_{number}"] = block
    return tree | heads.decoder_head_specs(cfg, widths[-1], Normal((keep_rate / widths[-1]) ** 0.5))


def state_specs(cfg: Config, batch: int, length: int) -> dict[str, ArraySpec]:
    """The specs of the state, which has the same size for every ``length``.

    The state contains the last ``kernel size - 1`` inputs of each block, and the segment ids of the last tokens.
    """
    widths, dtype = _widths(cfg), jnp.dtype(cfg.dtype)
    tail_lengths = [kernel - 1 for _, kernel, _ in cfg.blocks]
    tails = {
        f"layer_{number}": tail_specs(batch, tail_length, widths[number], dtype)
        for number, tail_length in enumerate(tail_lengths)
        if tail_length
    }
    return {"segment_ids": past_segment_specs(batch, max(tail_lengths)), **tails}


def _bottleneck(narrow: int, wide: int) -> tuple[Block, ...]:
    return (narrow, 1, 0), (narrow, 5, 0), (wide, 1, 3)


_GCNN_8B_BLOCKS = (
    *((512, 1, 1), *_bottleneck(128, 512) * 3, *_bottleneck(256, 512) * 3),
    *((1024, 1, 0), (1024, 1, 0), (2048, 1, 3)),
)
_GCNN_14B_BLOCKS = (
    *((512, 5, 1), *_bottleneck(128, 512) * 3, *_bottleneck(512, 1024) * 3),
    *(*_bottleneck(1024, 2048) * 6, *_bottleneck(1024, 4096)),
)

HAS_LOCAL_RECEPTIVE_FIELD = True
"""Convolutions read only nearby tokens, so the contract tests do not expect that every output position depends on every
earlier token."""

VARIANTS = {
    "gcnn-14": Config(),
    # Published models for the Google Billion Word benchmark.
    "gcnn-13": Config(vocab_size=793471, embed_dim=128, blocks=((1268, 4, 1),) * 13),
    "gcnn-8b": Config(vocab_size=793471, embed_dim=128, blocks=_GCNN_8B_BLOCKS),
    "gcnn-14b": Config(vocab_size=793471, embed_dim=128, blocks=_GCNN_14B_BLOCKS),
    "resnet-lm-tiny": Config(vocab_size=128, embed_dim=16, blocks=((16, 6, 1), (8, 1, 0), (8, 4, 0), (24, 1, 3))),
}
