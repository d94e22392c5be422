"""Mamba-2 (Dao & Gu 2024, "Transformers are SSMs"), and its hybrids with attention: Bamba and Falcon-H1.

All models are causal. Each block of Mamba-2 has one mixer: a causal depthwise convolution, a selective state space
model (SSD), and a gate. Mamba-2 has no position embeddings, and the size of the state does not depend on the length of
the text. In a hybrid, some blocks have attention with rotary positions instead of the mixer (Bamba, IBM et al. 2024),
or the mixer and attention in parallel: both read the same input, and their outputs are added (Falcon-H1, Zuo et al.
2025). Each block of these hybrids also has a SwiGLU MLP. Falcon-H1 multiplies activations by constants
(``multipliers``).

Arrays have the names of the paper: z is the gate, x the input of the state space model, B its input weights, C its
output weights, dt the step sizes (Delta), A the decay rates, and D the weights of the skip connection.

In shapes, the letters mean: B batch, T time, D model width, I width of the mixer, H heads, P width of a head, G groups
of heads, N state size, K taps of the convolution, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.models import common, heads, hybrid
from jaxlm.nn.attention import cache
from jaxlm.nn.convolution import causal_depthwise_convolution, depthwise_convolution_specs
from jaxlm.nn.convolution.window import tail_specs
from jaxlm.nn.embedding import Unembedding, embed
from jaxlm.nn.linear import linear_specs
from jaxlm.nn.norm import rms_norm, rms_norm_specs
from jaxlm.nn.scan import ssd
from jaxlm.nn.swiglu import swiglu, swiglu_specs
from jaxlm.nn.token_layout import TokenLayout, move_padding_last, past_segment_specs, restore_order
from jaxlm.sharding import constrain
from jaxlm.spec import ONES, ArraySpec, InverseSoftplus, LogOfUniform, Normal, Params, State, Uniform

Mixer = Literal["mamba2", "attention", "parallel"]


@dataclasses.dataclass(frozen=True)
class Config(hybrid.AttentionConfig):
    """Shape and behavior of a Mamba-2. The defaults are the published model with 130M parameters."""

    vocab_size: int = 50288
    """Number of token ids. The published models have 50277 ids, padded to a multiple of 16."""
    num_layers: int = 24
    """Number of blocks."""
    pattern: tuple[Mixer, ...] = ("mamba2",)
    """Kinds of the first blocks: mamba2, attention or parallel (a Mamba-2 mixer and attention; outputs are added).
    The other blocks repeat the pattern. The last repetition may be incomplete."""
    embed_dim: int = 768
    """Model width."""
    mlp_dim: int | None = None
    """Hidden width of the MLP at the end of each block; None: blocks have no MLP."""
    expand: float = 2
    """Width of the mixer, as a multiple of embed_dim. The product is rounded."""
    head_dim: int = 64
    """Width of a head of a Mamba-2 mixer. There are expand * embed_dim / head_dim heads."""
    state_size: int = 128
    """Width of B and C. The state of a head has state_size * head_dim numbers."""
    num_groups: int = 1
    """Groups of heads. The heads of a group share B and C."""
    conv_width: int = dataclasses.field(default=4, metadata={"minimum": 2})
    """Number of tokens that the convolution reads, the current token included."""
    dt_limit_min: float = 0.0
    """Lower limit of the step sizes dt, after softplus."""
    dt_limit_max: float | None = None
    """Upper limit of the step sizes dt; None means no limit."""
    negative_eigenvalues: bool = False
    """Whether decays are 2 * exp(A * dt) - 1, in [-1, 1], instead of exp(A * dt), in [0, 1] (Grazzi et al. 2025)."""
    norm_before_gate: bool = False
    """Whether the mixer normalizes its output before it multiplies by the gate: norm(y) * silu(z) if True,
    norm(y * silu(z)) if False."""
    norm_groups: int | None = 1
    """Number of equal parts of a mixer's output that its norm normalizes separately; None: the mixer has no norm."""
    linear_bias: bool = False
    """Whether the linear layers of Mamba-2 mixers have biases."""
    conv_bias: bool = True
    """Whether the convolution has a bias."""
    norm_epsilon: float = 1e-5
    """Added to the mean square in RMS norms."""
    multipliers: hybrid.Multipliers | None = None
    """Constants by which a Falcon-H1 multiplies activations; None: all are 1."""
    residual_in_float32: bool = True
    """Whether the residual stream is float32 for every compute dtype; otherwise, it has the compute dtype."""
    tie_embeddings: bool = True
    """Use the token table as the output head."""
    init_stddev: float = 0.02
    """Standard deviation of initial embeddings."""
    init_dt_min: float = 0.001
    """Minimum of the initial step sizes dt. Their logarithms are drawn from a uniform distribution."""
    init_dt_max: float = 0.1
    """Maximum of the initial step sizes dt."""
    init_dt_floor: float = 1e-4
    """Initial step sizes below this value are raised to this value."""
    task: heads.DecoderTask = "causal"
    """Output head: next token (causal), label of the text (classification), label of each token (token_classification),
    answer span (span_qa), or none."""
    num_labels: int = 2
    """Number of labels if the task is classification or token_classification."""

    def __post_init__(self) -> None:
        super().__post_init__()
        common.check_pattern(self)
        width = mixer_width(self)
        if width < 1 or width % self.head_dim:
            raise ValueError(f"head_dim={self.head_dim} must divide expand * embed_dim = {width}: change one of them")
        if num_heads(self) % self.num_groups:
            raise ValueError(f"num_groups={self.num_groups} does not divide the {num_heads(self)} heads of a mixer")
        if self.norm_groups is not None and width % self.norm_groups:
            raise ValueError(f"norm_groups={self.norm_groups} does not divide the width of a mixer, {width}")
        if not 0.0 <= self.dt_limit_min < (float("inf") if self.dt_limit_max is None else self.dt_limit_max):
            raise ValueError(f"dt_limit_min={self.dt_limit_min} must be in [0, dt_limit_max={self.dt_limit_max})")
        if not 0.0 < self.init_dt_min <= self.init_dt_max or self.init_dt_floor <= 0.0:
            raise ValueError(
                f"init_dt_min={self.init_dt_min}, init_dt_max={self.init_dt_max} and init_dt_floor="
                f"{self.init_dt_floor} must be above 0, and init_dt_min at most init_dt_max"
            )


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
    common.check_tokens(tokens, segment_ids, max_positions=cfg.max_positions)
    tokens, layout = move_padding_last(tokens, segment_ids, None if state is None else state["past"])
    masks = layout.recurrence_masks()
    if has_attention(cfg):
        context, state = cache.make_context(tokens, state, layout.segment_ids, None)
        angles = hybrid.attention_angles(cfg, context.positions)
    m = cfg.multipliers or hybrid.Multipliers()
    dtype, x_dtype = jnp.dtype(cfg.dtype), jnp.dtype("float32" if cfg.residual_in_float32 else cfg.dtype)
    x = embed(params["token_embedding"], tokens, x_dtype, size=cfg.vocab_size)
    x = constrain(x if m.embedding == 1.0 else x * m.embedding, ("batch", "seq", "activation_embed"))

    def block(x: jax.Array, layer: Any) -> tuple[jax.Array, Any]:
        weights, layer_state, _ = layer
        normed = rms_norm(weights["norm"], x, cfg.norm_epsilon).astype(dtype)
        outputs = []
        if "mixer" in weights:
            y, layer_state = _mixer(cfg, weights["mixer"], normed, layer_state, layout, masks)
            outputs.append(y)
        if "attention" in weights:
            y, layer_state = hybrid.attend(cfg, weights["attention"], normed, layer_state, context, angles)
            outputs.append(y)
        x = constrain(x + sum(outputs), ("batch", "seq", "activation_embed"))
        if cfg.mlp_dim is not None:
            normed = rms_norm(weights["mlp_norm"], x, cfg.norm_epsilon).astype(dtype)
            y = swiglu(weights["mlp"], normed, lambda gate: jax.nn.silu(hybrid.scaled(gate, m.mlp_gate)))
            x = constrain(x + hybrid.scaled(y, m.mlp_output), ("batch", "seq", "activation_embed"))
        return x, layer_state

    layers = None if state is None else state["layers"]
    x, layers = common.run_layers(block, x, params["layers"], layers, key, remat=cfg.remat, num_layers=cfg.num_layers)
    hidden, past_segment_ids = restore_order(layout, rms_norm(params["final_norm"], x, cfg.norm_epsilon).astype(dtype))
    if has_attention(cfg):
        hidden, state = common.decoder_outputs(hidden, layers, context, state)
    return hidden, None if state is None else {**state, "layers": layers, "past": past_segment_ids}


