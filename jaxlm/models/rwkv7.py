"""RWKV-7 "Goose" (Peng et al. 2025): a causal recurrent model without attention and without position embeddings.

Each block has a time mix and a channel mix. A time mix is a generalized delta rule, whose state is a matrix for each
head. A channel mix is an MLP with squared ReLU. Both first interpolate the input at each token with the input at the
token before it (token shift). From the second block on, the values of the time mix are interpolated with the values of
the first block (value residual). The size of the state does not depend on the length of the text.

Names in this module, with the symbols of the paper and of published files: receptance (r, the query), decay (w), rate
(a, the in-context learning rate), removal (xi, ``k_k``), replacement (alpha, ``k_a``), bonus (rho, ``r_k``).

Shapes: B batch, T time, D model width, H heads, K width of a head, F hidden width of the channel mix.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxlm.models import common, heads
from jaxlm.nn.convolution.window import previous_inputs, tail_specs
from jaxlm.nn.embedding import embed
from jaxlm.nn.head_norm import head_l2_normalize, head_layer_norm, head_sums
from jaxlm.nn.linear import linear, linear_specs
from jaxlm.nn.norm import layer_norm, layer_norm_specs
from jaxlm.nn.scan import generalized_delta_rule
from jaxlm.nn.token_layout import TokenLayout, move_padding_last, past_segment_specs, restore_order
from jaxlm.sharding import constrain
from jaxlm.spec import ZEROS, ArraySpec, Constant, Normal, Params, State, Uniform

L2_EPSILON = 1e-24
"""Added to the sum of squares in the L2 norm of removal keys. The authors' code limits the norm to at least 1e-12."""


@dataclasses.dataclass(frozen=True)
class Config(common.LayeredConfig):
    """Shape and behavior of an RWKV-7. The defaults are the published model with 191M parameters ("0.1B")."""

    vocab_size: int = 65536
    """Number of token ids."""
    num_layers: int = 12
    """Number of blocks."""
    embed_dim: int = 768
    """Model width."""
    mlp_dim: int = 3072
    """Hidden width of the channel mix."""
    head_dim: int = 64
    """Width of a head of the time mix. There are embed_dim / head_dim heads."""
    decay_rank: int = 64
    """Rank of the two matrices that compute the decays."""
    rate_rank: int = 64
    """Rank of the two matrices that compute the in-context learning rates."""
    value_rank: int = 32
    """Rank of the two matrices that compute the weights of the value residual."""
    gate_rank: int = 128
    """Rank of the two matrices that compute the output gates of the time mix."""
    norm_epsilon: float = 1e-5
    """Added to the variance in layer norms."""
    group_norm_epsilon: float = 64e-5
    """Added to the variance in the norm of each head's output."""
    task: heads.DecoderTask = "causal"
    """Output head: next token (causal), label of the text (classification), label of each token (token_classification),
    answer span (span_qa), or none."""
    num_labels: int = 2
    """Number of labels if the task is classification or token_classification."""

    def __post_init__(self) -> None:
        super().__post_init__()
        common.check_divides(self, "head_dim", "embed_dim")


