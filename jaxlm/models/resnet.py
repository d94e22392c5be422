"""VDCNN (Conneau et al. 2017): a very deep convolutional classifier of texts as characters.

Embedding, one convolution, blocks of two convolutions with batch normalisation, three halvings of the length where the
number of channels doubles, the 8 largest entries of each channel in their order, and two hidden layers. Convolutions
that a batch norm follows have no bias: it would take it away.

The published form reads texts of exactly 1024 characters, shorter ones padded with a symbol whose embedding is zero. So
does this one: padding (segment 0), wherever it stands, and what a row lacks of ``max_positions`` become such symbols
at the end. They are part of the text: zeros to the first convolution but not to those after it, and batch statistics
count them. What holds is that a text gives the published result, the same however its row is padded. A row holds one
text; one of several documents gives NaN.

Legend: B batch, T time, S time after the halvings, C channels, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from jaxlm.models import common, heads
from jaxlm.nn.batch_norm import batch_norm, batch_norm_specs, statistics_specs
from jaxlm.nn.convolution import convolution, convolution_specs
from jaxlm.nn.embedding import embed, padded
from jaxlm.nn.linear import linear, linear_specs
from jaxlm.nn.pooling import k_max_pool, max_pool
from jaxlm.nn.window import fixed_length
from jaxlm.sharding import constrain
from jaxlm.spec import ArraySpec, Normal

Downsample = Literal["max_pool", "k_max_pool", "convolution"]
Task = Literal["classification", "none"]


@dataclasses.dataclass(frozen=True)
class Config:
    """Shape and behaviour of a VDCNN. The defaults are the published form of 29 layers."""

    vocab_size: int = 69
    """Number of characters, padding and unknown included."""
    max_positions: int = 1024
    """Length that every text is padded to; longer ones are refused."""
    embed_dim: int = 16
    """Width of the character embeddings."""
    channels: int = 64
    """Channels of the first convolution and blocks; they double where the length halves."""
    blocks: tuple[int, ...] = (5, 5, 2, 2)
    """Blocks (of two convolutions) at each length."""
    shortcut: bool = False
    """Add what a block read to what it says (projected where the channels double), as a ResNet does."""
    downsample: Downsample = "max_pool"
    """Halve the length by pooling of 3 at stride 2, by the larger half of each channel, or by a convolution."""
    k_max: int = 8
    """Entries of each channel that the hidden layers read."""
    fc_dim: int = 2048
    """Width of the two hidden layers."""
    norm_epsilon: float = 1e-5
    """Added to the variance in batch norms."""
    norm_momentum: float = 0.1
    """How far a training step moves the running statistics towards those of its batch."""
    task: Task = "classification"
    """What the model is for, and so its head: a label for the text, or none."""
    num_labels: int = 2
    """Number of labels."""
    vocab_multiple: int = 1
    """Pad the token table to a multiple of this many rows, so that it divides over devices."""
    dtype: common.ComputeDtype = "float32"
    """Compute dtype of activations; parameters keep their own."""

    def __post_init__(self) -> None:
        common.check_positive(
            self, "vocab_size", "max_positions", "embed_dim", "channels", "k_max", "fc_dim", "num_labels",
            "vocab_multiple",
        )  # fmt: skip
        common.check_choices(
            self, downsample=get_args(Downsample), task=get_args(Task), dtype=get_args(common.ComputeDtype)
        )
        if not self.blocks or min(self.blocks) < 1:
            raise ValueError(f"blocks={self.blocks} must give at least one block for each length")
        if not 0.0 < self.norm_momentum <= 1.0:
            raise ValueError(f"norm_momentum={self.norm_momentum} must be in (0, 1]")
        halvings = 2 ** (len(self.blocks) - 1)
        if self.max_positions % halvings or self.max_positions // halvings < self.k_max:
            raise ValueError(
                f"max_positions={self.max_positions} must be a multiple of {halvings} (it is halved between the "
                f"{len(self.blocks)} groups of blocks) and at least {halvings} * k_max = {halvings * self.k_max}"
            )


def _widths(cfg: Config) -> list[tuple[int, int, bool]]:
    """Channels in and out of each block, and whether the length halves before it."""
    widths, before = [], cfg.channels
    for group, count in enumerate(cfg.blocks):
        for block in range(count):
            widths.append((before, cfg.channels * 2**group, group > 0 and block == 0))
            before = cfg.channels * 2**group
    return widths


def specs(cfg: Config) -> dict[str, Any]:
    """Every parameter of the model, and the running statistics of its norms."""

    def conv(kernel: int, before: int, after: int, bias: bool = False) -> dict[str, ArraySpec]:
        init = Normal((2 / (kernel * before)) ** 0.5)  # He et al. 2015
        return convolution_specs((kernel, before, after), ("embed", "mlp"), init, bias=bias)

    V = padded(cfg.vocab_size, cfg.vocab_multiple)
    tree: dict[str, Any] = {
        "token_embedding": ArraySpec((V, cfg.embed_dim), ("vocab", "embed"), Normal(1.0), decay=True),
        "input": conv(3, cfg.embed_dim, cfg.channels, bias=True),
        "statistics": {},
    }
    for layer, (before, after, _) in enumerate(_widths(cfg)):
        tree[f"layer_{layer}"] = {
            "convolution_1": conv(3, before, after),
            "norm_1": batch_norm_specs(after),
            "convolution_2": conv(3, after, after),
            "norm_2": batch_norm_specs(after),
            **({"shortcut": conv(1, before, after, bias=True)} if cfg.shortcut and before != after else {}),
        }
        tree["statistics"][f"layer_{layer}"] = {name: statistics_specs(after) for name in ("norm_1", "norm_2")}
    if cfg.task == "classification":
        features = cfg.k_max * cfg.channels * 2 ** (len(cfg.blocks) - 1)
        for name, width in (("fc_1", features), ("fc_2", cfg.fc_dim)):
            tree[name] = linear_specs((width, cfg.fc_dim), ("embed", "mlp"), Normal((2 / width) ** 0.5))
        tree |= heads.head_specs(cfg.task, cfg.fc_dim, cfg.num_labels, Normal(0.01))
    return tree


def apply(
    cfg: Config,
    params: dict[str, Any],
    tokens: jax.Array,
    *,
    state: None = None,
    segment_ids: jax.Array | None = None,
    key: jax.Array | None = None,
) -> tuple[jax.Array, Any]:
    """Features of the text, [B, S, C]: S is ``max_positions`` halved between groups, whatever T is.

    Args:
        tokens: [B, T] integer ids, T at most ``max_positions``. An id outside the vocabulary gives NaN.
        state: None; the model carries nothing.
        segment_ids: [B, T] int32, 0 padding. Default: no padding.
        key: None uses the running statistics. With a key the model trains: norms use the statistics of the batch,
            and the second output is ``{"statistics": ...}``, the moved ones, which replace those in ``params``.
    """
    if state is not None:
        raise ValueError("a classifier of whole texts carries no state: leave state=None")
    common.check_tokens(tokens, segment_ids, None, None)
    dtype, training = jnp.dtype(cfg.dtype), key is not None
    tokens, real_BT, single_B = fixed_length(tokens, segment_ids, cfg.max_positions)
    x = jnp.where(real_BT[:, :, None], embed(params["token_embedding"], tokens, dtype), 0.0)
    x = jnp.where(single_B[:, None, None], x, jnp.nan)
    x = constrain(x, ("batch", "seq", "activation_embed"))
    x = convolution(params["input"], x, padding="same")
    statistics = {}
    for layer, (_, _, halves) in enumerate(_widths(cfg)):
        name = f"layer_{layer}"
        x, statistics[name] = _block(cfg, params[name], params["statistics"][name], x, halves, training)
        x = constrain(x, ("batch", "seq", "activation_embed"))
    return x, {"statistics": statistics} if training else None


def _block(
    cfg: Config, weights: dict[str, Any], statistics: dict[str, Any], x: jax.Array, halves: bool, training: bool
) -> tuple[jax.Array, dict[str, Any]]:
    """Two convolutions (figure 2), after the length is halved where it is."""
    stride, moved = 1, {}
    if halves and cfg.downsample == "convolution":
        stride = 2
    elif halves:
        pool = cfg.downsample == "max_pool"
        x = max_pool(x, 3, padding="same", stride=2) if pool else k_max_pool(x, x.shape[1] // 2)
    residual = x
    if "shortcut" in weights:
        residual = convolution(weights["shortcut"], x, padding="same", stride=stride)
    for number, step in ((1, stride), (2, 1)):
        name = f"norm_{number}"
        x = convolution(weights[f"convolution_{number}"], x, padding="same", stride=step)
        x, moved[name] = batch_norm(
            weights[name], statistics[name], x, cfg.norm_epsilon, training=training, momentum=cfg.norm_momentum
        )
        if number == 2 and cfg.shortcut:
            x = x + residual
        x = jax.nn.relu(x)
    return x, moved


def summary(
    cfg: Config,
    params: dict[str, Any],
    hidden: jax.Array,
    segment_ids: jax.Array | None = None,
    key: jax.Array | None = None,
) -> jax.Array:
    """What the classifier reads, [B, 1, fc_dim]: hidden layers over the ``k_max`` largest entries of each channel.

    ``segment_ids`` and ``key`` change nothing: padding is part of the text, and nothing is dropped.
    """
    x = k_max_pool(hidden, cfg.k_max)
    x = x.reshape(x.shape[0], 1, -1)
    for name in ("fc_1", "fc_2"):
        x = jax.nn.relu(linear(params[name], x))
    return x


def logits(cfg: Config, params: dict[str, Any], hidden: jax.Array) -> jax.Array:
    """Logits of the labels from :func:`summary`, [B, 1, num_labels] float32."""
    return heads.head_logits(cfg.task, params, hidden)


VARIANTS = {
    "vdcnn-9": Config(blocks=(1, 1, 1, 1)),
    "vdcnn-17": Config(blocks=(2, 2, 2, 2)),
    "vdcnn-29": Config(),
    "vdcnn-49": Config(blocks=(8, 8, 5, 3)),
    "resnet-tiny": Config(
        vocab_size=64, max_positions=64, embed_dim=16, channels=16, blocks=(1, 1), shortcut=True, k_max=4, fc_dim=32
    ),
}
