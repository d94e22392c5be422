"""Linear layers, with one or several input axes and output axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxlm.devices import SUBLANES
from jaxlm.nn import choices
from jaxlm.nn.custom_gradient import custom_vjp, sum_dtype, vary_equally
from jaxlm.nn.time_chunks import loop_over_chunks
from jaxlm.spec import ZEROS, ArraySpec, Initializer, Params, require_arrays


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
    """``x @ weight + bias``, [..., out...].

    The product contracts the last ``num_input_axes`` axes of ``x`` [..., in...]. The parameters are cast to the dtype
    of ``x``, which is also the dtype of the result.
    """
    require_arrays(x=x)
    weight = params["weight"].astype(x.dtype)
    output_shape = weight.shape[num_input_axes:]
    if choices.merge_head_axes():
        if num_input_axes > 1 and _can_merge(x, x.ndim - 2) and _can_merge(weight, num_input_axes - 2):
            x, weight = _merge(x, x.ndim - 2), _merge(weight, num_input_axes - 2)
            num_input_axes -= 1
        if len(output_shape) > 1 and _can_merge(weight, weight.ndim - 2):
            weight = _merge(weight, weight.ndim - 2)
        # Without the barrier, XLA would separate the axes again. The barrier also makes XLA convert each weight to the
        # compute dtype once, before the matmuls. A step of GPT-2 takes 184 M cycles with a barrier for each weight, and
        # 197 M with barriers only for merged weights (16 x 1,024 tokens on a v5e, TPU compiler's estimate).
        weight = lax.optimization_barrier(weight)
    y = _product(x, weight, num_input_axes)
    y = y.reshape(*y.shape[: x.ndim - num_input_axes], *output_shape)
    return add_bias(y, params["bias"]) if "bias" in params else y


def add_bias(y: jax.Array, bias: jax.Array) -> jax.Array:
    """``y + bias``, [..., out...], in the dtype of ``y``.

    The bias [out...] may have several axes, such as the axes of attention heads and of their width.
    """
    add = _add_with_matmul_vjp if choices.bias_gradient_by_matmul(bias) else _add
    if bias.ndim > 1 and choices.merge_head_axes() and _can_merge(y, y.ndim - 2) and _can_merge(bias, bias.ndim - 2):
        return add(_merge(y, y.ndim - 2), _merge(bias, bias.ndim - 2)).reshape(y.shape)
    return add(y, bias)


def _can_merge(x: jax.Array, axis: int) -> bool:
    """Whether JAX can merge ``axis`` and the axis after it.

    It cannot if the second of the two axes is split over Explicit axes of a mesh.
    """
    return jax.typeof(x).sharding.spec[axis + 1] is None


def _merge(x: jax.Array, axis: int) -> jax.Array:
    """``x`` with ``axis`` and the axis after it merged into one axis."""
    # -1 instead of the product would be an error for an empty batch.
    return x.reshape(*x.shape[:axis], x.shape[axis] * x.shape[axis + 1], *x.shape[axis + 2 :])


def dot(x: jax.Array, y: jax.Array, contract: tuple[int, int], *, precision: lax.Precision | None = None) -> jax.Array:
    """The product of two matrices, float32. It sums over axis ``contract[0]`` of x and axis ``contract[1]`` of y."""
    axes = ((contract[0],), (contract[1],)), ((), ())
    return lax.dot_general(x, y, axes, precision=precision, preferred_element_type=jnp.float32)


def _add(y: jax.Array, bias: jax.Array) -> jax.Array:
    return y + lax.broadcast_in_dim(bias.astype(y.dtype), y.shape, tuple(range(y.ndim - bias.ndim, y.ndim)))


def _add_backward(bias: jax.Array, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The gradients of ``y`` and ``bias``. The gradient of ``bias`` is computed by a matmul with ones."""
    row_axes = tuple(range(dy.ndim - bias.ndim))
    # The result has SUBLANES equal rows. With one row, the TPU compiler would turn the matmul into a sum.
    ones = jnp.ones((*(dy.shape[axis] for axis in row_axes), SUBLANES), dy.dtype)
    sums = lax.dot_general(ones, dy, ((row_axes, row_axes), ((), ())), preferred_element_type=jnp.float32)
    return dy, sums[0].astype(bias.dtype)