def _mixer(
    cfg: Config, weights: Params, u_BTD: jax.Array, state: State | None, layout: TokenLayout, masks: dict[str, Any]
) -> tuple[jax.Array, Any]:
    """The output of a mixer, [B, T, D], and the new state of the layer (None without a state)."""
    B, T, _ = u_BTD.shape
    m = cfg.multipliers or hybrid.Multipliers()
    BC_factor = np.repeat(np.array([m.B, m.C]), cfg.num_groups * cfg.state_size)

    def project(weights: Params, factor: Any) -> jax.Array:
        return hybrid.scaled_linear(weights, u_BTD, factor, m.mixer_input)

    if T == 1:  # slices of the weight would be copied for each token
        zx = project(weights["zx"], np.array([[m.z], [m.x]]))
        z, x = zx[:, :, 0], zx[:, :, 1]
    else:  # slices of the product would be copied, and so would their gradients
        halves = ({name: w[..., index, :] for name, w in weights["zx"].items()} for index in (0, 1))
        z, x = (project(half, factor) for half, factor in zip(halves, (m.z, m.x), strict=True))
    z, x = (constrain(y, ("batch", "seq", "mlp")) for y in (z, x))
    BC, dt = project(weights["BC"], BC_factor), project(weights["dt"], m.dt)
    x_tail, BC_tail, hidden = (None if state is None else state[name] for name in ("x", "BC", "hidden"))
    x, x_tail = causal_depthwise_convolution(weights["x_convolution"], layout, x, x_tail)
    BC, BC_tail = causal_depthwise_convolution(weights["BC_convolution"], layout, BC, BC_tail)
    x, BC = jax.nn.silu(x), jax.nn.silu(BC)

    x_BTHP = constrain(x.reshape(B, T, num_heads(cfg), cfg.head_dim), ("batch", "seq", "heads", "kv"))
    B_BTGN, C_BTGN = (half.reshape(B, T, cfg.num_groups, cfg.state_size) for half in jnp.split(BC, 2, axis=2))
    dt = jax.nn.softplus(dt.astype(jnp.float32) + weights["dt_bias"][None, None])
    dt = jnp.clip(dt, cfg.dt_limit_min, cfg.dt_limit_max)
    y, hidden = ssd(
        x_BTHP, dt, -jnp.exp(weights["A_log"].astype(jnp.float32)), B_BTGN, C_BTGN, hidden,
        negative_eigenvalues=cfg.negative_eigenvalues, **masks,
    )  # fmt: skip
    # A TPU pads a last axis of head_dim entries to 128. So the elementwise operations below use the shape [B, T, I].
    D_H = weights["D"].astype(jnp.promote_types(x.dtype, jnp.float32))
    y = (y.reshape(z.shape) + jnp.repeat(D_H, cfg.head_dim)[None, None] * x).astype(x.dtype)
    gate = jax.nn.silu(z)
    y = y if cfg.norm_before_gate else y * gate
    if cfg.norm_groups is not None:
        y_BTGC = y.reshape(B, T, cfg.norm_groups, -1)
        scale_GC = weights["norm"]["scale"].reshape(y_BTGC.shape[2:])
        y = rms_norm({"scale": scale_GC}, y_BTGC, cfg.norm_epsilon).reshape(z.shape)
    y = y * gate if cfg.norm_before_gate else y
    state = None if state is None else {**state, "x": x_tail, "BC": BC_tail, "hidden": hidden}
    return hybrid.scaled_linear(weights["output"], y, m.mixer_output), state


