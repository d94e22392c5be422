"""Gated DeltaNet (Yang, Kautz and Hatamizadeh 2024), and its hybrid with gated attention: Qwen3-Next (Qwen team 2025).

A causal model with pre-norm blocks. Each block has a mixer and then an MLP. A mixer is a gated delta rule or attention.

- Delta rule: The queries, keys and values pass through a short convolution and SiLU. Then the queries and keys are
  L2-normalized. The output is RMS-normalized and gated. The state has the same size for texts of all lengths.
- Attention: Queries and keys are RMS-normalized. Rotary positions rotate only a part of each head. The output is gated
  (Qiu et al. 2025).

The MLP is a SwiGLU MLP. In Qwen3-Next, it is a mixture of experts (SwiGLU MLPs) with a gated shared expert.

Shapes: B batch, T time, D model width, G key heads, H value heads (delta rule) or query heads (attention), R = H / G,
K width of queries and keys, V width of values, C channels of the convolution.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxlm import spec
from jaxlm.models import common, experts, heads
from jaxlm.nn.attention import Implementation, attention, cache
from jaxlm.nn.attention.rotary import RotaryScaling, check_dynamic_scaling, rotary_angles, rotary_width, rotate
from jaxlm.nn.convolution import causal_depthwise_convolution, depthwise_convolution_specs
from jaxlm.nn.convolution.window import tail_specs
from jaxlm.nn.embedding import embed
from jaxlm.nn.experts import RouterStatistics
from jaxlm.nn.linear import linear, linear_specs
from jaxlm.nn.norm import l2_normalize, rms_norm, rms_norm_specs
from jaxlm.nn.scan import gated_delta_rule
from jaxlm.nn.token_layout import TokenLayout, move_padding_last, past_segment_specs, restore_order
from jaxlm.sharding import constrain
from jaxlm.spec import ArraySpec, InverseSoftplus, LogOfUniform, Normal, Params, State, Uniform

Mixer = Literal["delta_rule", "attention"]
L2_EPSILON = 1e-6
"""Added to the sum of squares in the L2 norm of the queries and keys of the delta rule."""


@dataclasses.dataclass(frozen=True)
class Config(experts.ExpertsConfig):
    """Shape and behavior of a Gated DeltaNet.

    The defaults are those of ``Qwen3NextConfig`` in transformers, but with MLPs instead of experts.
    """

    vocab_size: int = 151936
    """Number of token ids."""
    max_positions: int | None = 32768
    """Maximum length of a sequence; None: no limit. No parameter depends on this field, but the frequencies of
    dynamic rotary scaling do."""
    num_layers: int = 48
    """Number of blocks."""
    pattern: tuple[Mixer, ...] = ("delta_rule", "delta_rule", "delta_rule", "attention")
    """The mixers of the first blocks. The other blocks repeat the pattern. The last repetition may be incomplete."""
    embed_dim: int = 2048
    """Model width."""
    mlp_dim: int = 5632
    """Hidden width of the MLP."""
    shared_expert_dim: int | None = None
    """Hidden width of the shared expert of each layer with experts. Every token uses it. None: no shared expert."""
    delta_key_heads: int = 16
    """Query and key heads of the delta rule, each shared by delta_value_heads / delta_key_heads value heads."""
    delta_value_heads: int = 32
    """Value heads of the delta rule. Each value head has its own state, decay and beta (the weight of a new value)."""
    delta_key_dim: int = 128
    """Width of a query or key of the delta rule."""
    delta_value_dim: int = 128
    """Width of a value of the delta rule."""
    conv_width: int = dataclasses.field(default=4, metadata={"minimum": 2})
    """Number of tokens that the convolution before the delta rule reads, the current token included."""
    negative_eigenvalues: bool = False
    """Whether beta is in [0, 2] instead of [0, 1]. The state transition matrix can then have negative eigenvalues
    (Grazzi et al. 2025)."""
    num_heads: int = 16
    """Query heads of attention."""
    num_kv_heads: int = 2
    """Key-value heads of attention, each shared by num_heads / num_kv_heads query heads."""
    head_dim: int = 256
    """Width of a head of attention."""
    attention_bias: bool = False
    """Whether queries, keys, values and the output of attention have biases."""
    rotary_fraction: float = 0.25
    """Fraction of the head_dim entries of a head that rotary positions rotate."""
    rotary_base: float = 10000.0
    """Base of the frequencies of rotary positions."""
    rotary_scaling: RotaryScaling | None = None
    """Scaling of rotary frequencies for sequences longer than those in pretraining; None means no scaling."""
    norm_epsilon: float = 1e-6
    """Added to the mean square in RMS norms."""
    init_stddev: float = 0.02
    """Standard deviation of initial weights."""
    tie_embeddings: bool = False
    """Use the token table as the output head."""
    task: heads.DecoderTask = "causal"
    """Output head: next token (causal), label of the text (classification), label of each token (token_classification),
    answer span (span_qa), or none."""
    num_labels: int = 2
    """Number of labels if the task is classification or token_classification."""
    attention_implementation: Implementation | None = None
    """Name of the attention implementation; None selects one for the device and the shapes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        common.check_divides(self, "delta_key_heads", "delta_value_heads")
        common.check_divides(self, "num_kv_heads", "num_heads")
        common.check_pattern(self)
        rotary_width(self.head_dim, self.rotary_fraction)  # raises an error if this width is not even
        check_dynamic_scaling(self.rotary_scaling, self.max_positions)


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
        state: the state that the previous call returned, or the initial state (``state_specs``). If the model has
            attention, a row whose tokens do not fit into the cache gives NaN.
        segment_ids: [B, T] int32, 0 for padding and n for document n. Documents do not interact. Default: one document.
        key: not used, because the model has no dropout.
    """
    hidden, state, _ = apply_with_routing(cfg, params, tokens, state=state, segment_ids=segment_ids, key=key)
    return hidden, state


def apply_with_routing(
    cfg: Config,
    params: Params,
    tokens: jax.Array,
    *,
    state: State | None = None,
    segment_ids: jax.Array | None = None,
    key: jax.Array | None = None,
) -> tuple[jax.Array, State | None, RouterStatistics | None]:
    """The results of :func:`apply`, and the router statistics of layers with experts, stacked (None: no experts)."""
    common.check_tokens(tokens, segment_ids, max_positions=cfg.max_positions)
    tokens, layout = move_padding_last(tokens, segment_ids, None if state is None else state["past"])
    masks = layout.recurrence_masks()
    if "attention" in common.layer_kinds(cfg):
        context, state = cache.make_context(tokens, state, layout.segment_ids, None)
        width = rotary_width(cfg.head_dim, cfg.rotary_fraction)
        angles = rotary_angles(context.positions, width, cfg.rotary_base, cfg.rotary_scaling, cfg.max_positions)

    x = embed(params["token_embedding"], tokens, jnp.dtype(cfg.dtype), size=cfg.vocab_size)
    x = constrain(x, ("batch", "seq", "activation_embed"))

    def block(x: jax.Array, layer: Any) -> tuple[jax.Array, Any, RouterStatistics | None]:
        weights, layer_state, _ = layer
        normed = rms_norm(weights["mixer_norm"], x, cfg.norm_epsilon)
        if "attention" in weights:
            mixed, layer_state = _attention(cfg, weights["attention"], normed, layer_state, context, angles)
        else:
            mixed, layer_state = _delta_rule(cfg, weights["delta_rule"], normed, layer_state, layout, masks)
        x = constrain(x + mixed, ("batch", "seq", "activation_embed"))
        normed = rms_norm(weights["mlp_norm"], x, cfg.norm_epsilon)
        y, statistics = experts.mlp(cfg, weights, normed, layout.segment_ids)
        return constrain(x + y, ("batch", "seq", "activation_embed")), layer_state, statistics

    layers = None if state is None else state["layers"]
    x, layers, statistics = common.run_layers_with_outputs(
        block, x, params["layers"], layers, key, remat=cfg.remat, num_layers=cfg.num_layers
    )
    hidden, past_segment_ids = restore_order(layout, rms_norm(params["final_norm"], x, cfg.norm_epsilon))
    if "attention" in common.layer_kinds(cfg):
        hidden, state = common.decoder_outputs(hidden, layers, context, state)
    return hidden, None if state is None else {**state, "layers": layers, "past": past_segment_ids}, statistics


def _delta_rule(
    cfg: Config, weights: Params, x: jax.Array, state: State | None, layout: TokenLayout, masks: dict[str, Any]
) -> tuple[jax.Array, Any]:
    """The output of a gated delta rule, [B, T, D], and its new state (None without a state)."""
    (B, T, _), G, H = x.shape, cfg.delta_key_heads, cfg.delta_value_heads
    K, V, R = cfg.delta_key_dim, cfg.delta_value_dim, H // G
    tail, memory = (None, None) if state is None else (state["tail"], state["memory"])
    q, k, v, gate, tail = _query_key_value_gate(cfg, weights, x, tail, layout)
    q, k = (jnp.repeat(l2_normalize(y.reshape(B, T, G, K), L2_EPSILON), R, axis=2) for y in (q, k))

    beta_decay = linear(weights["beta_decay"], x).astype(jnp.float32)
    beta, decay = (beta_decay[:, :, :, i].reshape(B, T, H) for i in (0, 1))
    beta = jax.nn.sigmoid(beta) * (2.0 if cfg.negative_eigenvalues else 1.0)
    A_log, dt_bias = (weights[name].astype(jnp.float32)[None, None] for name in ("A_log", "dt_bias"))
    log_decay = -jnp.exp(A_log) * jax.nn.softplus(decay + dt_bias)
    out, memory = gated_delta_rule(q * K**-0.5, k, v.reshape(B, T, H, V), log_decay, beta, memory, **masks)
    # Two reshapes, so that the axis H gets the sharding of the axis G.
    gate = jax.nn.silu(gate.reshape(B, T, G, R, V).reshape(B, T, H, V))
    out = rms_norm(weights["norm"], out, cfg.norm_epsilon) * gate
    return linear(weights["output"], out, num_input_axes=2), None if state is None else {"tail": tail, "memory": memory}


def _query_key_value_gate(
    cfg: Config, weights: Params, x: jax.Array, tail: Any, layout: TokenLayout
) -> tuple[Any, ...]:
    """Queries, keys, values, the pre-activations of the gates, and the new tail (None without a tail).

    Queries and keys are [B, T, G * K], values [B, T, H * V] and gates [B, T, G, R * V], for G key heads, H value heads
    and R = H / G. Queries, keys and values are the outputs of the convolution, with SiLU.
    """
    (B, T, _), G, H = x.shape, cfg.delta_key_heads, cfg.delta_value_heads
    K, values = cfg.delta_key_dim, cfg.delta_value_dim * H // G
    head_ends, channel_ends = (K, 2 * K, 2 * K + values), (G * K, 2 * G * K)
    if T == 1:  # slices of the weights would be copied for each token
        (projected,) = common.project_heads(weights, x, "query_key_value_gate")
        *qkv, gate = jnp.split(projected, head_ends, axis=-1)
        qkv_BTC = jnp.concatenate([y.reshape(B, T, -1) for y in qkv], axis=-1)
        qkv_BTC, tail = causal_depthwise_convolution(weights["convolution"], layout, qkv_BTC, tail)
        return *jnp.split(jax.nn.silu(qkv_BTC), channel_ends, axis=-1), gate, tail
    # Here, slices of the activations would be copied, and so would their gradients.
    slices = jnp.split(weights["query_key_value_gate"]["weight"], head_ends, axis=-1)
    parts = {name: {"weight": w} for name, w in zip(("query", "key", "value", "gate"), slices, strict=True)}
    *qkv, gate = common.project_heads(parts, x, *parts)
    tails = [None] * 3 if tail is None else jnp.split(tail, channel_ends, axis=-1)
    filters = jnp.split(weights["convolution"]["weight"], channel_ends, axis=-1)
    results = [
        causal_depthwise_convolution({"weight": w}, layout, y.reshape(B, T, -1), old_tail)
        for y, w, old_tail in zip(qkv, filters, tails, strict=True)
    ]
    convolved, new_tails = zip(*results, strict=True)
    tail = None if tail is None else jnp.concatenate(new_tails, axis=-1)
    return *map(jax.nn.silu, convolved), gate, tail


def _attention(
    cfg: Config, weights: Params, x: jax.Array, kv: Any, context: cache.CacheContext, angles: Any
) -> tuple[jax.Array, Any]:
    """The output of gated attention, [B, T, D], and its new cache (None without a state)."""
    query_gate = constrain(linear(weights["query_gate"], x), ("batch", "seq", "heads", None, "kv"))
    q, gate = query_gate[:, :, :, 0], query_gate[:, :, :, 1]
    k, v = common.project_heads(weights, x, "key", "value")
    q, k = (rms_norm(weights[f"{name}_norm"], y, cfg.norm_epsilon) for name, y in (("query", q), ("key", k)))
    kv, (k, v) = cache.append_and_read(kv, (rotate(k, angles), v), context)
    x = attention(rotate(q, angles), k, v, context.mask, implementation=cfg.attention_implementation)
    return linear(weights["output"], x * jax.nn.sigmoid(gate), num_input_axes=2), kv


logits = heads.decoder_logits
pool = heads.pool_last_token


def conv_channels(cfg: Config) -> int:
    """The number of channels of the convolution. The channels are all queries, all keys and all values of a token."""
    return 2 * cfg.delta_key_heads * cfg.delta_key_dim + cfg.delta_value_heads * cfg.delta_value_dim


def specs(cfg: Config) -> dict[str, Any]:
    """The specs of all parameters.

    The convolution, ``A_log`` and ``dt_bias`` have the initial values of the code of Yang et al., with one exception:
    ``exp(A_log)`` is uniform from 1e-3 to 16 instead of 0 to 16, so that ``A_log`` is finite.

    For each key head, ``query_key_value_gate`` computes a query, a key, R values and R output gates, and ``beta_decay``
    computes R betas and R decays.
    """
    D, normal = cfg.embed_dim, Normal(cfg.init_stddev)
    H, G, K, bias = cfg.num_heads, cfg.num_kv_heads, cfg.head_dim, cfg.attention_bias
    G_delta, H_delta, V_delta = cfg.delta_key_heads, cfg.delta_value_heads, cfg.delta_value_dim
    R, norm = H_delta // G_delta, rms_norm_specs(D, minus_one=True)
    delta_rule = {
        "query_key_value_gate": linear_specs(
            (D, G_delta, 2 * cfg.delta_key_dim + 2 * R * V_delta), ("embed", "heads", "kv"), normal, bias=False
        ),
        "convolution": depthwise_convolution_specs(
            (cfg.conv_width, conv_channels(cfg)), ("mlp",), Uniform(cfg.conv_width**-0.5), bias=False
        ),
        "beta_decay": linear_specs((D, G_delta, 2, R), ("embed", "heads", None, None), normal, bias=False),
        "A_log": ArraySpec((H_delta,), ("heads",), LogOfUniform(1e-3, 16.0)),
        "dt_bias": ArraySpec((H_delta,), ("heads",), InverseSoftplus(1e-3, 0.1, 1e-4)),
        "norm": rms_norm_specs(V_delta),
        "output": linear_specs((H_delta, V_delta, D), ("heads", "kv", "embed"), normal, num_input_axes=2, bias=False),
    }
    attention = {
        "query_gate": linear_specs((D, H, 2, K), ("embed", "heads", None, "kv"), normal, bias=bias),
        "key": linear_specs((D, G, K), ("embed", "heads", "kv"), normal, bias=bias),
        "value": linear_specs((D, G, K), ("embed", "heads", "kv"), normal, bias=bias),
        "query_norm": rms_norm_specs(K, minus_one=True),
        "key_norm": rms_norm_specs(K, minus_one=True),
        "output": linear_specs((H, K, D), ("heads", "kv", "embed"), normal, num_input_axes=2, bias=bias),
    }
    mixer_specs = {"delta_rule": delta_rule, "attention": attention}
    layers = (
        {
            "mixer_norm": norm,
            mixer: mixer_specs[mixer],
            "mlp_norm": norm,
            **experts.mlp_specs(cfg, layer, normal, shared_dim=cfg.shared_expert_dim),
        }
        for layer, mixer in enumerate(common.layer_kinds(cfg))
    )
    return heads.decoder_specs(cfg, spec.layers(layers, stacked=cfg.scan_layers), norm, normal)


def state_specs(cfg: Config, batch: int, length: int) -> dict[str, Any]:
    """The specs of the state of ``batch`` rows of at most ``length`` tokens each, padding included.

    A layer with a delta rule has the state of the delta rule (``memory``) and the last inputs of the convolution
    (``tail``). The sizes of both do not depend on ``length``. A layer with attention has a key-value cache. If there
    is such a layer, the state also has the arrays that all caches share (``cache.cache_specs``). ``past`` contains the
    segment ids of the last ``conv_width - 1`` real tokens.
    """
    dtype, H, tail_length = jnp.dtype(cfg.dtype), cfg.delta_value_heads, cfg.conv_width - 1
    memory = ArraySpec((batch, H, cfg.delta_key_dim, cfg.delta_value_dim), ("batch", "heads", None, None))
    delta_rule = {"tail": tail_specs(batch, tail_length, conv_channels(cfg), dtype), "memory": memory}
    specs_of, caches = {"delta_rule": delta_rule}, {}
    if "attention" in common.layer_kinds(cfg):
        caches = cache.cache_specs(1, batch, length, cfg.num_kv_heads, cfg.head_dim, dtype, stacked=False)
        specs_of["attention"] = caches["layers"][0]
    layers = common.layers_of_kinds(cfg, specs_of)
    return {**caches, "layers": layers, "past": past_segment_specs(batch, tail_length)}


def carried_state_length(cfg: Config) -> int | None:
    """The ``length`` that training passes to :func:`state_specs`; None: no state is passed from batch to batch.

    Without attention, every ``length`` gives the same state. If a layer has attention, the result is None, because its
    key-value cache has room for only ``length`` tokens.
    """
    return None if "attention" in common.layer_kinds(cfg) else 1


# norm_epsilon is larger than in published models, because the outputs of a delta rule with random weights are small.
_TINY = Config(
    vocab_size=128, max_positions=64, num_layers=3, pattern=("delta_rule", "attention"), embed_dim=32, mlp_dim=48,
    delta_key_heads=2, delta_value_heads=4, delta_key_dim=16, delta_value_dim=6, num_heads=4, head_dim=16,
    norm_epsilon=1e-3,
)  # fmt: skip
VARIANTS = {
    "qwen3-next-80b-a3b": Config(
        max_positions=262144, mlp_dim=5120, rotary_base=1e7, num_experts=512, experts_per_token=10, expert_dim=512,
        shared_expert_dim=512,
    ),
    "gated_deltanet-tiny": dataclasses.replace(_TINY, max_positions=None, num_layers=2, pattern=("delta_rule",)),
    "gated_deltanet-hybrid-tiny": _TINY,
    # Rounding in bfloat16 can change the selected experts. Without renormalization, this changes the output little.
    "gated_deltanet-experts-tiny": dataclasses.replace(
        _TINY, num_experts=4, expert_dim=20, shared_expert_dim=12, renormalize_experts=False
    ),
}  # fmt: skip
