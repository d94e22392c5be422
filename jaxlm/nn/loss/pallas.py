"""Pallas kernels for TPUs: the cross entropy of tokens and its gradients, without logits in HBM.

XLA writes the logits to HBM. It reads them again for the log-sum-exp and for the matmuls of the gradients. The kernels
compute tiles of logits in VMEM. The first kernel computes the log-sum-exp of each position and the logit of
its target. The second kernel computes the logits again, and multiplies their gradient by the table and by the hidden
states. So there are four matmuls instead of three. The logits and the sums of the gradients are float32. The gradient
of the logits is rounded to the dtype of the hidden states before the two products.

A tile of logits is transposed, [E, R]. The targets, weights and log-sum-exps of the R positions are then rows [1, R],
which the vector unit broadcasts at no cost.

Shapes: B batch, T time, D model width, V vocabulary (rows of the table), E number of ids of a block, N = B * T
positions of a device with the padding of the blocks, R number of positions of a block, C number of positions of a call
of the second kernel.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxlm import sharding
from jaxlm.devices import LANES, SUBLANES
from jaxlm.nn import lazy_pallas
from jaxlm.nn.embedding import Unembedding, widen_ids
from jaxlm.nn.lazy_pallas import pl, pltpu
from jaxlm.nn.linear import dot
from jaxlm.nn.time_chunks import pad_axis

MAX_BLOCK_IDS = 512
"""Maximum of E."""
MAX_BLOCK_ROWS = 1024
"""Maximum of R with 64 MiB of VMEM. With 128 MiB, the maximum is twice as large."""
MAX_BLOCK_ENTRIES = 2**19
"""Maximum number of entries of a block of the table [E, D]. The maximum for a block of hidden states [R, D] is twice as
large with 64 MiB of VMEM, and four times as large with 128 MiB. A block with LANES rows may have more entries."""
LARGE_VMEM_TPUS = ("TPU v5 lite", "TPU v6")
"""Prefixes of the device kinds of TPUs with 128 MiB of VMEM. Other TPUs from v5 on have 64 MiB."""
VMEM_LIMIT_SHARE = 3 / 4
"""Share of the VMEM that a kernel may use."""
MAX_SUM_SHARE = 3 / 8
"""Maximum share of the VMEM for the float32 sums [C, D] of the gradients of the hidden states. With one block of
positions, the sums may have more bytes."""

_LOWEST = float(jnp.finfo(jnp.float32).min)
_POSITION_AXES = ("batch", None)
_ARRAY_AXES = [(None, "activation_embed"), (None,), ("batch", None, "activation_embed"), _POSITION_AXES]
"""The logical axes of the table, the bias, the hidden states and the targets."""


def token_losses(unembedding: Unembedding, targets_BT: jax.Array) -> jax.Array:
    """The same as ``cross_entropy(unembedding.logits(), targets)``, [B, T] float32."""
    vmem_bytes = _vmem_bytes()

    def device_losses(table: jax.Array, bias: jax.Array, hidden: jax.Array, targets: jax.Array) -> jax.Array:
        return _losses_and_lse(_make_blocks(unembedding, vmem_bytes, table, bias, hidden, targets))[0]

    return sharding.map_shards(device_losses, _ARRAY_AXES, _POSITION_AXES)(*_arrays(unembedding), targets_BT)


def losses_and_gradients(
    unembedding: Unembedding, targets_BT: jax.Array, weights_BT: jax.Array
) -> tuple[jax.Array, Unembedding]:
    """The result of :func:`token_losses`, and the gradients of its weighted sum for the arrays of ``unembedding``."""
    vmem_bytes = _vmem_bytes()

    def device_gradients(
        table: jax.Array, bias: jax.Array, hidden: jax.Array, targets: jax.Array, weights: jax.Array
    ) -> tuple[jax.Array, ...]:
        blocks = _make_blocks(unembedding, vmem_bytes, table, bias, hidden, targets)
        losses_BT, lse_1N = _losses_and_lse(blocks)
        dtable_VD, dbias_V, dhidden_BTD = _gradients(blocks, weights, lse_1N)
        return losses_BT, *jax.lax.psum((dtable_VD, dbias_V), mesh_axes), dhidden_BTD

    active = sharding.active()
    mesh_axes = () if active is None else active.mesh_axes(("batch",))
    out_axes = [_POSITION_AXES, (None, None), (None,), ("batch", None, None)]
    losses_BT, dtable_VD, dbias_V, dhidden_BTD = sharding.map_shards(
        device_gradients, [*_ARRAY_AXES, _POSITION_AXES], out_axes
    )(*_arrays(unembedding), targets_BT, weights_BT)
    table, bias = unembedding.table, unembedding.bias
    return losses_BT, dataclasses.replace(
        unembedding,
        table=dtable_VD.astype(table.dtype),
        hidden=dhidden_BTD,
        bias=None if bias is None else dbias_V.astype(bias.dtype),
    )


def _arrays(unembedding: Unembedding) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The table, the bias in float32 (zeros without a bias), and the hidden states."""
    table, V = unembedding.table, unembedding.table.shape[0]
    if sharding.num_shards(("embed",)) > 1:
        table = table.astype(unembedding.hidden.dtype)  # the all-gather sends half as many bytes
    bias_V = jnp.zeros(V, jnp.float32) if unembedding.bias is None else unembedding.bias.astype(jnp.float32)
    return table, bias_V, unembedding.hidden