def apply(
    cfg: Config,
    params: Params,
    tokens: jax.Array,
    *,
    state: State | None = None,
    segment_ids: jax.Array | None = None,
    key: jax.Array | None = None,
) -> tuple[jax.Array, State | None]:
    """The hidden states after the final norm, [B, T, D], and the new state (None without a state).

    Args:
        tokens: [B, T] integer ids. An id outside the vocabulary gives NaN, also for other tokens of the row.
        state: the state that the previous call returned, or the initial state (``state_specs``).
        segment_ids: [B, T] int32, 0 for padding and n for document n. Documents do not interact. Default: one document.
        key: not used, because the model has no dropout.
    """
    common.check_tokens(tokens, segment_ids)
    tokens, layout = move_padding_last(tokens, segment_ids, None if state is None else state["segment_ids"])
    masks = layout.recurrence_masks()
    x = embed(params["token_embedding"], tokens, jnp.dtype(cfg.dtype), size=cfg.vocab_size)
    x = constrain(layer_norm(params["embedding_norm"], x, cfg.norm_epsilon), ("batch", "seq", "activation_embed"))

    def block(carry: Any, layer: Any) -> tuple[Any, Any]:
        x, first_value = carry  # first_value: the values of the first block; None in the first block
        weights, layer_state, _ = layer
        normed = layer_norm(weights["time_mix_norm"], x, cfg.norm_epsilon)
        mixed, first_value, new_state = _time_mix(
            cfg, weights["time_mix"], normed, first_value, layer_state, layout, masks
        )
        x = constrain(x + mixed, ("batch", "seq", "activation_embed"))
        normed = layer_norm(weights["channel_mix_norm"], x, cfg.norm_epsilon)
        tail = None if layer_state is None else layer_state["channel_mix_tail"]
        mixed, tail = _channel_mix(weights["channel_mix"], normed, tail, layout)
        x = constrain(x + mixed, ("batch", "seq", "activation_embed"))
        return (x, first_value), None if layer_state is None else {**new_state, "channel_mix_tail": tail}

    layers = None if state is None else state["layers"]
    (x, _), layers = common.run_layers(
        block, (x, None), params["layers"], layers, key, remat=cfg.remat, num_layers=cfg.num_layers
    )
    hidden, past_segment_ids = restore_order(layout, layer_norm(params["final_norm"], x, cfg.norm_epsilon))
    return hidden, None if state is None else {"layers": layers, "segment_ids": past_segment_ids}