def logits(cfg: Config, params: Params, hidden: jax.Array) -> jax.Array | Unembedding:
    """The logits of the head, as in :func:`jaxlm.models.heads.decoder_logits`."""
    factor = 1.0 if cfg.multipliers is None or cfg.task != "causal" else cfg.multipliers.head
    return heads.decoder_logits(cfg, params, hybrid.scaled(hidden, factor))


pool = heads.pool_last_token


def has_attention(cfg: Config) -> bool:
    """Whether at least one block has attention."""
    return set(common.layer_kinds(cfg)) != {"mamba2"}


def mixer_width(cfg: Config) -> int:
    """The width of a Mamba-2 mixer, I = expand * embed_dim."""
    return round(cfg.expand * cfg.embed_dim)


def num_heads(cfg: Config) -> int:
    """The number of heads of a Mamba-2 mixer, H = I / head_dim."""
    return mixer_width(cfg) // cfg.head_dim


def specs(cfg: Config) -> dict[str, Any]:
    """The specs of all parameters, with the initial values of the Mamba-2 authors' code."""
    D, H, BC, K = cfg.embed_dim, num_heads(cfg), 2 * cfg.num_groups * cfg.state_size, cfg.conv_width
    width = mixer_width(cfg)
    input_init, conv_init, norm = Uniform(D**-0.5), Uniform(K**-0.5), rms_norm_specs(D)

    def output_init(size: int) -> Uniform:
        """The initializer of an output projection with ``size`` inputs; deeper models get smaller weights."""
        return Uniform((size * cfg.num_layers * (1 if cfg.mlp_dim is None else 2)) ** -0.5)

    mixer = {
        # The axis of B and C is not sharded, because several heads share B and C.
        "zx": linear_specs((D, 2, width), ("embed", None, "mlp"), input_init, bias=cfg.linear_bias),
        "BC": linear_specs((D, BC), ("embed", None), input_init, bias=cfg.linear_bias),
        "dt": linear_specs((D, H), ("embed", "heads"), input_init, bias=cfg.linear_bias),
        "x_convolution": depthwise_convolution_specs((K, width), ("mlp",), conv_init, bias=cfg.conv_bias),
        "BC_convolution": depthwise_convolution_specs((K, BC), (None,), conv_init, bias=cfg.conv_bias),
        "dt_bias": ArraySpec((H,), ("heads",), InverseSoftplus(cfg.init_dt_min, cfg.init_dt_max, cfg.init_dt_floor)),
        "A_log": ArraySpec((H,), ("heads",), LogOfUniform(1.0, 16.0)),
        "D": ArraySpec((H,), ("heads",), ONES),
        **({} if cfg.norm_groups is None else {"norm": rms_norm_specs(width)}),
        "output": linear_specs((width, D), ("mlp", "embed"), output_init(width), bias=cfg.linear_bias),
    }
    attention = hybrid.attention_specs(cfg, input_init, output_init(cfg.attention_heads * cfg.attention_head_dim))
    shared: dict[str, Any] = {"norm": norm}
    if cfg.mlp_dim is not None:
        shared |= {"mlp_norm": norm, "mlp": swiglu_specs(D, cfg.mlp_dim, input_init, output_init(cfg.mlp_dim))}
    layers = _layers(cfg, {**shared, "mixer": mixer}, {**shared, "attention": attention})
    return heads.decoder_specs(cfg, layers, norm, Normal(cfg.init_stddev), input_init)


