"""VDCNN (Conneau et al. 2017): a very deep convolutional network over characters that classifies texts.

The model has an embedding, one convolution, and blocks of two convolutions with batch normalization. Then k-max pooling
keeps the k largest entries of each channel in their order (by default, k is 8). Two hidden layers and the head follow.
The blocks form groups. From one group to the next, the length is halved and the number of channels is doubled (three
times with four groups). Convolutions before a batch norm have no bias, because the norm would subtract it.

The published model reads texts of exactly 1024 characters. Shorter texts are padded with a symbol whose embedding is
zero. Here, the padding tokens of a row (segment 0) are moved to the end of the row, and the row is padded to
``max_positions``. So the positions of padding in a row do not change the result. As in the published model, the padding
counts as part of the text: the values at padding are not zero after the first convolution, and batch statistics include
these values. A row must contain only one text; a row with several documents gives NaN.

Shapes: B batch, T time, S length after all halvings, C channels.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax

from jaxlm.models import common, heads
from jaxlm.nn.batch_norm import batch_norm, batch_norm_specs, statistics_specs
from jaxlm.nn.convolution import convolution, convolution_specs
from jaxlm.nn.convolution.pooling import k_max_pool, max_pool
from jaxlm.nn.linear import linear, linear_specs
from jaxlm.sharding import constrain
from jaxlm.spec import ArraySpec, Normal, Params

Downsample = Literal["max_pool", "k_max_pool", "convolution"]
Task = Literal["classification", "none"]


@dataclasses.dataclass(frozen=True)
class Config(common.ModelConfig):
    """Shape and behavior of a VDCNN. The defaults are the published model with 29 layers."""

    vocab_size: int = 69
    """Number of character ids, including padding and unknown."""
    max_positions: int = 1024
    """Number of tokens to which every text is padded; a longer text is an error."""
    embed_dim: int = 16
    """Width of the character embeddings."""
    channels: int = 64
    """Channels of the first convolution and the first group of blocks; doubled each time the length is halved."""
    blocks: tuple[int, ...] = (5, 5, 2, 2)
    """Number of blocks in each group; the length is halved between groups."""
    shortcut: bool = False
    """Whether the input of a block is added to its output, as in a ResNet. If the number of channels changes, a linear
    projection of the input is added."""
    downsample: Downsample = "max_pool"
    """How to halve the length: max_pool (window 3, stride 2), k_max_pool (keep the larger half of the entries of each
    channel) or convolution (stride 2)."""
    k_max: int = 8
    """Number of largest entries of each channel that the last pooling keeps."""
    fc_dim: int = 2048
    """Width of the two hidden layers."""
    norm_epsilon: float = 1e-5
    """Added to the variance in batch norms."""
    norm_momentum: float = 0.1
    """Weight of the current batch in the update of the running statistics."""
    task: Task = "classification"
    """Output head: label of the text (classification) or none."""
    num_labels: int = 2
    """Number of labels."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.blocks or min(self.blocks) < 1:
            raise ValueError(f"blocks={self.blocks} must give at least one block for each group")
        if not 0.0 < self.norm_momentum <= 1.0:
            raise ValueError(f"norm_momentum={self.norm_momentum} must be in (0, 1]")
        length_divisor = 2 ** (len(self.blocks) - 1)
        if self.max_positions % length_divisor or self.max_positions // length_divisor < self.k_max:
            raise ValueError(
                f"max_positions={self.max_positions} must be a multiple of {length_divisor} (it is halved between the "
                f"{len(self.blocks)} groups of blocks) and at least {length_divisor} * k_max = "
                f"{length_divisor * self.k_max}"
            )


def apply(
    cfg: Config,
    params: Params,
    tokens: jax.Array,
    *,
    state: None = None,
    segment_ids: jax.Array | None = None,
    key: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, Any] | None]:
    """The features of the text, [B, S, C], and the new running statistics (None without a ``key``).

    For n groups of blocks, S is ``max_positions / 2 ** (n - 1)``, for every T, and C is ``channels * 2 ** (n - 1)``.

    Args:
        tokens: [B, T] integer ids, T at most ``max_positions``. An id outside the vocabulary gives NaN for all features
            whose receptive field contains it, and so for the pooled output of the row. In training, such an id gives
            NaN for the whole batch and for the running statistics.
        state: None; the model has no state.
        segment_ids: [B, T] int32, 0 for padding. A row with several documents gives NaN. In training, such a row gives
            NaN for the whole batch and for the running statistics. Default: no padding.
        key: None: evaluation, in which norms use the running statistics. Any key: training, in which norms use the
            statistics of the batch. The second output is then ``{"statistics": ...}`` with the updated running
            statistics, which the caller writes into ``params``.

    Raises:
        ValueError: ``state`` is not None, the inputs are not integers of the same shape, or T exceeds
            ``max_positions``.
    """
    if state is not None:
        raise ValueError("a classifier of whole texts carries no state: leave state=None")
    common.check_tokens(tokens, segment_ids)
    common.check_numbered_layers(params, None, sum(cfg.blocks))
    training = key is not None
    x = common.embed_padded_text(cfg, params["token_embedding"], tokens, segment_ids)
    # Time is not split over the mesh: the mesh axis of ``seq`` might not divide the halved lengths of later blocks.
    axes = "batch", None, "activation_embed"
    x = constrain(x, axes)
    x = convolution(params["input"], x, padding="same")
    statistics = {}
    for layer, (_, _, halve) in enumerate(_widths(cfg)):
        name = f"layer_{layer}"
        x, statistics[name] = _block(cfg, params[name], params["statistics"][name], x, halve, training)
        x = constrain(x, axes)
    return x, {"statistics": statistics} if training else None