def _time_mix(
    cfg: Config, weights: Params, x: jax.Array, first_value: Any, state: State | None, layout: TokenLayout, masks: Any
) -> tuple[jax.Array, jax.Array, Any]:
    """The output of a time mix, the values of the first block, [B, T, D] each, and the new state."""
    (B, T, D), K = x.shape, cfg.head_dim
    tail, memory = (None, None) if state is None else (state["time_mix_tail"], state["memory"])
    shifted, tail = _token_shift(weights["shift"], x, tail, layout)
    # A TPU pads a last axis of K entries to 128. So the elementwise operations below use the shape [B, T, D].
    r, k, v = (_flat(linear(weights[name], shifted[name])) for name in ("receptance", "key", "value"))
    if first_value is None:
        first_value = v
    else:
        residual = jax.nn.sigmoid(_low_rank(weights["value_residual"], shifted["value"]))
        v = v + (first_value - v) * residual
    decay = _low_rank(weights["decay"], shifted["decay"], jnp.tanh)
    log_decay = -math.exp(-0.5) * jax.nn.sigmoid(decay.astype(jnp.float32))
    rate = jax.nn.sigmoid(_low_rank(weights["rate"], shifted["rate"]))
    gate = _low_rank(weights["gate"], shifted["gate"], jax.nn.sigmoid)

    removal, replacement, bonus = (
        weights[name].astype(x.dtype).reshape(1, 1, D) for name in ("removal", "replacement", "bonus")
    )
    removal_key = head_l2_normalize(k * removal, K, L2_EPSILON)
    k = k * (1.0 + (rate - 1.0) * replacement)
    q, key, value, log_decay, a, b = (
        constrain(y.reshape(B, T, D // K, K), ("batch", "seq", "heads", "kv"))
        for y in (r, k, v, log_decay, -removal_key, rate * removal_key)
    )
    out, memory = generalized_delta_rule(
        q, key, value, log_decay, (a, b), memory, min_log_decay=-math.exp(-0.5), **masks
    )
    out = head_layer_norm(weights["norm"], _flat(out), cfg.group_norm_epsilon)
    out = out + head_sums(r * k * bonus, K).astype(x.dtype) * v
    new_state = None if state is None else {"time_mix_tail": tail, "memory": memory}
    out = (out * gate).reshape(B, T, D // K, K)
    return linear(weights["output"], out, num_input_axes=2), first_value, new_state


def _channel_mix(weights: Params, x: jax.Array, tail: Any, layout: TokenLayout) -> tuple[jax.Array, Any]:
    """The output of a channel mix [B, T, D], and the tail of its token shift."""
    shifted, tail = _token_shift(weights["shift"], x, tail, layout)
    hidden = constrain(linear(weights["key"], shifted["key"]), ("batch", "seq", "mlp"))
    return linear(weights["value"], jnp.square(jax.nn.relu(hidden))), tail


def _token_shift(
    weights: dict[str, jax.Array], x: jax.Array, tail: Any, layout: TokenLayout
) -> tuple[dict[str, jax.Array], Any]:
    """A dict with ``(1 - mu) * x_t + mu * x_{t-1}`` [B, T, D] for each weight mu [D], and the new tail (the last x)."""
    previous, tail = previous_inputs(layout, x, tail)
    difference = previous - x
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    shifted = {name: x + difference * mu.astype(dtype)[None, None] for name, mu in weights.items()}
    return {name: y.astype(x.dtype) for name, y in shifted.items()}, tail


def _low_rank(weights: Params, x: jax.Array, activation: Callable[[jax.Array], jax.Array] = lambda x: x) -> jax.Array:
    """``bias + activation(x @ down) @ up``, [B, T, D]; ``bias`` is optional."""
    return _flat(linear(weights["up"], activation(linear(weights["down"], x))))


def _flat(x_BTHK: jax.Array) -> jax.Array:
    """``x`` with merged axes of heads and widths, [B, T, D]."""
    B, T, H, K = x_BTHK.shape
    return constrain(x_BTHK.reshape(B, T, H * K), ("batch", "seq", "heads"))


logits = heads.decoder_logits
pool = heads.pool_last_token


@dataclasses.dataclass(frozen=True)
class Ramp:
    """Initial values ``offset + slope * (i / (D - 1)) ** power + zigzag * z`` for channel i of D (all axes, flattened).

    z is ``y * abs(y)``, where y increases linearly from -1 to 1 along the last axis.
    """

    offset: float
    slope: float
    power: float = 1.0
    zigzag: float = 0.0

    def __call__(self, key: jax.Array | None, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
        ramp = jnp.linspace(0.0, 1.0, math.prod(shape), dtype=dtype).reshape(shape) ** self.power
        y = jnp.broadcast_to(jnp.linspace(-1.0, 1.0, shape[-1], dtype=dtype), shape)
        return self.offset + self.slope * ramp + self.zigzag * y * jnp.abs(y)


def specs(cfg: Config) -> dict[str, Any]:
    """The specs of all parameters.

    Initial values are as in the authors' code, with one exception: jaxlm draws Gaussian matrices with the same variance
    instead of orthogonal matrices. As in the authors' code, weight decay applies to linear layers, the head and the
    token table, but not to low-rank matrices.
    """
    D = cfg.embed_dim
    return {
        "token_embedding": heads.table_specs(cfg, D, Uniform(1e-4)),
        "embedding_norm": layer_norm_specs(D),
        "layers": tuple(_layer_specs(cfg, layer) for layer in range(cfg.num_layers)),
        "final_norm": layer_norm_specs(D),
        **heads.decoder_head_specs(cfg, D, Normal(0.5 * D**-0.5)),
    }


def _layer_specs(cfg: Config, layer: int) -> dict[str, Any]:
    D, F, K, stddev = cfg.embed_dim, cfg.mlp_dim, cfg.head_dim, cfg.embed_dim**-0.5
    shape, axes = (D // K, K), ("heads", "kv")
    ratio_0_to_1 = layer / max(cfg.num_layers - 1, 1)
    ratio_1_to_0 = 1.0 - layer / cfg.num_layers  # 1 / num_layers in the last layer, as in the authors' code

    def shift(power: float) -> ArraySpec:  # 1 - (i / D) ** power for channel i
        return ArraySpec((D,), ("norm",), Ramp(1.0, -((1.0 - 1.0 / D) ** power), power))

    def projection(stddev: float) -> dict[str, ArraySpec]:
        return linear_specs((D, *shape), ("embed", *axes), Normal(stddev), bias=False)

    def low_rank(rank: int, bias: Ramp | None) -> dict[str, Any]:
        up = {"weight": ArraySpec((rank, *shape), (None, *axes), Normal(0.1 * stddev))}
        up |= {} if bias is None else {"bias": ArraySpec(shape, axes, bias)}
        return {"down": {"weight": ArraySpec((D, rank), ("embed", None))}, "up": up}

    powers = {"receptance": 0.2, "decay": 0.9, "key": 0.7, "value": 0.7, "rate": 0.9, "gate": 0.2}
    time_mix = {
        "shift": {name: shift(power * ratio_1_to_0) for name, power in powers.items()},
        "receptance": projection(stddev),
        "key": projection(0.1 * stddev),
        "value": projection(stddev),
        "decay": low_rank(cfg.decay_rank, Ramp(-5.5, 6.0, 1.0 + ratio_0_to_1**0.3, 2.5)),
        "rate": low_rank(cfg.rate_rank, Ramp(-0.39, 0.4, zigzag=0.3)),
        "gate": low_rank(cfg.gate_rank, None),
        "removal": ArraySpec(shape, axes, Ramp(0.76, -0.1)),
        "replacement": ArraySpec(shape, axes, Constant(1.02)),
        "bonus": ArraySpec(shape, axes, Constant(-0.04)),
        "norm": {
            "scale": ArraySpec(shape, axes, Constant(((layer + 1) / cfg.num_layers) ** 0.7)),
            "bias": ArraySpec(shape, axes),
        },
        "output": linear_specs((*shape, D), (*axes, "embed"), ZEROS, num_input_axes=2, bias=False),
    }
    if layer > 0:
        time_mix["value_residual"] = low_rank(cfg.value_rank, Ramp(0.93, -0.4))
    channel_mix = {
        "shift": {"key": shift(ratio_1_to_0**4)},
        "key": linear_specs((D, F), ("embed", "mlp"), Normal(max(D, F) ** -0.5), bias=False),
        "value": linear_specs((F, D), ("mlp", "embed"), ZEROS, bias=False),
    }
    norms = {"time_mix_norm": layer_norm_specs(D), "channel_mix_norm": layer_norm_specs(D)}
    return {**norms, "time_mix": time_mix, "channel_mix": channel_mix}


def state_specs(cfg: Config, batch: int, length: int) -> dict[str, Any]:
    """The specs of the state. The state has the same size for every ``length``.

    ``memory`` [B, H, K, K] is the state of the delta rule. The tails are the last inputs of the two token shifts.
    ``segment_ids`` [B, 1] is the segment id of the last real token.
    """
    tail = tail_specs(batch, 1, cfg.embed_dim, jnp.dtype(cfg.dtype))
    shape = (batch, cfg.embed_dim // cfg.head_dim, cfg.head_dim, cfg.head_dim)
    memory = ArraySpec(shape, ("batch", "heads", None, None))
    layer = {"time_mix_tail": tail, "memory": memory, "channel_mix_tail": tail}
    return {"layers": (layer,) * cfg.num_layers, "segment_ids": past_segment_specs(batch, 1)}


carried_state_length = common.fixed_size_state_length


VARIANTS = {
    "rwkv7-0.1b": Config(),
    "rwkv7-0.4b": Config(num_layers=24, embed_dim=1024, mlp_dim=4096),
    "rwkv7-1.5b": Config(
        num_layers=24, embed_dim=2048, mlp_dim=8192, decay_rank=96, rate_rank=96, value_rank=64, gate_rank=256
    ),
    "rwkv7-2.9b": Config(
        num_layers=32, embed_dim=2560, mlp_dim=10240, decay_rank=96, rate_rank=96, value_rank=64, gate_rank=320
    ),
    "rwkv7-tiny": Config(
        vocab_size=128, num_layers=2, embed_dim=32, mlp_dim=64, head_dim=8, decay_rank=6, rate_rank=5, value_rank=4,
        gate_rank=10, group_norm_epsilon=1e-3,
    ),
}  # fmt: skip
