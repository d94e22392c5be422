"""Linear maps over one or several axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax import lax

from jaxlm.spec import ZEROS, ArraySpec, Initializer


def linear_specs(
    shape: Sequence[int], axes: Sequence[str | None], init: Initializer, *, inputs: int = 1
) -> dict[str, ArraySpec]:
    """``weight`` of ``shape`` and ``bias`` of its output part. The first ``inputs`` axes are the input.

    Example:
        >>> specs = linear_specs((8, 3, 2, 4), ("embed", None, "heads", "kv"), ZEROS)
        >>> specs["bias"].shape
        (3, 2, 4)
    """
    weight = ArraySpec(tuple(shape), tuple(axes), init, decay=True)
    return {"weight": weight, "bias": ArraySpec(weight.shape[inputs:], weight.axes[inputs:], ZEROS)}


def linear(params: dict[str, Any], x: jax.Array, *, inputs: int = 1) -> jax.Array:
    """``x @ weight + bias`` over the last ``inputs`` axes of ``x`` [..., in...]; gives [..., out...] in ``x``'s dtype.

    The parameters are cast to the dtype of ``x``: the compute dtype is chosen by the caller, once.
    """
    weight = params["weight"].astype(x.dtype)
    # The axes stay apart (no reshape to 2-D), so that a split of `heads` survives; XLA merges them for free.
    x_axes = tuple(range(x.ndim - inputs, x.ndim))
    y = lax.dot_general(x, weight, ((x_axes, tuple(range(inputs))), ((), ())))
    bias = params["bias"].astype(x.dtype)
    return y + lax.broadcast_in_dim(bias, y.shape, tuple(range(y.ndim - bias.ndim, y.ndim)))