def _block(
    cfg: Config, weights: Params, statistics: dict[str, Any], x: jax.Array, halve: bool, training: bool
) -> tuple[jax.Array, dict[str, Any]]:
    """The output of a block (two convolutions; figure 2 of the paper), and its new running statistics.

    Args:
        halve: whether the block halves the length, before or in its first convolution.
    """
    stride, new_statistics = 1, {}
    if halve and cfg.downsample == "convolution":
        stride = 2
    elif halve and cfg.downsample == "max_pool":
        x = max_pool(x, 3, padding="same", stride=2)
    elif halve:
        x = k_max_pool(x, x.shape[1] // 2)
    residual = x
    if "shortcut" in weights:
        residual = convolution(weights["shortcut"], x, padding="same", stride=stride)
    for number, conv_stride in ((1, stride), (2, 1)):
        name = f"norm_{number}"
        x = convolution(weights[f"convolution_{number}"], x, padding="same", stride=conv_stride)
        x, new_statistics[name] = batch_norm(
            weights[name], statistics[name], x, cfg.norm_epsilon, training=training, momentum=cfg.norm_momentum
        )
        if number == 2 and cfg.shortcut:
            x = x + residual
        x = jax.nn.relu(x)
    return x, new_statistics


def pool(
    cfg: Config,
    params: Params,
    hidden: jax.Array,
    segment_ids: jax.Array | None = None,
    key: jax.Array | None = None,
) -> jax.Array:
    """The pooled output, [B, 1, fc_dim]: the two hidden layers applied to the ``k_max`` largest entries per channel.

    ``segment_ids`` and ``key`` have no effect, because padding counts as part of the text and there is no dropout.

    Raises:
        ValueError: the task is none.
    """
    heads.require_pooled_output(cfg.task, params, "fc_1")
    x = k_max_pool(hidden, cfg.k_max)
    x = heads.concatenate_features(x)
    for name in ("fc_1", "fc_2"):
        x = jax.nn.relu(linear(params[name], x))
    return x


def logits(cfg: Config, params: Params, hidden: jax.Array) -> jax.Array:
    """The logits of the labels, [B, 1, num_labels] float32; ``hidden`` comes from :func:`pool`.

    Raises:
        ValueError: the task is none.
    """
    return heads.head_logits(cfg.task, params, hidden)


def _widths(cfg: Config) -> list[tuple[int, int, bool]]:
    """For each block, its input channels, its output channels, and whether it halves the length."""
    widths, inputs = [], cfg.channels
    for group, count in enumerate(cfg.blocks):
        for block in range(count):
            outputs = cfg.channels * 2**group
            widths.append((inputs, outputs, group > 0 and block == 0))
            inputs = outputs
    return widths


def specs(cfg: Config) -> dict[str, Any]:
    """The specs of all parameters, and of the running statistics of the norms."""

    def conv(kernel: int, inputs: int, outputs: int, bias: bool = False) -> dict[str, ArraySpec]:
        init = Normal((2 / (kernel * inputs)) ** 0.5)  # He et al. 2015
        return convolution_specs((kernel, inputs, outputs), ("embed", "mlp"), init, bias=bias)

    tree: dict[str, Any] = {
        "token_embedding": heads.table_specs(cfg, cfg.embed_dim, Normal(1.0)),
        "input": conv(3, cfg.embed_dim, cfg.channels, bias=True),
        "statistics": {},
    }
    for layer, (inputs, outputs, _) in enumerate(_widths(cfg)):
        tree[f"layer_{layer}"] = {
            "convolution_1": conv(3, inputs, outputs),
            "norm_1": batch_norm_specs(outputs),
            "convolution_2": conv(3, outputs, outputs),
            "norm_2": batch_norm_specs(outputs),
            **({"shortcut": conv(1, inputs, outputs, bias=True)} if cfg.shortcut and inputs != outputs else {}),
        }
        tree["statistics"][f"layer_{layer}"] = {name: statistics_specs(outputs) for name in ("norm_1", "norm_2")}
    if cfg.task == "classification":
        num_features = cfg.k_max * cfg.channels * 2 ** (len(cfg.blocks) - 1)
        for name, width in (("fc_1", num_features), ("fc_2", cfg.fc_dim)):
            tree[name] = linear_specs((width, cfg.fc_dim), ("embed", "mlp"), Normal((2 / width) ** 0.5))
        tree |= heads.head_specs(cfg.task, cfg.fc_dim, cfg.num_labels, Normal(0.01))
    return tree


HAS_LOCAL_RECEPTIVE_FIELD = True
"""Convolutions read only nearby tokens, so the contract tests do not expect that every output position depends on every
token."""

VARIANTS = {
    "vdcnn-9": Config(blocks=(1, 1, 1, 1)),
    "vdcnn-17": Config(blocks=(2, 2, 2, 2)),
    "vdcnn-29": Config(),
    "vdcnn-49": Config(blocks=(8, 8, 5, 3)),
    "resnet-tiny": Config(
        vocab_size=64, max_positions=64, embed_dim=16, channels=16, blocks=(1, 1), shortcut=True, k_max=4, fc_dim=32
    ),
}