def state_specs(cfg: Config, batch: int, length: int) -> dict[str, Any]:
    """The specs of the state of ``batch`` rows of at most ``length`` tokens each, padding included.

    ``hidden`` [B, H, N, P] is the state of a Mamba-2 mixer. ``x`` and ``BC`` are the last K - 1 inputs of its
    convolutions. The sizes of these arrays do not depend on ``length``. A block with attention has a key-value cache.
    ``past`` are the segment ids of the last K - 1 real tokens.
    """
    tail_length, dtype = cfg.conv_width - 1, jnp.dtype(cfg.dtype)
    mixer = {
        "x": tail_specs(batch, tail_length, mixer_width(cfg), dtype),
        "BC": tail_specs(batch, tail_length, 2 * cfg.num_groups * cfg.state_size, dtype),
        "hidden": ArraySpec((batch, num_heads(cfg), cfg.state_size, cfg.head_dim), ("batch", "heads", None, None)),
    }
    past = past_segment_specs(batch, tail_length)
    if not has_attention(cfg):
        return {"layers": _layers(cfg, mixer, {}), "past": past}
    caches = hybrid.cache_specs(cfg, batch, length)
    return {**caches, "layers": _layers(cfg, mixer, caches["layers"][0]), "past": past}


def _layers(cfg: Config, mamba2: dict[str, Any], attention: dict[str, Any]) -> Any:
    """The specs of all layers, from the specs of a mamba2 and of an attention layer. A parallel layer has both."""
    parallel = {**mamba2, **attention}
    return common.layers_of_kinds(cfg, {"mamba2": mamba2, "attention": attention, "parallel": parallel})


