"""Linear maps over one or several axes."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax import lax

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
    widens = math.prod(weight.shape[inputs:]) >= math.prod(weight.shape[:inputs])
    y = _product_that_widens(x, weight, inputs) if widens else _product(x, weight, inputs)
    if "bias" not in params:
        return y
    bias = params["bias"].astype(x.dtype)
    return y + lax.broadcast_in_dim(bias, y.shape, tuple(range(y.ndim - bias.ndim, y.ndim)))


def _product(x: jax.Array, weight: jax.Array, inputs: int) -> jax.Array:
    # The axes stay apart (no reshape to 2-D), so that a split of `heads` survives; XLA merges them for free.
    x_axes = tuple(range(x.ndim - inputs, x.ndim))
    return lax.dot_general(x, weight, ((x_axes, tuple(range(inputs))), ((), ())))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product_that_widens(x: jax.Array, weight: jax.Array, inputs: int) -> jax.Array:
    """The product, with the weight gradient as ``x.T @ dy``.

    Autodiff computes ``(dy.T @ x).T``: where the output is the wider side, a CPU then transposes the larger of the two
    matrices, and the result as well (GPT-2's MLP, 12 layers of 768 to 3072: 324 ms instead of 544, docs/labbook.md).
    """
    return _product(x, weight, inputs)


def _forward(x: jax.Array, weight: jax.Array, inputs: int) -> tuple[jax.Array, Any]:
    return _product(x, weight, inputs), (x, weight)


def _backward(inputs: int, saved: Any, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, weight = saved
    rows = tuple(range(x.ndim - inputs))
    outputs = tuple(range(len(rows), dy.ndim))
    dx = lax.dot_general(dy, weight, ((outputs, tuple(range(inputs, weight.ndim))), ((), ())))
    dweight = lax.dot_general(x, dy, ((rows, rows), ((), ())))
    return dx, dweight


_product_that_widens.defvjp(_forward, _backward)