_add_with_matmul_vjp = custom_vjp.from_rules(lambda y, bias: (_add(y, bias), bias), _add_backward)


def _product_forward(x: jax.Array, weight: jax.Array, num_input_axes: int) -> tuple[jax.Array, Any]:
    # The axes are contracted without a reshape. A reshape that merges ``heads`` with an axis before it would lose the
    # sharding of ``heads``.
    x_axes = tuple(range(x.ndim - num_input_axes, x.ndim))
    return lax.dot_general(x, weight, ((x_axes, tuple(range(num_input_axes))), ((), ()))), (x, weight)


def _product_backward(num_input_axes: int, saved: Any, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The gradients of ``x`` and ``weight``.

    The weight gradient is ``x.T @ dy``. If there are fewer outputs than inputs, it is computed as ``(dy.T @ x).T``,
    because a result with few columns is slow on a CPU. XLA would undo this choice, because it merges the transpose into
    the matmul. So on a CPU, the matmul is computed separately from the operations that follow
    (``choices.isolate_weight_gradient``). XLA also merges the transpose of ``dy`` into the operations that compute
    ``dy``, which is slow for many rows. A loop over blocks of rows prevents this
    (``choices.weight_gradient_block_rows``).
    """
    x, weight = saved
    row_axes = tuple(range(x.ndim - num_input_axes))
    output_axes = tuple(range(len(row_axes), dy.ndim))
    dx = lax.dot_general(dy, weight, ((output_axes, tuple(range(num_input_axes, weight.ndim))), ((), ())))
    inputs, outputs = math.prod(weight.shape[:num_input_axes]), math.prod(weight.shape[num_input_axes:])
    outputs_first = outputs < inputs
    left, right = (dy, x) if outputs_first else (x, dy)
    rows = math.prod(dy.shape[: len(row_axes)])
    block_rows = choices.weight_gradient_block_rows(rows, outputs) if outputs_first else rows
    if block_rows < rows:
        dweight = _product_of_rows(left, right, len(row_axes), block_rows)
    else:
        dweight = lax.dot_general(left, right, ((row_axes, row_axes), ((), ())))
    if choices.isolate_weight_gradient():
        dweight = lax.optimization_barrier(dweight)
    if outputs_first:
        dweight = jnp.moveaxis(dweight, range(len(output_axes)), range(num_input_axes, weight.ndim))
    return dx, dweight


def _product_of_rows(left: jax.Array, right: jax.Array, num_row_axes: int, block_rows: int) -> jax.Array:
    """``left.T @ right``, summed over blocks of ``block_rows`` rows, [left..., right...], in the dtype of ``right``.

    The first ``num_row_axes`` axes of both arrays are rows.
    """
    rows = math.prod(left.shape[:num_row_axes])
    left_NX, right_NY = (x.reshape(rows, math.prod(x.shape[num_row_axes:])) for x in (left, right))
    dtype = sum_dtype(right)

    def add_block(start: Any, rows: int, total_XY: jax.Array) -> jax.Array:
        left_RX, right_RY = (lax.dynamic_slice_in_dim(x, start, rows) for x in (left_NX, right_NY))
        return total_XY + jnp.matmul(left_RX.T, right_RY, preferred_element_type=dtype)

    total_XY, _ = vary_equally((jnp.zeros((left_NX.shape[1], right_NY.shape[1]), dtype), (left_NX, right_NY)))
    total_XY = loop_over_chunks(rows, block_rows, add_block, total_XY)
    return total_XY.astype(right.dtype).reshape(*left.shape[num_row_axes:], *right.shape[num_row_axes:])


_product = custom_vjp.from_rules(_product_forward, _product_backward, nondiff_argnums=(2,))
