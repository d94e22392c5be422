"""xLSTM (Beck et al. 2024), and xLSTM 7B (Beck et al. 2025), which has only mLSTM layers.

The model is causal. Each pre-norm block has a recurrent layer and then a gated MLP. The recurrent layer is an mLSTM,
whose state is a matrix per head, or an sLSTM, in which each head reads its own previous output. ``Config.pattern``
gives the order of the two kinds. The blocks of both kinds are as in xLSTM 7B. The mLSTM is also as in xLSTM 7B: it has
no convolution and no projection to a larger width, and its input and forget gates are soft-capped. The sLSTM is as in
the first paper: its input and forget gates read the output of a convolution, its matrices are block diagonal, and it
has a norm per head.

Shapes: B batch, T time, D model width, H heads, K width of queries and keys of a head, V width of values of a head,
P = D / H width of a head of an sLSTM (Q: the same width, on the output axis of a matrix), G gates.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxlm.models import common, heads
from jaxlm.nn.activation import soft_cap
from jaxlm.nn.convolution import causal_depthwise_convolution, depthwise_convolution_specs
from jaxlm.nn.convolution.window import tail_specs
from jaxlm.nn.embedding import embed
from jaxlm.nn.linear import linear, linear_specs
from jaxlm.nn.norm import multi_head_layer_norm, rms_norm, rms_norm_specs
from jaxlm.nn.recurrence import slstm, slstm_specs, slstm_state_specs
from jaxlm.nn.scan import mlstm, mlstm_state_specs
from jaxlm.nn.swiglu import swiglu, swiglu_specs
from jaxlm.nn.token_layout import TokenLayout, move_padding_last, past_segment_specs, restore_order
from jaxlm.sharding import constrain
from jaxlm.spec import ZEROS, ArraySpec, Constant, Normal, Params, State, Uniform

Mixer = Literal["mlstm", "slstm"]


@dataclasses.dataclass(frozen=True)
class Config(common.TransformerConfig):
    """Shape and behavior of an xLSTM. The defaults are xLSTM 7B."""

    vocab_size: int = 50304
    """Number of token ids."""
    num_layers: int = 32
    """Number of blocks."""
    pattern: tuple[Mixer, ...] = ("mlstm",)
    """Kinds of the recurrent layers of the first blocks. The other blocks repeat the pattern; the last repetition may
    be incomplete. The paper's xLSTM[7:1] has seven mLSTMs and one sLSTM."""
    embed_dim: int = 4096
    """Model width."""
    mlp_dim: int = 10944
    """Hidden width of the MLP."""
    num_heads: int = 8
    """Number of heads of an mLSTM and of an sLSTM."""
    key_dim: int = 2048
    """Width of the queries of an mLSTM, summed over its heads; also the width of the keys."""
    value_dim: int = 4096
    """Width of the values of an mLSTM, summed over its heads."""
    conv_width: int = dataclasses.field(default=4, metadata={"minimum": 2})
    """Number of tokens that the convolution of an sLSTM layer reads, the current token included."""
    gate_soft_cap: float | None = 15.0
    """Soft cap c of the pre-activations x of an mLSTM's input and forget gates: c * tanh(x / c); None: no cap."""
    logits_soft_cap: float | None = 30.0
    """Soft cap c of the logits: c * tanh(logits / c); None: no cap."""
    norm_epsilon: float = 1e-6
    """Added to the mean square in RMS norms, and to the variance in the norm per head."""
    mlstm_epsilon: float = 1e-6
    """Added to the divisor of the output of an mLSTM."""
    tie_embeddings: bool = False
    """Use the token table as the output head."""
    task: heads.DecoderTask = "causal"
    """Output head: next token (causal), label of the text (classification), label of each token (token_classification),
    answer span (span_qa), or none."""
    num_labels: int = 2
    """Number of labels if the task is classification or token_classification."""

    def __post_init__(self) -> None:
        super().__post_init__()
        common.check_pattern(self)
        common.check_divides(self, "num_heads", "key_dim", "value_dim")
        if "slstm" in self.pattern:
            common.check_divides(self, "num_heads", "embed_dim")
        if self.embed_dim < self.num_heads:
            raise ValueError(f"embed_dim={self.embed_dim} must be at least num_heads={self.num_heads}")


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
    tokens, layout = move_padding_last(tokens, segment_ids, None if state is None else state["past"])
    masks = layout.recurrence_masks()

    x = embed(params["token_embedding"], tokens, jnp.dtype(cfg.dtype), size=cfg.vocab_size)
    x = constrain(x, ("batch", "seq", "activation_embed"))

    def block(x: jax.Array, layer: Any) -> tuple[jax.Array, Any]:
        weights, layer_state, _ = layer
        normed = rms_norm(weights["mixer_norm"], x, cfg.norm_epsilon)
        if "mlstm" in weights:
            mixed, layer_state = _mlstm(cfg, weights["mlstm"], normed, layer_state, masks)
        else:
            mixed, layer_state = _slstm(cfg, weights["slstm"], normed, layer_state, layout, masks)
        x = constrain(x + mixed, ("batch", "seq", "activation_embed"))
        x = x + swiglu(weights["mlp"], rms_norm(weights["mlp_norm"], x, cfg.norm_epsilon))
        return constrain(x, ("batch", "seq", "activation_embed")), layer_state

    layers = None if state is None else state["layers"]
    x, layers = common.run_layers(block, x, params["layers"], layers, key, remat=cfg.remat, num_layers=cfg.num_layers)
    hidden, past_segment_ids = restore_order(layout, rms_norm(params["final_norm"], x, cfg.norm_epsilon))
    return hidden, None if state is None else {"layers": layers, "past": past_segment_ids}


