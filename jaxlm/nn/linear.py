"""Linear layers over one or several axes."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxlm.nn import choices
from jaxlm.spec import ZEROS, ArraySpec, Initializer, Params


def linear_specs(
    shape: Sequence[int], axes: Sequence[str | None], init: Initializer, *, num_input_axes: int = 1, bias: bool = True
) -> dict[str, ArraySpec]:
    """Specs of ``weight`` and, if ``bias`` is True, ``bias``.

    Args:
        shape: shape of the weight, [in..., out...].
        axes: logical names of the axes of the weight.
        num_input_axes: number of input axes, which come first.
        bias: whether there is a bias; its shape is [out...].

    Example:
        >>> specs = linear_specs((8, 3, 2, 4), ("embed", None, "heads", "kv"), ZEROS)
        >>> specs["bias"].shape
        (3, 2, 4)
    """
    weight = ArraySpec(tuple(shape), tuple(axes), init, decay=True)
    if not bias:
        return {"weight": weight}
    return {"weight": weight, "bias": ArraySpec(weight.shape[num_input_axes:], weight.axes[num_input_axes:], ZEROS)}


def linear(params: Params, x: jax.Array, *, num_input_axes: int = 1) -> jax.Array:
    """``x @ weight + bias`` over the last ``num_input_axes`` axes of ``x`` [..., in...], as [..., out...].

    The parameters are cast to the dtype of ``x``, which is also the dtype of the result.
    """
    weight = params["weight"].astype(x.dtype)
    num_inputs, num_outputs = _num_inputs_and_outputs(weight, num_input_axes)
    use_custom_vjp = num_outputs >= num_inputs or _num_blocks(x, weight, num_input_axes) > 0
    y = _product_with_custom_vjp(x, weight, num_input_axes) if use_custom_vjp else _product(x, weight, num_input_axes)
    if "bias" not in params:
        return y
    bias = params["bias"]
    add = _add_with_matmul_vjp if choices.bias_gradient_by_matmul(bias) else _add
    return add(y, bias)


def _add(y: jax.Array, bias: jax.Array) -> jax.Array:
    return y + lax.broadcast_in_dim(bias.astype(y.dtype), y.shape, tuple(range(y.ndim - bias.ndim, y.ndim)))


@jax.custom_vjp
def _add_with_matmul_vjp(y: jax.Array, bias: jax.Array) -> jax.Array:
    """``y + bias``, with the gradient of ``bias`` as a matmul with ones (``choices.bias_gradient_by_matmul``)."""
    return _add(y, bias)


def _add_forward(y: jax.Array, bias: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _add(y, bias), bias


def _add_backward(bias: jax.Array, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    row_axes = tuple(range(dy.ndim - bias.ndim))
    ones = jnp.ones((*(dy.shape[axis] for axis in row_axes), SUBLANES), dy.dtype)
    sums = lax.dot_general(ones, dy, ((row_axes, row_axes), ((), ())), preferred_element_type=jnp.float32)
    return dy, sums[0].astype(bias.dtype)


_add_with_matmul_vjp.defvjp(_add_forward, _add_backward)

SUBLANES = 8
"""Number of rows of ones in ``_add_backward``. With one row of ones, the TPU compiler would turn the matmul
into a sum."""


def _product(x: jax.Array, weight: jax.Array, num_input_axes: int) -> jax.Array:
    # The axes are not merged by a reshape, because it would lose the sharding of `heads`. XLA merges them without cost.
    x_axes = tuple(range(x.ndim - num_input_axes, x.ndim))
    return lax.dot_general(x, weight, ((x_axes, tuple(range(num_input_axes))), ((), ())))


def _num_inputs_and_outputs(weight: jax.Array, num_input_axes: int) -> tuple[int, int]:
    """The numbers of inputs and outputs of a weight."""
    return math.prod(weight.shape[:num_input_axes]), math.prod(weight.shape[num_input_axes:])


def _num_blocks(x: jax.Array, weight: jax.Array, num_input_axes: int) -> int:
    rows = math.prod(x.shape[: x.ndim - num_input_axes])
    return choices.weight_gradient_blocks(rows, *_num_inputs_and_outputs(weight, num_input_axes))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product_with_custom_vjp(x: jax.Array, weight: jax.Array, num_input_axes: int) -> jax.Array:
    """The product, with a weight gradient that is fast on CPU (docs/labbook.md).

    - If the output is at least as wide as the input, the gradient is ``x.T @ dy``. Autodiff computes ``(dy.T @ x).T``,
      for which a CPU transposes the larger factor and the result. For the MLPs of GPT-2 (12 layers of 768 to 3072), the
      gradients of input and weight take 544 ms with autodiff and 324 ms with ``x.T @ dy``.
    - Otherwise, if there are many rows, the gradient is summed over blocks of rows
      (``choices.weight_gradient_blocks``).
    """
    return _product(x, weight, num_input_axes)


def _product_forward(x: jax.Array, weight: jax.Array, num_input_axes: int) -> tuple[jax.Array, Any]:
    return _product(x, weight, num_input_axes), (x, weight)


def _product_backward(num_input_axes: int, saved: Any, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The gradients of ``x`` and ``weight``.

    Shapes: N rows, L rows of a block, C all inputs as one axis, D all outputs as one axis.
    """
    x, weight = saved
    rows = tuple(range(x.ndim - num_input_axes))
    outputs = tuple(range(len(rows), dy.ndim))
    dx = lax.dot_general(dy, weight, ((outputs, tuple(range(num_input_axes, weight.ndim))), ((), ())))
    num_inputs, num_outputs = _num_inputs_and_outputs(weight, num_input_axes)
    if num_outputs >= num_inputs:
        return dx, lax.dot_general(x, dy, ((rows, rows), ((), ())))
    count, size = _num_blocks(x, weight, num_input_axes), choices.weight_gradient_block_rows(num_outputs)
    x_NC, dy_ND = (a.reshape(-1, math.prod(a.shape[len(rows) :])) for a in (x, dy))

    def block_gradient(start: Any, size: int) -> jax.Array:
        x_LC, dy_LD = (lax.dynamic_slice_in_dim(a, start, size) for a in (x_NC, dy_ND))
        return lax.dot_general(dy_LD, x_LC, (((0,), (0,)), ((), ())))

    last_rows_DC = block_gradient(count * size, x_NC.shape[0] - count * size)
    total_DC = lax.fori_loop(0, count, lambda i, total: total + block_gradient(i * size, size), last_rows_DC)
    return dx, total_DC.T.reshape(weight.shape)


_product_with_custom_vjp.defvjp(_product_forward, _product_backward)
