"""Attention in the hybrids of Mamba-2 and attention (``jaxlm.models.mamba2``): config fields, specs and computation.

The module also has the multipliers of Falcon-H1, constants by which the model multiplies activations.

Shapes: B batch, T time, D model width, H query heads, G key-value heads, K head width.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.config import check_value
from jaxlm.models import common
from jaxlm.nn.attention import Implementation, attention, cache
from jaxlm.nn.attention.rotary import RotaryScaling, check_dynamic_scaling, rotary_angles, rotary_width, rotate
from jaxlm.nn.linear import linear, linear_specs
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
    names = ("query", "key", "value")
    q, k, v = (constrain(linear(weights[name], x_BTD), ("batch", "seq", "heads", "kv")) for name in names)
    kv, (k, v) = cache.append_and_read(state, (rotate(k, angles), v), context)
    y = attention(rotate(q, angles), k, v, context.mask, implementation=cfg.attention_implementation)
    return linear(weights["output"], y, num_input_axes=2), None if state is None else {**state, **kv}


# -------------------------------------------------------------------------------------------------- multipliers


@dataclasses.dataclass(frozen=True)
class Multipliers:
    """The constants by which a Falcon-H1 model multiplies activations. Zuo et al. 2025 tuned them on small models."""

    embedding: float = 1.0
    """Multiplier of the token vectors."""
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


def fold_multipliers(m: Multipliers, params: Params) -> dict[str, Any]:
    """The parameters with all multipliers except ``embedding`` and ``head`` folded into the weights.

    ``embedding`` and ``head`` are not folded, because a scaled token table would be a second copy of a large array, and
    a tied head would need another scale. Each other multiplier belongs to the input or to the output of a linear layer.
    A multiplier of the input scales the weight of this layer. A multiplier of the output scales the weight and the
    bias.
    """

    def scale(layer: Params, output_factor: Any, input_factor: float = 1.0) -> dict[str, Any]:
        if jnp.ndim(output_factor) == 0 and (output_factor, input_factor) == (1.0, 1.0):
            return dict(layer)
        factors = {"weight": jnp.asarray(output_factor) * input_factor, "bias": jnp.asarray(output_factor)}
        num_axes = jnp.ndim(output_factor)
        # A half-precision weight times its factor is float32, so that only the cast in ``linear`` rounds it.
        return {
            name: x.astype(jnp.promote_types(x.dtype, jnp.float32))
            * jnp.expand_dims(factors[name], range(x.ndim - num_axes))
            for name, x in layer.items()
        }

    def scale_block(block: Params) -> dict[str, Any]:
        block = dict(block)
        if "mixer" in block:
            mixer = block["mixer"]
            BC_factors = jnp.repeat(jnp.array([m.B, m.C]), mixer["BC"]["weight"].shape[-1] // 2)
            block["mixer"] = {
                **mixer,
                "zx": scale(mixer["zx"], jnp.array([[m.z], [m.x]]), m.mixer_input),
                "BC": scale(mixer["BC"], BC_factors, m.mixer_input),
                "dt": scale(mixer["dt"], m.dt, m.mixer_input),
                "output": scale(mixer["output"], m.mixer_output),
            }
        if "attention" in block:
            attention = block["attention"]
            block["attention"] = {
                "query": scale(attention["query"], 1.0, m.attention_input),
                "key": scale(attention["key"], m.key, m.attention_input),
                "value": scale(attention["value"], 1.0, m.attention_input),
                "output": scale(attention["output"], m.attention_output),
            }
        if "mlp" in block:
            mlp = block["mlp"]
            block["mlp"] = {**mlp, "gate": scale(mlp["gate"], m.mlp_gate), "down": scale(mlp["down"], m.mlp_output)}
        return block

    layers = params["layers"]
    return {
        **params,
        "layers": tuple(map(scale_block, layers)) if isinstance(layers, tuple) else scale_block(layers),
    }