def _mlstm(
    cfg: Config, weights: Params, x: jax.Array, state: State | None, masks: dict[str, Any]
) -> tuple[jax.Array, Any]:
    """The output of an mLSTM layer, [B, T, D], and its new state."""
    q, k, v, o = common.project_heads(weights, x, "query", "key", "value", "output_gate")
    log_input, forget = (
        soft_cap(linear(weights[name], x).astype(jnp.float32), cfg.gate_soft_cap)
        for name in ("input_gate", "forget_gate")
    )
    q = q * (cfg.key_dim // cfg.num_heads) ** -0.5
    x, new_state = mlstm(
        q, k, v, log_input, jax.nn.log_sigmoid(forget), state, **masks, epsilon=cfg.mlstm_epsilon
    )  # fmt: skip
    x = multi_head_layer_norm(weights["norm"], x, cfg.norm_epsilon) * jax.nn.sigmoid(o)
    return linear(weights["output"], x, num_input_axes=2), None if state is None else new_state


def _slstm(
    cfg: Config, weights: Params, x: jax.Array, state: State | None, layout: TokenLayout, masks: dict[str, Any]
) -> tuple[jax.Array, Any]:
    """The output of an sLSTM layer, [B, T, D], and its new state."""
    B, T, D = x.shape
    tail = None if state is None else state["tail"]
    convolved, tail = causal_depthwise_convolution(weights["convolution"], layout, x, tail)
    projected = [  # i and f read the output of the convolution after SiLU; z and o read the convolution's input
        jnp.einsum("BTHP,HPGQ->BTHGQ", y.reshape(B, T, cfg.num_heads, -1), weights[name]["weight"].astype(y.dtype))
        for name, y in (("input_forget", jax.nn.silu(convolved)), ("cell_output", x))
    ]
    x, new_cell = slstm(
        weights["cell"], jnp.concatenate(projected, axis=3), None if state is None else state["cell"], **masks
    )
    x = multi_head_layer_norm(weights["norm"], x, cfg.norm_epsilon).reshape(B, T, D)
    return x, None if state is None else {"tail": tail, "cell": new_cell}


logits = heads.decoder_logits
pool = heads.pool_last_token


@dataclasses.dataclass(frozen=True)
class ForgetBias:
    """Initial biases of forget gates: from ``low`` to ``high`` in equal steps along the last axis.

    The last axis has the heads of an mLSTM, or the channels of one head of an sLSTM.

    Args:
        gate: index of the forget gate on the second-to-last axis, the axis of gates. The other gates get 0. None: the
            shape has no axis of gates.
    """

    low: float = 3.0
    high: float = 6.0
    gate: int | None = None

    def __call__(self, key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
        bias = jnp.broadcast_to(jnp.linspace(self.low, self.high, shape[-1], dtype=dtype), shape)
        if self.gate is None:
            return bias
        return jnp.where(jnp.arange(shape[-2])[:, None] == self.gate, bias, jnp.zeros_like(bias))


def specs(cfg: Config) -> dict[str, Any]:
    """The specs of all parameters.

    The initial values are those of Hugging Face's ``transformers``, with one exception: the weights of output gates and
    MLP gates are random here, and zeros in ``transformers``. There is no sLSTM in ``transformers``. The initial biases
    of an sLSTM are those of the authors' code with ``bias_init="small_init"``: 3 to 6 for the forget gate, 0 for the
    other gates.
    """
    D, H, F, L = cfg.embed_dim, cfg.num_heads, cfg.mlp_dim, cfg.num_layers
    K, V, P = cfg.key_dim // H, cfg.value_dim // H, D // H
    small_init, norm = Normal((2 / (5 * D)) ** 0.5), rms_norm_specs(D)

    def gate(bias_init: Any) -> dict[str, ArraySpec]:
        return {
            "weight": ArraySpec((D, H), ("embed", "heads"), ZEROS, decay=True),
            "bias": ArraySpec((H,), ("heads",), bias_init),
        }

    mlstm_layer = {
        "query": linear_specs((D, H, K), ("embed", "heads", "kv"), small_init, bias=False),
        "key": linear_specs((D, H, K), ("embed", "heads", "kv"), small_init, bias=False),
        "value": linear_specs((D, H, V), ("embed", "heads", "kv"), small_init, bias=False),
        "output_gate": linear_specs((D, H, V), ("embed", "heads", "kv"), small_init, bias=False),
        "input_gate": gate(Constant(-10.0)),
        "forget_gate": gate(ForgetBias()),
        "norm": rms_norm_specs(cfg.value_dim),
        "output": linear_specs(
            (H, V, D), ("heads", "kv", "embed"), Normal(2 / L * D**-0.5), num_input_axes=2, bias=False
        ),
    }
    block_diagonal = linear_specs((H, P, 2, P), ("heads", None, None, None), small_init, bias=False)
    slstm_layer = {
        "convolution": depthwise_convolution_specs((cfg.conv_width, D), ("mlp",), Uniform(cfg.conv_width**-0.5)),
        "input_forget": block_diagonal,
        "cell_output": block_diagonal,
        "cell": slstm_specs(H, P, ZEROS, ForgetBias(gate=1)),
        "norm": norm,
    }
    mlp = swiglu_specs(D, F, small_init, Normal(2 / L * F**-0.5))
    shared = {"mixer_norm": norm, "mlp_norm": norm, "mlp": mlp}
    specs_of = {"mlstm": {"mlstm": mlstm_layer, **shared}, "slstm": {"slstm": slstm_layer, **shared}}
    return heads.decoder_specs(cfg, common.layers_of_kinds(cfg, specs_of), norm, small_init)


def state_specs(cfg: Config, batch: int, length: int) -> dict[str, Any]:
    """The specs of the state of ``batch`` rows: the states of the recurrent layers and the last segment ids (``past``).

    The size of the state does not depend on ``length``. The state of an sLSTM layer includes the last inputs of its
    convolution (``tail``).
    """
    H, tail_length = cfg.num_heads, cfg.conv_width - 1
    specs_of = {
        "mlstm": mlstm_state_specs(batch, H, cfg.key_dim // H, cfg.value_dim // H),
        "slstm": {
            "tail": tail_specs(batch, tail_length, cfg.embed_dim, jnp.dtype(cfg.dtype)),
            "cell": slstm_state_specs(batch, H, cfg.embed_dim // H),
        },
    }
    past = past_segment_specs(batch, tail_length if "slstm" in common.layer_kinds(cfg) else 1)
    return {"layers": common.layers_of_kinds(cfg, specs_of), "past": past}


carried_state_length = common.fixed_size_state_length


_TINY = Config(vocab_size=128, num_layers=2, embed_dim=32, mlp_dim=48, num_heads=4, key_dim=64, value_dim=64)
VARIANTS = {
    "xlstm-7b": Config(),
    "xlstm-tiny": _TINY,
    "xlstm-slstm-tiny": dataclasses.replace(_TINY, pattern=("slstm", "mlstm")),
}
