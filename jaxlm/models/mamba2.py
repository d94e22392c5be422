"""Mamba-2 (Dao & Gu 2024, "Transformers are SSMs").

A causal model without attention and without positions. Each block has one mixer: a causal depthwise convolution, a
selective state space model (SSD), and a gate. The size of the state does not depend on the length of the text.

The code uses the names of the paper: z is the gate, x the input of the state space model, B its input weights,
C its output weights, dt the step sizes (Delta), A the decay rates, and D the weights of the skip connection.

Shapes: B batch, T time, D model width, I width of the mixer (expand * D), H heads, P width of a head, G groups of
heads, N state size, K taps of the convolution, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from jaxlm import spec
from jaxlm.models import common, heads
from jaxlm.nn.convolution import causal_depthwise_convolution, depthwise_convolution_specs
from jaxlm.nn.convolution.window import Stream, close_stream, open_stream, past_specs, tail_specs
from jaxlm.nn.embedding import embed, round_up
from jaxlm.nn.linear import linear, linear_specs
from jaxlm.nn.norm import rms_norm, rms_norm_specs
from jaxlm.nn.scan import ssd
from jaxlm.sharding import constrain
from jaxlm.spec import ONES, ArraySpec, InverseSoftplus, LogOfUniform, Normal, Params, State, Uniform

Task = Literal["causal", "none"]


@dataclasses.dataclass(frozen=True)
class Config(common.TransformerConfig):
    """Shape and behaviour of a Mamba-2. The defaults are the published model with 130M parameters."""

    vocab_size: int = 50288
    """Number of token ids. The published models have 50277 ids, padded to a multiple of 16."""
    num_layers: int = 24
    """Number of blocks."""
    embed_dim: int = 768
    """Model width."""
    expand: int = 2
    """Width of the mixer, as a multiple of embed_dim."""
    head_dim: int = 64
    """Width of a head. There are expand * embed_dim / head_dim heads."""
    state_size: int = 128
    """Width of B and C. The state of a head has state_size * head_dim numbers."""
    num_groups: int = 1
    """Groups of heads. The heads of a group share B and C."""
    conv_width: int = 4
    """Number of tokens that the convolution reads, the current token included."""
    dt_limit_min: float = 0.0
    """Lower limit of the step sizes dt, after softplus."""
    dt_limit_max: float | None = None
    """Upper limit of the step sizes dt; None means no limit."""
    norm_before_gate: bool = False
    """Whether the mixer normalizes its output before it multiplies by the gate: norm(y) * silu(z) if True,
    norm(y * silu(z)) if False."""
    linear_bias: bool = False
    """Whether the linear layers have biases."""
    conv_bias: bool = True
    """Whether the convolution has a bias."""
    norm_epsilon: float = 1e-5
    """Added to the mean square in RMS norms."""
    residual_in_float32: bool = True
    """Whether the residual stream is float32 for every compute dtype."""
    tie_embeddings: bool = True
    """Use the token table as the output head."""
    init_stddev: float = 0.02
    """Standard deviation of initial embeddings."""
    init_dt_min: float = 0.001
    """Minimum of the initial step sizes dt. Their logarithms are drawn from a uniform distribution."""
    init_dt_max: float = 0.1
    """Maximum of the initial step sizes dt."""
    init_dt_floor: float = 1e-4
    """Initial step sizes below this value are set to it."""
    task: Task = "causal"
    """Output head: next token (causal) or none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        common.check_positive(
            self, "vocab_size", "num_layers", "embed_dim", "expand", "head_dim", "state_size", "num_groups"
        )
        common.check_choices(self, task=get_args(Task))
        if (self.expand * self.embed_dim) % self.head_dim:
            raise ValueError(
                f"head_dim={self.head_dim} does not divide expand * embed_dim = {self.expand * self.embed_dim}: "
                "change one of them"
            )
        if num_heads(self) % self.num_groups:
            raise ValueError(
                f"num_groups={self.num_groups} does not divide the {num_heads(self)} heads (expand * embed_dim / "
                "head_dim): change one of them"
            )
        if self.conv_width < 2:
            raise ValueError(f"conv_width={self.conv_width} must be at least 2")
        if not 0.0 <= self.dt_limit_min < (float("inf") if self.dt_limit_max is None else self.dt_limit_max):
            raise ValueError(
                f"dt_limit_min={self.dt_limit_min} must be at least 0 and below dt_limit_max={self.dt_limit_max}"
            )
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
) -> tuple[jax.Array, Any]:
    """The hidden states after the final norm, [B, T, D], and the new state (None without a state).

    Args:
        tokens: [B, T] integer ids. An id outside the vocabulary gives NaN, also for other tokens of the row.
        state: the state after the tokens before ``tokens`` (``state_specs``).
        segment_ids: [B, T] int32, 0 for padding and n for document n. Documents do not interact. Default: one document.
        key: not used, because the model has no dropout.
    """
    common.check_tokens(tokens, segment_ids, None, None)
    tokens, stream = open_stream(tokens, segment_ids, None if state is None else state["segment_ids"])
    masks = stream.masks()
    dtype = jnp.dtype(cfg.dtype)
    residual_dtype = jnp.float32 if cfg.residual_in_float32 else dtype
    x = embed(params["token_embedding"], tokens, residual_dtype, size=cfg.vocab_size)
    x = constrain(x, ("batch", "seq", "activation_embed"))

    def block(x: jax.Array, layer: Any) -> tuple[jax.Array, Any]:
        weights, layer_state, _ = layer
        normed = rms_norm(weights["norm"], x, cfg.norm_epsilon).astype(dtype)
        mixed, layer_state = _mixer(cfg, weights["mixer"], normed, layer_state, stream, masks)
        return constrain(x + mixed, ("batch", "seq", "activation_embed")), layer_state

    layers = None if state is None else state["layers"]
    x, layers = common.run_layers(block, x, params["layers"], layers, key, remat=cfg.remat)
    hidden, past = close_stream(stream, rms_norm(params["final_norm"], x, cfg.norm_epsilon).astype(dtype))
    return hidden, None if state is None else {"layers": layers, "segment_ids": past}