@dataclasses.dataclass(frozen=True)
class _Blocks:
    """The padded arrays of a device, and the sizes of their blocks.

    Attributes:
        bias_V1: the lowest number for ids that are padding. V is padded to a multiple of E; the table is not padded.
        targets_1N: -1 for a target outside the vocabulary.
        shape: [B, T, D].
        vocab_size: number of rows of the table without padding ids.
    """

    table_VD: jax.Array
    bias_V1: jax.Array
    hidden_ND: jax.Array
    targets_1N: jax.Array
    shape: tuple[int, ...]
    E: int
    R: int
    C: int
    vmem_bytes: int
    vocab_size: int
    soft_cap: float | None
    has_bias: bool

    @property
    def grid(self) -> tuple[int, int]:
        """The numbers of blocks of the vocabulary and of the positions."""
        return len(self.bias_V1) // self.E, len(self.hidden_ND) // self.R

    def load_table(self, table: Any, i: jax.Array) -> jax.Array:
        """Block i of the table, [E, D], inside a kernel. Rows of padding ids and after the table are zeros."""
        table_ED = table[...]
        if self.vocab_size < len(self.bias_V1):
            is_id_ED = lax.broadcasted_iota(jnp.int32, table.shape, 0) < self.vocab_size - i * self.E
            table_ED = jnp.where(is_id_ED, table_ED, jnp.zeros(table.shape, table.dtype))
        return table_ED.astype(self.hidden_ND.dtype)

    def is_target(self, targets: Any, i: jax.Array) -> jax.Array:
        """Whether an id of block i of the vocabulary is the target of a position, [E, R], inside a kernel."""
        return lax.broadcasted_iota(jnp.int32, (self.E, self.R), 0) == targets[...] - i * self.E

    def logits(self, table_ED: jax.Array, bias: Any, hidden: Any) -> tuple[jax.Array, jax.Array]:
        """A tile of logits [E, R] inside a kernel, and the derivative of the soft cap (1.0 without a soft cap)."""
        logits_ER, derivative = dot(table_ED, hidden[...], (1, 1)), jnp.float32(1.0)
        if self.soft_cap is not None:
            tanh_ER = jnp.tanh(logits_ER / self.soft_cap)
            logits_ER, derivative = tanh_ER * self.soft_cap, 1.0 - tanh_ER * tanh_ER
        return logits_ER + bias[...], derivative


