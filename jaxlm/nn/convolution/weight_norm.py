"""Weight normalisation (Salimans & Kingma 2016) of the weights of a linear layer or a convolution."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp

from jaxlm.spec import ArraySpec, Constant, Normal


def weight_norm_specs(specs: dict[str, ArraySpec], *, num_input_axes: int) -> dict[str, ArraySpec]:
    """Specs with ``direction`` and ``gain`` (one per output) instead of ``weight``.

    The gain is initialized with the expected length of a Gaussian direction, so that the initial weight has the same
    scale as without normalisation.

    Args:
        specs: the specs of ``linear`` or ``convolution``.
        num_input_axes: number of input axes of the weight, which come first.

    Raises:
        ValueError: the weight is not initialized from a Gaussian.
    """
    weight = specs["weight"]
    if not isinstance(weight.init, Normal):
        raise ValueError(f"weight normalisation needs a weight initialized by Normal(...), got {weight.init}")
    length = weight.init.stddev * math.prod(weight.shape[:num_input_axes]) ** 0.5
    # Weight decay acts on the gain. On the direction, it would change only the step size.
    return {
        "direction": ArraySpec(weight.shape, weight.axes, weight.init),
        "gain": ArraySpec(weight.shape[num_input_axes:], weight.axes[num_input_axes:], Constant(length), decay=True),
        **{name: spec for name, spec in specs.items() if name != "weight"},
    }


def weight_norm(params: dict[str, Any], *, num_input_axes: int) -> dict[str, Any]:
    """Parameters for ``linear`` or ``convolution``, with ``weight = gain * direction / |direction|`` for each output.

    See Salimans and Kingma 2016, eq. 2.
    """
    direction = params["direction"].astype(jnp.float32)
    length = jnp.sqrt(jnp.sum(jnp.square(direction), axis=tuple(range(num_input_axes))))
    scale = jnp.broadcast_to(params["gain"] / length, direction.shape)
    rest = {name: leaf for name, leaf in params.items() if name not in ("direction", "gain")}
    return {"weight": direction * scale, **rest}
