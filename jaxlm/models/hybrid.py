"""Attention in the hybrids of Mamba-2 and attention (``jaxlm.models.mamba2``): config fields, specs and computation.

The module also has the multipliers of Falcon-H1, constants by which the model multiplies activations.

Shapes: B batch, T time, D model width, H query heads, G key-value heads, K head width.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.config import check_value
from jaxlm.models import common
from jaxlm.nn.attention import Implementation, attention, cache
from jaxlm.nn.attention.rotary import RotaryScaling, check_dynamic_scaling, rotary_angles, rotary_width, rotate
from jaxlm.nn.linear import add_bias, linear, linear_specs
from jaxlm.sharding import constrain
from jaxlm.spec import Initializer, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig(common.TransformerConfig):
    """Base class for the ``Config`` of a recurrent family in which some layers may have attention."""

    attention_heads: int = 32
    """Query heads of attention."""
    attention_kv_heads: int = 8
    """Key-value heads of attention, each shared by attention_heads / attention_kv_heads query heads."""
    attention_head_dim: int = 128
    """Width of a head of attention."""
    attention_bias: bool = False
    """Whether queries, keys, values and the output of attention have biases."""
    rotary_fraction: float = 0.5
    """Fraction of the entries of a head that rotary positions rotate."""
    rotary_base: float = 10000.0
    """Base of the frequencies of rotary positions."""
    rotary_scaling: RotaryScaling | None = None
    """Scaling of rotary frequencies for sequences longer than those in pretraining; None means no scaling."""
    max_positions: int | None = None
    """Maximum length of a sequence; None: no limit. No parameter depends on this field, but the frequencies of
    dynamic rotary scaling do."""
    attention_implementation: Implementation | None = None
    """Name of the attention implementation; None selects one for the device and the shapes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        common.check_divides(self, "attention_kv_heads", "attention_heads")
        rotary_width(self.attention_head_dim, self.rotary_fraction)  # raises an error if this width is not even
        check_dynamic_scaling(self.rotary_scaling, self.max_positions)


def attention_specs(cfg: Any, input_init: Initializer, output_init: Initializer) -> dict[str, Any]:
    """The specs of the attention of one layer: ``query``, ``key``, ``value`` and ``output``.

    Args:
        input_init: initializer of the weights of ``query``, ``key`` and ``value``.
        output_init: initializer of the weight of ``output``.
    """
    D, H, G, K = cfg.embed_dim, cfg.attention_heads, cfg.attention_kv_heads, cfg.attention_head_dim
    bias = cfg.attention_bias
    return {
        "query": linear_specs((D, H, K), ("embed", "heads", "kv"), input_init, bias=bias),
        "key": linear_specs((D, G, K), ("embed", "heads", "kv"), input_init, bias=bias),
        "value": linear_specs((D, G, K), ("embed", "heads", "kv"), input_init, bias=bias),
        "output": linear_specs((H, K, D), ("heads", "kv", "embed"), output_init, num_input_axes=2, bias=bias),
    }


def cache_specs(cfg: Any, batch: int, length: int) -> dict[str, Any]:
    """The specs of a key-value cache with one layer, for ``batch`` rows of at most ``length`` tokens."""
    dtype = jnp.dtype(cfg.dtype)
    return cache.cache_specs(1, batch, length, cfg.attention_kv_heads, cfg.attention_head_dim, dtype, stacked=False)


def attention_angles(cfg: Any, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of the rotary angles for all layers with attention, each [B, T, number of rotated pairs]."""
    width = rotary_width(cfg.attention_head_dim, cfg.rotary_fraction)
    return rotary_angles(positions_BT, width, cfg.rotary_base, cfg.rotary_scaling, cfg.max_positions)


def attend(
    cfg: Any, weights: Params, x_BTD: jax.Array, state: Any, context: cache.CacheContext, angles: Any
) -> tuple[jax.Array, Any]:
    """The output of the attention of one layer, [B, T, D], and the new state of the layer (None without a state).

    Args:
        state: the state of the layer, with ``key`` and ``value`` of the cache. Its other entries are returned
            unchanged. None: no state.
        context: the mask, the positions and the cache slots of the call.
    """
    m = cfg.multipliers or Multipliers()
    q, k, v = (
        constrain(scaled_linear(weights[name], x_BTD, factor, m.attention_input), ("batch", "seq", "heads", "kv"))
        for name, factor in (("query", 1.0), ("key", m.key), ("value", 1.0))
    )
    kv, (k, v) = cache.append_and_read(state, (rotate(k, angles), v), context)
    y = attention(rotate(q, angles), k, v, context.mask, implementation=cfg.attention_implementation)
    y = scaled_linear(weights["output"], y, m.attention_output, num_input_axes=2)
    return y, None if state is None else {**state, **kv}


# -------------------------------------------------------------------------------------------------- multipliers


@dataclasses.dataclass(frozen=True)
class Multipliers:
    """The constants by which a Falcon-H1 model multiplies activations. Zuo et al. 2025 tuned them on small models."""

    embedding: float = 1.0
    """Multiplier of the token embeddings."""
    head: float = 1.0
    """Multiplier of the logits."""
    mixer_input: float = 1.0
    """Multiplier of the input of a Mamba-2 mixer."""
    z: float = 1.0
    """Multiplier of the gate z of a mixer, before the activation."""
    x: float = 1.0
    """Multiplier of the input x of the state space model, before the convolution."""
    B: float = 1.0
    """Multiplier of B, the input matrix that a mixer computes for each token; applied before the convolution."""
    C: float = 1.0
    """Multiplier of C, the output matrix that a mixer computes for each token; applied before the convolution."""
    dt: float = 1.0
    """Multiplier of the step sizes dt, before dt_bias is added and softplus is applied."""
    mixer_output: float = 1.0
    """Multiplier of the output of a Mamba-2 mixer."""
    attention_input: float = 1.0
    """Multiplier of the input of attention."""
    key: float = 1.0
    """Multiplier of the keys of attention."""
    attention_output: float = 1.0
    """Multiplier of the output of attention."""
    mlp_gate: float = 1.0
    """Multiplier of the gate of an MLP, before the activation."""
    mlp_output: float = 1.0
    """Multiplier of the output of an MLP."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            check_value(float, getattr(self, field.name), f"multipliers.{field.name}")


def scaled(x: jax.Array, factor: Any) -> jax.Array:
    """``factor * x`` in the dtype of ``x``.

    Args:
        factor: a number, or a NumPy array with the last axes of ``x``.
    """
    if np.all(np.equal(factor, 1.0)):
        return x
    dtype = jnp.promote_types(x.dtype, jnp.float32)  # in half precision, the factor itself would be rounded
    new_axes = tuple(range(x.ndim - np.ndim(factor)))
    return (x.astype(dtype) * np.expand_dims(np.asarray(factor, dtype), new_axes)).astype(x.dtype)


def scaled_linear(
    weights: Params, x: jax.Array, output_factor: Any, input_factor: float = 1.0, *, num_input_axes: int = 1
) -> jax.Array:
    """``output_factor * linear(weights, input_factor * x)``.

    Both factors multiply the result of the matmul. If they multiplied the weight, a decoder would read and write all
    weights for each token.

    Args:
        output_factor: a number, or an array with the last axes of the result.
    """
    if x.dtype == jnp.float16:  # without the input factor, the matmul could overflow
        x, input_factor = x * input_factor, 1.0
    y = scaled(linear({"weight": weights["weight"]}, x, num_input_axes=num_input_axes), output_factor * input_factor)
    return add_bias(y, output_factor * weights["bias"]) if "bias" in weights else y