def carried_state_length(cfg: Config) -> int | None:
    """The ``length`` that training passes to :func:`state_specs`; None: training does not carry the state.

    Without attention, every ``length`` gives the same state. If a block has attention, the result is None, because its
    key-value cache has room for only ``length`` tokens.
    """
    return None if has_attention(cfg) else 1


_TINY = Config(vocab_size=128, num_layers=2, embed_dim=32, head_dim=8, state_size=12, num_groups=2)
_TINY_HYBRID = dataclasses.replace(
    _TINY, max_positions=64, pattern=("mamba2", "attention"), mlp_dim=48, attention_heads=4, attention_kv_heads=2,
    attention_head_dim=8, residual_in_float32=False, tie_embeddings=False,
)  # fmt: skip
VARIANTS = {
    "mamba2-130m": Config(),
    "mamba2-370m": Config(num_layers=48, embed_dim=1024),
    "mamba2-780m": Config(num_layers=48, embed_dim=1536),
    "mamba2-1.3b": Config(num_layers=48, embed_dim=2048),
    "mamba2-2.7b": Config(num_layers=64, embed_dim=2560),
    "bamba-9b": Config(
        vocab_size=128256, max_positions=4096, num_layers=32, embed_dim=4096, mlp_dim=14336,
        pattern=tuple("attention" if layer in (9, 18, 27) else "mamba2" for layer in range(32)),
        residual_in_float32=False, tie_embeddings=False,
    ),
    "falcon-h1-0.5b": Config(
        vocab_size=32784, max_positions=16384, num_layers=36, pattern=("parallel",), embed_dim=1024, mlp_dim=2048,
        expand=1.5, norm_groups=None, attention_heads=8, attention_kv_heads=2, attention_head_dim=64,
        rotary_fraction=1.0, rotary_base=1e11,
        multipliers=hybrid.Multipliers(
            embedding=32**0.5, head=0.0390625, mixer_input=1.25, z=0.125**0.5, x=0.25, B=0.125**0.5, C=0.5,
            dt=0.125**0.5, mixer_output=18**-0.5, key=0.390625, attention_output=0.9375, mlp_gate=0.78125**0.5,
            mlp_output=0.5859375,
        ),
        residual_in_float32=False, tie_embeddings=False,
    ),
    "mamba2-tiny": _TINY,
    "bamba-tiny": _TINY_HYBRID,
    "falcon-h1-tiny": dataclasses.replace(
        _TINY_HYBRID, pattern=("parallel",), expand=1.5, norm_groups=2, norm_before_gate=True, rotary_fraction=1.0,
        rotary_base=1e5,
        multipliers=hybrid.Multipliers(
            embedding=4.0, head=0.25, mixer_input=1.25, z=0.5, x=0.75, B=1.5, C=0.625, dt=1.75, mixer_output=0.5,
            attention_input=0.875, key=0.375, attention_output=1.125, mlp_gate=0.75, mlp_output=0.625,
        ),
    ),
}  # fmt: skip
