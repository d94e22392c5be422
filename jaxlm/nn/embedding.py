"""Embedding tables: from ids to vectors, and from vectors to logits.

Shapes: B batch, T time, D model width, V vocabulary (rows of the table, possibly with padding rows).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from jaxlm.nn import activation, choices, unembed_pallas
from jaxlm.nn.linear import linear
from jaxlm.sharding import constrain, gather_sharding
from jaxlm.spec import require_arrays


def embed(
    table_VD: jax.Array, ids_BT: jax.Array, dtype: DTypeLike, *, rows: str | None = "vocab", size: int | None = None
) -> jax.Array:
    """The rows of the table for the ids, [B, T, D] in ``dtype``. An id outside the table gives NaN.

    Args:
        rows: logical name of the table's first axis.
        size: number of valid ids. The rows of the table from ``size`` on are padding, and their ids give NaN. None: the
            table has no padding.
    """
    # FSDP splits the width of parameters and the batch of activations, so the table is all-gathered here.
    table_VD = constrain(jnp.asarray(table_VD), (rows, "activation_embed"))
    ids_BT = widen_ids(ids_BT)
    if size is not None and size < table_VD.shape[0]:
        ids_BT = jnp.where(ids_BT < size, ids_BT, table_VD.shape[0])
    rows_BTD = table_VD.at[ids_BT].get(
        mode="fill", fill_value=jnp.nan, wrap_negative_indices=False, out_sharding=gather_sharding(ids_BT)
    )
    return rows_BTD.astype(dtype)


def widen_ids(ids: ArrayLike) -> jax.Array:
    """The ids as integers of at least 32 bits.

    The size of a vocabulary may not fit into a smaller dtype. Then a comparison of the ids with the size is wrong.
    """
    ids = jnp.asarray(ids)
    return ids.astype(jnp.promote_types(ids.dtype, jnp.int32))


def unembed(table_VD: jax.Array, hidden_BTD: jax.Array, vocab_size: int, *, soft_cap: float | None = None) -> jax.Array:
    """Logits ``hidden @ table.T``, [B, T, V] float32.

    The rows of the table from ``vocab_size`` on are padding, which makes the number of rows divisible by the number of
    devices that split the table. The logits of the padding are the lowest float32 number, so that its probability is 0.

    Args:
        soft_cap: bound c of the logits: each logit becomes ``c * tanh(logit / c)``. None: no bound.
    """
    require_arrays(table_VD=table_VD, hidden_BTD=hidden_BTD)
    use_kernel, table_VD = choices.unembed_kernel(table_VD, hidden_BTD), table_VD.astype(hidden_BTD.dtype)
    if use_kernel:
        logits_BTV = unembed_pallas.logits(table_VD, hidden_BTD)
    elif hidden_BTD.dtype == jnp.float32:
        logits_BTV = _product_with_table(table_VD, hidden_BTD)
    else:
        logits_BTV = unembed_pallas.reference(table_VD, hidden_BTD)
    logits_BTV = activation.soft_cap(logits_BTV, soft_cap)
    if table_VD.shape[0] == vocab_size:
        return logits_BTV
    real = jnp.arange(table_VD.shape[0]) < vocab_size
    return jnp.where(real[None, None, :], logits_BTV, jnp.finfo(jnp.float32).min)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Unembedding:
    """The table, the hidden states and the bias of an output layer. A loss can compute its logits in blocks.

    Attributes:
        table: [V, D].
        hidden: [B, T, D].
        bias: [V], added after ``soft_cap``; None: no bias.
        vocab_size: number of rows of the table without padding.
        soft_cap: bound of the logits, as in :func:`unembed`; None: no bound.
    """

    table: jax.Array
    hidden: jax.Array
    bias: jax.Array | None = None
    vocab_size: int = dataclasses.field(kw_only=True, metadata={"static": True})
    soft_cap: float | None = dataclasses.field(default=None, kw_only=True, metadata={"static": True})

    def logits(self) -> jax.Array:
        """The logits, [B, T, V] float32. V includes the padding rows."""
        logits_BTV = unembed(self.table, self.hidden, self.vocab_size, soft_cap=self.soft_cap)
        if self.bias is not None:
            logits_BTV = logits_BTV + self.bias.astype(jnp.float32)[None, None, :]
        return constrain(logits_BTV, ("batch", None, "vocab"))


def as_logits(output: jax.Array | Unembedding) -> jax.Array:
    """The logits of an :class:`Unembedding`, or ``output`` itself if it is an array."""
    return output.logits() if isinstance(output, Unembedding) else output


def _product_with_table(table_VD: jax.Array, hidden_BTD: jax.Array) -> jax.Array:
    """``hidden @ table.T``, [B, T, V]."""
    rows = hidden_BTD.shape[0] * hidden_BTD.shape[1]
    if choices.is_table_first_operand(rows, table_VD.shape[1]):
        logits_BTV = jnp.einsum("VD,BTD->VBT", table_VD, hidden_BTD).transpose(1, 2, 0)
    else:
        logits_BTV = linear({"weight": table_VD.T}, hidden_BTD)  # on a CPU, its gradient is faster than that of einsum
    return lax.optimization_barrier(logits_BTV) if choices.isolate_logits(rows) else logits_BTV


def argmax(logits: jax.Array) -> jax.Array:
    """The id with the largest logit, [...] int32, from logits [..., V].

    If several ids have the largest logit, the result is the smallest of these ids. If a logit is NaN, the result has no
    meaning and may be V.
    """
    if not choices.argmax_by_maximum():
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    V = logits.shape[-1]
    # Without the barrier, XLA could compute the logits twice with different rounding. Then no logit might be equal to
    # the maximum.
    logits = lax.optimization_barrier(logits)
    ids = lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    return jnp.min(jnp.where(logits == jnp.max(logits, axis=-1, keepdims=True), ids, V), axis=-1)


def round_up(vocab_size: int, multiple: int) -> int:
    """The number of rows of a table: ``vocab_size`` rounded up to a multiple of ``multiple``."""
    return -(-vocab_size // multiple) * multiple
