"""Weight normalization (Salimans and Kingma 2016) of the weights of a linear layer or a convolution."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp

from jaxlm.spec import ArraySpec, Constant, Normal, Params


def weight_norm_specs(specs: dict[str, ArraySpec], *, num_input_axes: int) -> dict[str, ArraySpec]:
    """``specs`` with ``direction`` (in the shape of the weight) and ``gain`` (one per output) instead of ``weight``.

    The initial gain is the standard deviation of the initial weight times the square root of the number of inputs. This
    is about the L2 norm of an initial direction. So the initial weight has about the same scale as without weight
    normalization.

    Args:
        specs: from ``linear_specs`` or ``convolution_specs``.
        num_input_axes: number of input axes of the weight, which come first.

    Raises:
        ValueError: the initializer of the weight is not ``Normal``.
    """
    weight = specs["weight"]
    if not isinstance(weight.init, Normal):
        raise ValueError(f"weight normalization needs a weight initialized by Normal(...), got {weight.init}")
    norm = weight.init.stddev * math.prod(weight.shape[:num_input_axes]) ** 0.5
    # Only the gain gets weight decay. Decay of the direction would not change the weight. It would only change the
    # effective step size.
    return {
        "direction": ArraySpec(weight.shape, weight.axes, weight.init),
        "gain": ArraySpec(weight.shape[num_input_axes:], weight.axes[num_input_axes:], Constant(norm), decay=True),
        **{name: spec for name, spec in specs.items() if name != "weight"},
    }


def weight_norm(params: Params, *, num_input_axes: int) -> dict[str, Any]:
    """The parameters for ``linear`` or ``convolution``, with the normalized weight in float32.

    For each output, ``weight = gain * direction / norm(direction)`` (Salimans and Kingma 2016, eq. 2). Parameters with
    a ``weight`` are returned unchanged, because they are already normalized.
    """
    if "weight" in params:
        return dict(params)
    direction = params["direction"].astype(jnp.float32)
    norm = jnp.sqrt(jnp.sum(jnp.square(direction), axis=tuple(range(num_input_axes))))
    scale = jnp.broadcast_to(params["gain"].astype(jnp.float32) / norm, direction.shape)
    other_params = {name: leaf for name, leaf in params.items() if name not in ("direction", "gain")}
    return {"weight": direction * scale, **other_params}
