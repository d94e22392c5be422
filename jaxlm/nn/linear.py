"""Linear maps over one or several axes."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxlm.sharding import active, platform
from jaxlm.spec import ZEROS, ArraySpec, Initializer


def linear_specs(
    shape: Sequence[int], axes: Sequence[str | None], init: Initializer, *, inputs: int = 1, bias: bool = True
) -> dict[str, ArraySpec]:
    """``weight`` of ``shape`` and, with ``bias``, one of its output part. The first ``inputs`` axes are the input.

    Example:
        >>> specs = linear_specs((8, 3, 2, 4), ("embed", None, "heads", "kv"), ZEROS)
        >>> specs["bias"].shape
        (3, 2, 4)
    """
    weight = ArraySpec(tuple(shape), tuple(axes), init, decay=True)
    if not bias:
        return {"weight": weight}
    return {"weight": weight, "bias": ArraySpec(weight.shape[inputs:], weight.axes[inputs:], ZEROS)}


def linear(params: dict[str, Any], x: jax.Array, *, inputs: int = 1) -> jax.Array:
    """``x @ weight + bias`` over the last ``inputs`` axes of ``x`` [..., in...]: [..., out...] in ``x``'s dtype.

    The parameters are cast to the dtype of ``x``: the compute dtype is chosen by the caller, once.
    """
    weight = params["weight"].astype(x.dtype)
    own = _widens(weight, inputs) or _blocks(x, weight, inputs) > 0
    y = _product_with_own_gradient(x, weight, inputs) if own else _product(x, weight, inputs)
    if "bias" not in params:
        return y
    bias = params["bias"]
    # Of heads on a TPU: their gradients come out of an attention kernel, so that no product makes the sum as it goes.
    add = _add_with_product if bias.ndim > 1 and platform() == "tpu" else _add
    return add(y, bias)


def _add(y: jax.Array, bias: jax.Array) -> jax.Array:
    return y + lax.broadcast_in_dim(bias.astype(y.dtype), y.shape, tuple(range(y.ndim - bias.ndim, y.ndim)))


@jax.custom_vjp
def _add_with_product(y: jax.Array, bias: jax.Array) -> jax.Array:
    """The sum, with the gradient of ``bias`` as a product with rows of ones: the matrix unit adds up what the vector
    unit would need a slow pass for (GPT-2 by the TPU compiler's estimate: 0.09 and not 0.35 M cycles; docs/labbook.md).
    """
    return _add(y, bias)


def _add_forward(y: jax.Array, bias: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _add(y, bias), bias


def _add_backward(bias: jax.Array, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    rows = tuple(range(dy.ndim - bias.ndim))
    ones = jnp.ones((*(dy.shape[axis] for axis in rows), SUBLANES), dy.dtype)
    sums = lax.dot_general(ones, dy, ((rows, rows), ((), ())), preferred_element_type=jnp.float32)
    return dy, sums[0].astype(bias.dtype)


_add_with_product.defvjp(_add_forward, _add_backward)

SUBLANES = 8
"""Rows of the smallest product that keeps a TPU's matrix unit: the compiler makes a sum of a single row again."""


def _product(x: jax.Array, weight: jax.Array, inputs: int) -> jax.Array:
    # The axes stay apart (no reshape to 2-D), so that a split of `heads` survives; XLA merges them for free.
    x_axes = tuple(range(x.ndim - inputs, x.ndim))
    return lax.dot_general(x, weight, ((x_axes, tuple(range(inputs))), ((), ())))


BLOCKS = 4
"""Blocks of rows from which on the gradient of a weight is added up over them."""


def _widens(weight: jax.Array, inputs: int) -> bool:
    return math.prod(weight.shape[inputs:]) >= math.prod(weight.shape[:inputs])


def _block(weight: jax.Array, inputs: int) -> int:
    """Rows of a block: 2 MiB of ``dy``, but no thinner than a matmul should be."""
    return max(1024, 2**19 // math.prod(weight.shape[inputs:]))


def _blocks(x: jax.Array, weight: jax.Array, inputs: int) -> int:
    """Whole blocks of rows that the gradient of the weight is added up over; 0: it is one product."""
    if _widens(weight, inputs) or platform() != "cpu" or active() is not None:
        return 0
    count = math.prod(x.shape[: x.ndim - inputs]) // _block(weight, inputs)
    return count if count >= BLOCKS else 0


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product_with_own_gradient(x: jax.Array, weight: jax.Array, inputs: int) -> jax.Array:
    """The product, with the weight gradient as a CPU is fast at it (docs/labbook.md).

    - As ``x.T @ dy`` where the output is the wider side: autodiff computes ``(dy.T @ x).T``, for which a CPU transposes
      the larger of the two, and the result as well (GPT-2's MLP, 12 layers of 768 to 3072: 324 ms instead of 544).
    - Else over blocks of rows, where they are many: the compiler turns ``dy`` round in one pass with what it is
      computed from, in an order that uses no line of a cache twice. A loop reads it as it has been written, and turns a
      block that fits the cache (VDCNN: a fifth of a step; BERT at 8192 rows: a twentieth).
    """
    return _product(x, weight, inputs)


def _forward(x: jax.Array, weight: jax.Array, inputs: int) -> tuple[jax.Array, Any]:
    return _product(x, weight, inputs), (x, weight)


def _backward(inputs: int, saved: Any, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    """N rows, of which a block has L; C inputs and D outputs, each as one axis."""
    x, weight = saved
    rows = tuple(range(x.ndim - inputs))
    outputs = tuple(range(len(rows), dy.ndim))
    dx = lax.dot_general(dy, weight, ((outputs, tuple(range(inputs, weight.ndim))), ((), ())))
    if _widens(weight, inputs):
        return dx, lax.dot_general(x, dy, ((rows, rows), ((), ())))
    count, size = _blocks(x, weight, inputs), _block(weight, inputs)
    x_NC, dy_ND = (a.reshape(-1, math.prod(a.shape[len(rows) :])) for a in (x, dy))

    def part(start: Any, size: int) -> jax.Array:
        x_LC, dy_LD = (lax.dynamic_slice_in_dim(a, start, size) for a in (x_NC, dy_ND))
        return lax.dot_general(dy_LD, x_LC, (((0,), (0,)), ((), ())))

    rest = part(count * size, x_NC.shape[0] - count * size)
    total_DC = lax.fori_loop(0, count, lambda i, total: total + part(i * size, size), rest)
    return dx, total_DC.T.reshape(weight.shape)


_product_with_own_gradient.defvjp(_forward, _backward)