def _mixer(
    cfg: Config, weights: Params, u_BTD: jax.Array, state: State | None, stream: Stream, masks: dict[str, Any]
) -> tuple[jax.Array, Any]:
    """The output of a mixer, [B, T, D], and its new state (None without a state)."""
    B, T, _ = u_BTD.shape
    zx = constrain(linear(weights["zx"], u_BTD), ("batch", "seq", None, "mlp"))
    z, x, BC, dt = zx[:, :, 0], zx[:, :, 1], linear(weights["BC"], u_BTD), linear(weights["dt"], u_BTD)
    x_tail, BC_tail, hidden = (None if state is None else state[name] for name in ("x", "BC", "hidden"))
    x, x_tail = causal_depthwise_convolution(weights["x_convolution"], stream, x, x_tail)
    BC, BC_tail = causal_depthwise_convolution(weights["BC_convolution"], stream, BC, BC_tail)
    x, BC = jax.nn.silu(x), jax.nn.silu(BC)

    x = constrain(x.reshape(B, T, num_heads(cfg), cfg.head_dim), ("batch", "seq", "heads", "kv"))
    BC = BC.reshape(B, T, 2, cfg.num_groups, cfg.state_size)
    dt = jax.nn.softplus(dt.astype(jnp.float32) + weights["dt_bias"][None, None])
    dt = jnp.clip(dt, cfg.dt_limit_min, cfg.dt_limit_max)
    y, hidden = ssd(x, dt, -jnp.exp(weights["A_log"]), BC[:, :, 0], BC[:, :, 1], hidden, **masks)
    y = (y + weights["D"].astype(x.dtype)[None, None, :, None] * x).reshape(z.shape)

    gate = jax.nn.silu(z)
    y = y if cfg.norm_before_gate else y * gate
    y = rms_norm(weights["norm"], y, cfg.norm_epsilon)
    y = y * gate if cfg.norm_before_gate else y
    return linear(weights["output"], y), None if state is None else {"x": x_tail, "BC": BC_tail, "hidden": hidden}


def logits(cfg: Config, params: Params, hidden: jax.Array) -> jax.Array:
    """The logits of the next token, [B, T, V] float32 (V padded to ``vocab_multiple``).

    Raises:
        ValueError: the task is none, so there is no head.
    """
    if cfg.task == "none":
        raise ValueError("task='none' has no output head: use the hidden states, or set task='causal'")
    return heads.decoder_logits(cfg, params, hidden)


