"""Griffin and Hawk (De et al. 2024), and RecurrentGemma (Botev et al. 2024), which is a Griffin.

A causal decoder. Each layer has a temporal-mixing block and then a gated MLP, both with a norm before them (pre-norm).
The temporal-mixing block is a recurrent block (RG-LRU) or local attention with rotary positions. The field ``pattern``
selects it for each layer. Hawk has only recurrent blocks. As in RecurrentGemma, token embeddings are multiplied by
sqrt(D), and logits are soft-capped. The models of De et al. 2024 have neither the factor nor the soft cap.

Shapes: B batch, T time, D model width, W width of the RG-LRU, H query heads (also the number of diagonal blocks in each
gate matrix of an RG-LRU), G key-value heads, K head width, F hidden width of the MLP.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxlm.models import common, heads
from jaxlm.nn.attention import Implementation, attention, window_cache
from jaxlm.nn.attention.rotary import rotary_angles, rotate
from jaxlm.nn.convolution import causal_depthwise_convolution, depthwise_convolution_specs, window
from jaxlm.nn.embedding import embed
from jaxlm.nn.linear import linear, linear_specs
from jaxlm.nn.norm import rms_norm, rms_norm_specs
from jaxlm.nn.recurrence import rg_lru, rg_lru_specs
from jaxlm.nn.swiglu import swiglu
from jaxlm.nn.token_layout import TokenLayout, move_padding_last, past_segment_specs, restore_order
from jaxlm.sharding import constrain
from jaxlm.spec import ArraySpec, Normal, Params, State, fold_in_name

Mixer = Literal["recurrent", "attention"]


@dataclasses.dataclass(frozen=True)
class Config(common.TransformerConfig):
    """Shape and behavior of a Griffin. The defaults are RecurrentGemma-2B."""

    vocab_size: int = 256000
    """Number of token ids."""
    num_layers: int = 26
    """Number of layers."""
    pattern: tuple[Mixer, ...] = ("recurrent", "recurrent", "attention")
    """Temporal-mixing blocks of the first layers: recurrent or attention. The other layers repeat the pattern. The last
    repetition may be incomplete."""
    num_heads: int = 10
    """Number of query heads of attention, and of diagonal blocks in each gate matrix of an RG-LRU."""
    num_kv_heads: int = 1
    """Key-value heads, each shared by num_heads / num_kv_heads query heads."""
    embed_dim: int = 2560
    """Model width."""
    lru_width: int | None = None
    """Width of the RG-LRU; None means embed_dim."""
    mlp_dim: int = 7680
    """Hidden width of the MLP."""
    conv_width: int = dataclasses.field(default=4, metadata={"minimum": 2})
    """Number of tokens that the convolution of a recurrent block reads, the current token included."""
    window: int = 2048
    """Number of tokens that a token attends to, itself included."""
    rotary_base: float = 10000.0
    """Base of the frequencies of rotary positions, which rotate the first half of each head."""
    logits_soft_cap: float = 30.0
    """Soft cap c of the logits: c * tanh(logits / c)."""
    norm_epsilon: float = 1e-6
    """Added to the mean square in RMS norms."""
    tie_embeddings: bool = True
    """Use the token table as the output head."""
    task: heads.DecoderTask = "causal"
    """Output head: next token (causal), label of the text (classification), label of each token (token_classification),
    answer span (span_qa), or none."""
    num_labels: int = 2
    """Number of labels if the task is classification or token_classification."""
    attention_dropout: float = 0.0
    """Dropout rate on attention probabilities."""
    attention_implementation: Implementation | None = None
    """Name of the attention implementation; None selects one for the device and the shapes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        common.check_pattern(self)
        common.check_divides(self, "num_heads", "embed_dim", "lru_width")
        common.check_divides(self, "num_kv_heads", "num_heads")
        if self.embed_dim // self.num_heads % 4:
            raise ValueError(
                f"a head width of {self.embed_dim // self.num_heads} (embed_dim / num_heads) is not a multiple of 4: "
                "rotary positions rotate pairs in half of each head, so change embed_dim or num_heads"
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
        state: the state that the previous call returned, or the initial state (``state_specs``).
        segment_ids: [B, T] int32, 0 for padding and n for document n. Documents do not interact. Default: one document.
        key: random key for dropout; None: no dropout.
    """
    common.check_tokens(tokens, segment_ids)
    tokens, layout = move_padding_last(tokens, segment_ids, None if state is None else state["segment_ids"])
    masks = layout.recurrence_masks(include_first=True)
    context, new_state = window_cache.make_context(
        tokens, state, masks.get("reset_BT"), masks.get("keep_BT"), cfg.window
    )
    angles = rotary_angles(context.positions, cfg.embed_dim // cfg.num_heads // 2, cfg.rotary_base)

    x = embed(params["token_embedding"], tokens, jnp.dtype(cfg.dtype), size=cfg.vocab_size)
    # RecurrentGemma was trained with this factor, rounded to bfloat16.
    x = x * jnp.asarray(embedding_multiplier(cfg), jnp.bfloat16).astype(x.dtype)
    x = constrain(x, ("batch", "seq", "activation_embed"))

    def block(x: jax.Array, layer: Any) -> tuple[jax.Array, Any]:
        weights, layer_state, layer_key = layer
        normed = rms_norm(weights["mixer_norm"], x, cfg.norm_epsilon)
        if "attention" in weights:
            mixed, layer_state = _attention(
                cfg, weights["attention"], normed, layer_state, context, angles, fold_in_name(layer_key, "attention")
            )
        else:
            mixed, layer_state = _recurrent(weights["recurrent"], normed, layer_state, layout, masks)
        x = constrain(x + mixed, ("batch", "seq", "activation_embed"))
        x = x + swiglu(weights["mlp"], rms_norm(weights["mlp_norm"], x, cfg.norm_epsilon), jax.nn.gelu)
        return constrain(x, ("batch", "seq", "activation_embed")), layer_state

    layers = None if state is None else state["layers"]
    x, layers = common.run_layers(block, x, params["layers"], layers, key, remat=cfg.remat, num_layers=cfg.num_layers)
    x, segments = restore_order(layout, rms_norm(params["final_norm"], x, cfg.norm_epsilon))
    return x, None if state is None else {**new_state, "layers": layers, "segment_ids": segments}


def _recurrent(
    weights: Params, x: jax.Array, state: State | None, layout: TokenLayout, masks: dict[str, Any]
) -> tuple[jax.Array, Any]:
    """The output of a recurrent block, [B, T, D], and its new state (None without a state)."""
    gate, x = (constrain(linear(weights[name], x), ("batch", "seq", "mlp")) for name in ("gate", "input"))
    tail, hidden = (None, None) if state is None else (state["tail"], state["hidden"])
    x, tail = causal_depthwise_convolution(weights["convolution"], layout, x, tail)
    x, hidden = rg_lru(weights["rg_lru"], x, hidden, **masks)
    x = linear(weights["output"], jax.nn.gelu(gate) * x)
    return x, None if state is None else {"tail": tail, "hidden": hidden}


def _attention(
    cfg: Config,
    weights: Params,
    x: jax.Array,
    kv: Any,
    context: window_cache.Context,
    angles: tuple[jax.Array, jax.Array],
    key: jax.Array | None,
) -> tuple[jax.Array, Any]:
    """The output of local attention, [B, T, D], and its new cache (None without a state)."""
    q, k, v = (linear(weights[name], x) for name in ("query", "key", "value"))
    q = constrain(q, ("batch", "seq", "heads", "kv"))  # k and v have few heads, which are not sharded
    q, k = rotate(q, angles), rotate(k, angles)  # the angles rotate only the first half of each head
    kv, (k, v) = window_cache.append_and_read(kv, (k, v), context)
    x = attention(
        q, k, v, context.mask, dropout=cfg.attention_dropout, key=key, implementation=cfg.attention_implementation
    )
    return linear(weights["output"], x, num_input_axes=2), kv


logits = heads.decoder_logits
pool = heads.pool_last_token


def lru_width(cfg: Config) -> int:
    """The width of the RG-LRU."""
    return cfg.embed_dim if cfg.lru_width is None else cfg.lru_width


def embedding_multiplier(cfg: Config) -> float:
    """The factor by which token embeddings are multiplied before the first layer; ``apply`` rounds it to bfloat16."""
    return cfg.embed_dim**0.5


def specs(cfg: Config) -> dict[str, Any]:
    """The specs of all parameters, with the initial values of the RecurrentGemma authors' code."""
    D, F, H, G, W = cfg.embed_dim, cfg.mlp_dim, cfg.num_heads, cfg.num_kv_heads, lru_width(cfg)
    K, normal = D // H, Normal(D**-0.5)
    attention_output_init, lru_output_init, mlp_output_init = (
        Normal((2.0 / cfg.num_layers / width) ** 0.5) for width in (D, W, F)
    )
    norm = rms_norm_specs(D, minus_one=True)
    recurrent = {
        "gate": linear_specs((D, W), ("embed", "mlp"), normal),
        "input": linear_specs((D, W), ("embed", "mlp"), normal),
        "convolution": depthwise_convolution_specs((cfg.conv_width, W), ("mlp",), Normal(0.1 * cfg.conv_width**-0.5)),
        "rg_lru": rg_lru_specs(W, H),
        "output": linear_specs((W, D), ("mlp", "embed"), lru_output_init),
    }
    attention = {
        "query": linear_specs((D, H, K), ("embed", "heads", "kv"), normal, bias=False),
        "key": linear_specs((D, G, K), ("embed", None, "kv"), normal, bias=False),
        "value": linear_specs((D, G, K), ("embed", None, "kv"), normal, bias=False),
        "output": linear_specs((H, K, D), ("heads", "kv", "embed"), attention_output_init, num_input_axes=2),
    }
    mlp = {
        "gate": linear_specs((D, F), ("embed", "mlp"), normal),
        "up": linear_specs((D, F), ("embed", "mlp"), normal),
        "down": linear_specs((F, D), ("mlp", "embed"), mlp_output_init),
    }
    shared = {"mixer_norm": norm, "mlp_norm": norm, "mlp": mlp}
    specs_of = {"recurrent": {"recurrent": recurrent, **shared}, "attention": {"attention": attention, **shared}}
    layers = common.layers_of_kinds(cfg, specs_of)
    return heads.decoder_specs(cfg, layers, norm, normal)


def state_specs(cfg: Config, batch: int, length: int) -> dict[str, Any]:
    """The specs of the state of ``batch`` rows. The state has the same size for every ``length``.

    A recurrent block has the state of its RG-LRU (``hidden``) and the last inputs of its convolution (``tail``). An
    attention block has the keys and values of the last ``window`` tokens. The state also has ``segment_ids`` (of
    the last ``conv_width - 1`` real tokens), ``num_tokens`` and ``document_start`` (``window_cache``).
    """
    dtype, W, head_dim = jnp.dtype(cfg.dtype), lru_width(cfg), cfg.embed_dim // cfg.num_heads
    specs_of = {
        "recurrent": {
            "tail": window.tail_specs(batch, cfg.conv_width - 1, W, dtype),
            "hidden": ArraySpec((batch, W), ("batch", "mlp")),
        },
        "attention": window_cache.layer_specs(batch, cfg.window, cfg.num_kv_heads, head_dim, dtype),
    }
    return {
        "layers": common.layers_of_kinds(cfg, specs_of),
        "segment_ids": past_segment_specs(batch, cfg.conv_width - 1),
        **window_cache.token_count_specs(batch),
    }


carried_state_length = common.fixed_size_state_length


VARIANTS = {
    "recurrentgemma-2b": Config(),
    "recurrentgemma-9b": Config(num_layers=38, num_heads=16, embed_dim=4096, mlp_dim=12288),
    "griffin-tiny": Config(
        vocab_size=128, num_layers=4, num_heads=4, embed_dim=32, lru_width=48, mlp_dim=48, window=6
    ),
}  # fmt: skip