def _make_blocks(
    unembedding: Unembedding,
    vmem_bytes: int,
    table_VD: jax.Array,
    bias_V: jax.Array,
    hidden_BTD: jax.Array,
    targets_BT: jax.Array,
) -> _Blocks:
    (V, D), N = table_VD.shape, targets_BT.size
    padded_width = D + -D % LANES
    max_ids = MAX_BLOCK_ENTRIES // padded_width
    E = _block_size(V, min(MAX_BLOCK_IDS, max_ids))
    R = _block_size(N, vmem_bytes // 2**26 * min(MAX_BLOCK_ROWS, 2 * max_ids))
    max_sum_rows = int(MAX_SUM_SHARE * vmem_bytes) // (4 * padded_width)
    vocab_size, targets_BT = min(unembedding.vocab_size, len(table_VD)), widen_ids(targets_BT)
    targets_BT = jnp.where((targets_BT >= 0) & (targets_BT < vocab_size), targets_BT, -1)
    bias_V = pad_axis(bias_V, 0, -V % E, axis=0)
    return _Blocks(
        table_VD,
        jnp.where(jnp.arange(len(bias_V)) < vocab_size, bias_V, _LOWEST)[:, None],
        pad_axis(hidden_BTD.reshape(N, D), 0, -N % R, axis=0),
        pad_axis(targets_BT.reshape(1, N).astype(jnp.int32), 0, -N % R),
        shape=hidden_BTD.shape, E=E, R=R, C=lazy_pallas.largest_divisor(N + -N % R, R, max(max_sum_rows, R)),
        vmem_bytes=vmem_bytes,
        vocab_size=vocab_size, soft_cap=unembedding.soft_cap, has_bias=unembedding.bias is not None,
    )  # fmt: skip


def _block_size(size: int, maximum: int) -> int:
    """The size of the blocks of an axis, a multiple of LANES, at most ``maximum`` or LANES.

    The padding of the last block is computed too. A block takes about as long as its entries and LANES more.
    """

    def cycles(block: int) -> int:
        return -(-size // block) * (block + LANES)

    return min(range(max(maximum - maximum % LANES, LANES), 0, -LANES), key=cycles)


def _vmem_bytes() -> int:
    """The bytes of VMEM of the TPU."""
    return (128 if sharding.device_kind().startswith(LARGE_VMEM_TPUS) else 64) * 2**20


def _compiler_params(blocks: _Blocks, *semantics: str) -> Any:
    limit = int(VMEM_LIMIT_SHARE * blocks.vmem_bytes)
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=limit)


def _losses_and_lse(blocks: _Blocks) -> tuple[jax.Array, jax.Array]:
    """The cross entropies [B, T], NaN for a target outside the vocabulary, and the log-sum-exps [1, N]."""
    E, R, D = blocks.E, blocks.R, blocks.shape[2]
    ids, positions = blocks.grid

    def kernel(table: Any, bias: Any, hidden: Any, targets: Any, lse: Any, target_logits: Any, *sums: Any) -> None:
        i = pl.program_id(1)
        # Row s of these arrays [SUBLANES, R] belongs to the ids whose remainder modulo SUBLANES is s: their maximum,
        # their sum of exponentials, and the logit of the target.
        maximum, total, target = sums

        @pl.when(i == 0)
        def initialize() -> None:
            maximum[...] = jnp.full((SUBLANES, R), _LOWEST, jnp.float32)
            total[...] = target[...] = jnp.zeros((SUBLANES, R), jnp.float32)

        logits_ER, _ = blocks.logits(blocks.load_table(table, i), bias, hidden)
        target_logits_ER = jnp.where(blocks.is_target(targets, i), logits_ER, 0.0)
        logits, target_terms = (x.reshape(E // SUBLANES, SUBLANES, R) for x in (logits_ER, target_logits_ER))
        new_maximum = jnp.maximum(maximum[...], jnp.max(logits, axis=0))
        exp_sum = jnp.sum(jnp.exp(logits - new_maximum[None]), axis=0)
        total[...] = total[...] * jnp.exp(maximum[...] - new_maximum) + exp_sum
        maximum[...] = new_maximum
        target[...] += jnp.sum(target_terms, axis=0)

        @pl.when(i == ids - 1)
        def finish() -> None:
            maximum_1R = jnp.max(maximum[...], axis=0, keepdims=True)
            total_1R = jnp.sum(total[...] * jnp.exp(maximum[...] - maximum_1R), axis=0, keepdims=True)
            lse[...] = maximum_1R + jnp.log(total_1R)
            target_logits[...] = jnp.sum(target[...], axis=0, keepdims=True)

    row = pl.BlockSpec((1, R), lambda n, i: (0, n))
    lse_1N, target_logits_1N = pl.pallas_call(
        kernel, name="loss_statistics", grid=(positions, ids), interpret=lazy_pallas.INTERPRET,
        in_specs=[
            pl.BlockSpec((E, D), lambda n, i: (i, 0)), pl.BlockSpec((E, 1), lambda n, i: (i, 0)),
            pl.BlockSpec((R, D), lambda n, i: (n, 0)), row,
        ],
        out_specs=[row, row], out_shape=[jax.ShapeDtypeStruct((1, positions * R), jnp.float32)] * 2,
        scratch_shapes=[pltpu.VMEM((SUBLANES, R), jnp.float32)] * 3,
        compiler_params=_compiler_params(blocks, "parallel", "arbitrary"),
    )(blocks.table_VD, blocks.bias_V1, blocks.hidden_ND, blocks.targets_1N)  # fmt: skip
    losses_1N = jnp.where(blocks.targets_1N >= 0, lse_1N - target_logits_1N, jnp.nan)
    B, T, _ = blocks.shape
    return losses_1N[0, : B * T].reshape(B, T), lse_1N


def _gradients(blocks: _Blocks, weights_BT: jax.Array, lse_1N: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradients of the table [V, D] and of the bias [V], float32, and of the hidden states [B, T, D].

    The inner axis of the grid is the blocks of positions. The gradient of a block of the table stays in VMEM during the
    inner axis. The gradients of all hidden states of a call stay in VMEM during the whole call.
    """
    E, R, (B, T, D) = blocks.E, blocks.R, blocks.shape
    ids, C = blocks.grid[0], blocks.C
    V, N = len(blocks.table_VD), len(blocks.hidden_ND)
    last = ids - 1

    def kernel(
        table: Any, bias: Any, hidden: Any, targets: Any, weights: Any, lse: Any, *outputs: Any,
    ) -> None:  # fmt: skip
        *old_sums, dtable, dbias, dhidden, dhidden_sum = outputs
        i, n = pl.program_id(0), pl.program_id(1)
        table_ED = blocks.load_table(table, i)
        logits_ER, derivative = blocks.logits(table_ED, bias, hidden)
        p_ER = jnp.exp(logits_ER - lse[...])
        gradient_ER = jnp.where(blocks.is_target(targets, i), p_ER - 1.0, p_ER) * weights[...]

        @pl.when(n == 0)
        def start_sums() -> None:
            for new, old in zip((dtable, dbias), old_sums or (None, None), strict=True):
                new[...] = jnp.zeros(new.shape, jnp.float32) if old is None else old[...]

        if blocks.has_bias:
            dbias[...] += jnp.sum(gradient_ER, axis=1, keepdims=True)
        gradient_ER = (gradient_ER * derivative).astype(hidden.dtype)
        dtable[...] += dot(gradient_ER, hidden[...], (1, 0))
        rows = pl.ds(pl.multiple_of(n * R, R), R)
        dhidden_RD = dot(gradient_ER, table_ED, (0, 0))
        dhidden_sum[rows] = jnp.where(i == 0, 0.0, dhidden_sum[rows]) + dhidden_RD

        @pl.when(i == last)
        def write() -> None:
            dhidden[...] = dhidden_sum[rows].astype(dhidden.dtype)

    row = pl.BlockSpec((1, R), lambda i, n: (0, n))
    table_block, bias_block = (pl.BlockSpec((E, width), lambda i, n: (i, 0)) for width in (D, 1))
    # Before the last block of the vocabulary, the index of the output block is 0, so Pallas writes no block to HBM.
    dhidden_block = pl.BlockSpec((R, D), lambda i, n: (jnp.where(i == last, n, 0), 0))
    sum_blocks = [table_block, bias_block]
    sum_shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((V, D), blocks.bias_V1.shape)]

    def run(arrays: tuple[jax.Array, ...], old_sums: tuple[jax.Array, ...]) -> tuple[Any, jax.Array]:
        *sums, dhidden_CD = pl.pallas_call(
            kernel, name="loss_gradients", grid=(ids, C // R), interpret=lazy_pallas.INTERPRET,
            in_specs=[
                *sum_blocks, pl.BlockSpec((R, D), lambda i, n: (n, 0)), row, row, row, *sum_blocks[: len(old_sums)]
            ],
            out_specs=[*sum_blocks, dhidden_block],
            out_shape=[*sum_shapes, jax.ShapeDtypeStruct((C, D), blocks.hidden_ND.dtype)],
            input_output_aliases={6 + index: index for index in range(len(old_sums))},
            scratch_shapes=[pltpu.VMEM((C, D), jnp.float32)],
            compiler_params=_compiler_params(blocks, "arbitrary", "arbitrary"),
        )(blocks.table_VD, blocks.bias_V1, *arrays, *old_sums)  # fmt: skip
        return tuple(sums), dhidden_CD

    rows_1N = blocks.targets_1N, pad_axis(weights_BT.reshape(1, B * T), 0, N - B * T), lse_1N
    calls = blocks.hidden_ND.reshape(N // C, C, D), *(x.reshape(N // C, 1, C) for x in rows_1N)
    (dtable_VD, dbias_V1), dhidden_ND = run(tuple(x[0] for x in calls), ())
    if N > C:
        later_calls = tuple(x[1:] for x in calls)
        (dtable_VD, dbias_V1), later = lax.scan(lambda sums, x: run(x, sums), (dtable_VD, dbias_V1), later_calls)
        dhidden_ND = jnp.concatenate([dhidden_ND, later.reshape(-1, D)])
    return dtable_VD, dbias_V1[:V, 0], dhidden_ND[: B * T].reshape(B, T, D)