def num_heads(cfg: Config) -> int:
    """The number of heads, H = expand * embed_dim / head_dim."""
    return cfg.expand * cfg.embed_dim // cfg.head_dim


def specs(cfg: Config) -> dict[str, Any]:
    """The specs of all parameters, with the initial values of the authors' code."""
    D, H, BC, K = cfg.embed_dim, num_heads(cfg), 2 * cfg.num_groups * cfg.state_size, cfg.conv_width
    V, width = round_up(cfg.vocab_size, cfg.vocab_multiple), cfg.expand * cfg.embed_dim
    linear_init, conv_init = Uniform(D**-0.5), Uniform(K**-0.5)
    block = {
        "norm": rms_norm_specs(D),
        "mixer": {
            # B and C are not sharded like the heads, because several heads share them.
            "zx": linear_specs((D, 2, width), ("embed", None, "mlp"), linear_init, bias=cfg.linear_bias),
            "BC": linear_specs((D, BC), ("embed", None), linear_init, bias=cfg.linear_bias),
            "dt": linear_specs((D, H), ("embed", "heads"), linear_init, bias=cfg.linear_bias),
            "x_convolution": depthwise_convolution_specs((K, width), ("mlp",), conv_init, bias=cfg.conv_bias),
            "BC_convolution": depthwise_convolution_specs((K, BC), (None,), conv_init, bias=cfg.conv_bias),
            "dt_bias": ArraySpec(
                (H,), ("heads",), InverseSoftplus(cfg.init_dt_min, cfg.init_dt_max, cfg.init_dt_floor)
            ),
            "A_log": ArraySpec((H,), ("heads",), LogOfUniform(1.0, 16.0)),
            "D": ArraySpec((H,), ("heads",), ONES),
            "norm": rms_norm_specs(width),
            # Divided by sqrt(num_layers), because the residual stream sums the outputs of num_layers blocks.
            "output": linear_specs(
                (width, D), ("mlp", "embed"), Uniform((width * cfg.num_layers) ** -0.5), bias=cfg.linear_bias
            ),
        },
    }
    tree = {
        "token_embedding": ArraySpec((V, D), ("vocab", "embed"), Normal(cfg.init_stddev), decay=True),
        "layers": spec.layers(cfg.num_layers, block, stacked=cfg.scan_layers),
        "final_norm": rms_norm_specs(D),
    }
    if cfg.task == "causal" and not cfg.tie_embeddings:
        tree["head"] = ArraySpec((V, D), ("vocab", "embed"), linear_init, decay=True)
    return tree


def state_specs(cfg: Config, batch: int, length: int) -> dict[str, Any]:
    """The specs of the state for any ``length``.

    ``hidden`` [B, H, N, P] is the state of a mixer. ``x`` and ``BC`` are the last K - 1 inputs of its convolutions.
    ``segment_ids`` are the segment ids of the last K - 1 tokens.
    """
    reach, dtype = cfg.conv_width - 1, jnp.dtype(cfg.dtype)
    layer = {
        "x": tail_specs(batch, reach, cfg.expand * cfg.embed_dim, dtype),
        "BC": tail_specs(batch, reach, 2 * cfg.num_groups * cfg.state_size, dtype),
        "hidden": ArraySpec((batch, num_heads(cfg), cfg.state_size, cfg.head_dim), ("batch", "heads", None, None)),
    }
    layers = spec.layers(cfg.num_layers, layer, stacked=cfg.scan_layers)
    return {"layers": layers, "segment_ids": past_specs(batch, reach)}


def carried_state_length(cfg: Config) -> int:
    """The ``length`` that training passes to :func:`state_specs`. Any ``length`` gives the same state."""
    return 1


VARIANTS = {
    "mamba2-130m": Config(),
    "mamba2-370m": Config(num_layers=48, embed_dim=1024),
    "mamba2-780m": Config(num_layers=48, embed_dim=1536),
    "mamba2-1.3b": Config(num_layers=48, embed_dim=2048),
    "mamba2-2.7b": Config(num_layers=64, embed_dim=2560),
    "mamba2-tiny": Config(vocab_size=128, num_layers=2, embed_dim=32, head_dim=8, state_size=12, num_groups=2),
}
