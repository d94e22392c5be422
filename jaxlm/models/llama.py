"""Llama (Touvron et al. 2023) and models with similar architectures: Mistral, Mixtral, Qwen2, Qwen3, SmolLM, Gemma 3.

A Llama is a causal transformer with pre-norm blocks, RMS norm, rotary positions, grouped-query attention, a SwiGLU MLP
and no biases. Mistral (Jiang et al. 2023) adds a sliding window; Qwen2 (Yang et al. 2024) adds biases to queries, keys
and values; Qwen3 (Yang et al. 2025) adds an RMS norm of each query and key. Mixtral (Jiang et al. 2024) and Qwen3-MoE
have a mixture of experts (SwiGLU MLPs) instead of the MLP. In SmolLM3, every fourth layer has no rotary positions. In
Gemma 3 (Gemma team 2025), five of six layers have a window, and the blocks differ from those of Llama
(``block="gemma"``).

Shapes: B batch, T time, D model width, H query heads, G key-value heads, K head width.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxlm import spec
from jaxlm.models import common, experts, heads
from jaxlm.nn.activation import activation
from jaxlm.nn.attention import Implementation, attention, cache
from jaxlm.nn.attention.rotary import RotaryScaling, rotary_angles, rotate
from jaxlm.nn.embedding import embed
from jaxlm.nn.experts import RouterStatistics
from jaxlm.nn.linear import linear, linear_specs
from jaxlm.nn.norm import rms_norm, rms_norm_specs
from jaxlm.nn.token_layout import move_padding_last
from jaxlm.sharding import constrain
from jaxlm.spec import ArraySpec, Normal, Params, State, fold_in_name

Block = Literal["llama", "gemma"]
LayerKind = Literal["full", "window", "no_positions"]


@dataclasses.dataclass(frozen=True)
class Config(experts.ExpertsConfig):
    """Shape and behavior of a Llama. The defaults are Llama 1 with 6.7B parameters."""

    vocab_size: int = 32000
    """Number of token ids."""
    max_positions: int = 2048
    """Maximum length of a sequence. No parameter depends on this field, so you may raise it, but published models were
    not trained on longer sequences. With dynamic rotary scaling, another value may change all outputs."""
    num_layers: int = 32
    """Number of blocks."""
    num_heads: int = 32
    """Query heads of each block."""
    num_kv_heads: int | None = None
    """Key-value heads, each shared by num_heads / num_kv_heads query heads; None means num_heads."""
    head_dim: int | None = None
    """Width of a head; None means embed_dim / num_heads."""
    embed_dim: int = 4096
    """Model width."""
    mlp_dim: int = 11008
    """Hidden width of the MLP."""
    qkv_bias: bool = False
    """Whether queries, keys and values have biases (Qwen2)."""
    qk_norm: bool = False
    """Whether an RMS norm is applied to each query and key, before rotary positions (Qwen3)."""
    window: int | None = None
    """Number of tokens that a token attends to in layers with a window, itself included (Mistral, Qwen2, Qwen3,
    Gemma 3); None means that no layer has a window."""
    pattern: tuple[LayerKind, ...] | None = None
    """Kinds of attention of the first layers: full (to all earlier tokens), window (to the tokens in the window; Qwen2,
    Qwen3, Gemma 3), or no_positions (to all earlier tokens, without rotary positions; SmolLM3). The other layers repeat
    the pattern. None: all layers are of kind window if the field ``window`` is set, and otherwise of kind full."""
    window_rotary_base: float | None = None
    """Base of rotary positions in layers with a window, without scaling (Gemma 3); None means ``rotary_base`` with
    ``rotary_scaling``."""
    attention_scale: float | None = None
    """Factor of the attention scores; None means 1 / sqrt(head width)."""
    block: Block = "llama"
    """Kind of the blocks. gemma: norms also on the outputs of attention and MLP, tanh-GELU instead of SiLU, norms whose
    parameter is the scale minus one, and token embeddings multiplied by sqrt(embed_dim)."""
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
    attention_dropout: float = 0.0
    """Dropout rate on attention probabilities."""
    attention_implementation: Implementation | None = None
    """Name of the attention implementation; None selects one for the device and the shapes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block == "gemma":
            common.check_values(self, "block='gemma'", num_experts=None)
        _check_pattern(self)
        if self.head_dim is None and self.embed_dim % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} does not divide embed_dim={self.embed_dim}: set head_dim")
        common.check_divides(self, "num_kv_heads", "num_heads")
        head_dim = head_sizes(self)[2]
        if head_dim % 2:
            raise ValueError(
                f"the head width {head_dim} is odd, but rotary positions rotate pairs: set an even head_dim"
            )


def apply(
    cfg: Config, params: Params, tokens: jax.Array, *, state: State | None = None,
    segment_ids: jax.Array | None = None, positions: jax.Array | None = None, key: jax.Array | None = None,
) -> tuple[jax.Array, State | None]:  # fmt: skip
    """The hidden states after the final norm, [B, T, D], and the new state (None without a state).

    Args:
        tokens: [B, T] integer ids. An id outside the vocabulary gives NaN, also for other tokens of the row.
        state: key-value cache of the tokens before ``tokens`` (``state_specs``). A row whose tokens do not fit into the
            cache gives NaN.
        segment_ids: [B, T] int32, 0 for padding and n for document n. Documents do not interact. Default: one document.
        positions: [B, T] int32. Default: the position within the document.
        key: random key for dropout; None: no dropout.

    Raises:
        ValueError: the inputs are not integers of the same shape; T exceeds ``max_positions``, and neither segment ids
            nor positions are given; or T exceeds the number of slots in the state.
    """
    hidden, state, _ = apply_with_routing(
        cfg, params, tokens, state=state, segment_ids=segment_ids, positions=positions, key=key
    )
    return hidden, state


def apply_with_routing(
    cfg: Config, params: Params, tokens: jax.Array, *, state: State | None = None,
    segment_ids: jax.Array | None = None, positions: jax.Array | None = None, key: jax.Array | None = None,
    added_embeddings: jax.Array | None = None,
) -> tuple[jax.Array, State | None, RouterStatistics | None]:  # fmt: skip
    """The results of :func:`apply`, and the router statistics of layers with experts, stacked (None: no experts).

    ``added_embeddings`` [B, T, D] are added to the token embeddings.
    """
    common.check_tokens(tokens, segment_ids, positions, cfg.max_positions)
    layout = None
    if state is None and cfg.window is not None and segment_ids is not None:
        # Without a cache, the window counts indices. So padding must not be between the tokens of a document.
        tokens, layout = move_padding_last(tokens, segment_ids, None)
        segment_ids = layout.segment_ids
        positions, added_embeddings = (layout.reorder(x) for x in (positions, added_embeddings))
    context, state = cache.make_context(tokens, state, segment_ids, positions)
    is_gemma, kinds = cfg.block == "gemma", layer_kinds(cfg)
    # The order of a set differs between processes, but all processes must trace the same program.
    attention_inputs = {kind: _attention_inputs(cfg, kind, context, state) for kind in dict.fromkeys(kinds)}

    x = embed(params["token_embedding"], tokens, jnp.dtype(cfg.dtype), size=cfg.vocab_size) * embedding_multiplier(cfg)
    x = constrain(x if added_embeddings is None else x + added_embeddings, ("batch", "seq", "activation_embed"))

    def norm(weights: Params, x: jax.Array) -> jax.Array:
        return rms_norm(weights, x, cfg.norm_epsilon)

    def block(kind: LayerKind, x: jax.Array, layer: Any) -> tuple[jax.Array, Any, RouterStatistics | None]:
        weights, kv, layer_key = layer
        normed = norm(weights["attention_norm"], x)
        y, kv = _attention(cfg, weights["attention"], normed, kv, *attention_inputs[kind], layer_key)
        y = norm(weights["attention_output_norm"], y) if is_gemma else y
        x = constrain(x + y, ("batch", "seq", "activation_embed"))
        gate = activation("gelu_tanh") if is_gemma else jax.nn.silu
        y, statistics = experts.mlp(cfg, weights, norm(weights["mlp_norm"], x), segment_ids, gate)
        y = norm(weights["mlp_output_norm"], y) if is_gemma else y
        return constrain(x + y, ("batch", "seq", "activation_embed")), kv, statistics

    blocks = {kind: functools.partial(block, kind) for kind in set(kinds)}
    kv = None if state is None else state["layers"]
    x, kv, statistics = common.run_layers_with_outputs(
        tuple(blocks[kind] for kind in kinds), x, params["layers"], kv, key, remat=cfg.remat, num_layers=cfg.num_layers,
        in_place=cache.updates_in_place(state, tokens.shape[1]),
    )  # fmt: skip
    x = norm(params["final_norm"], x)
    x = x if layout is None else layout.restore(x)
    return *common.decoder_outputs(x, kv, context, state), statistics


def _attention(
    cfg: Config,
    weights: Params,
    x: jax.Array,
    kv: Any,
    context: cache.CacheContext,
    angles: tuple[jax.Array, jax.Array] | None,
    key: jax.Array | None,
) -> tuple[jax.Array, Any]:
    q, k, v = common.project_heads(weights, x, "query", "key", "value")
    if cfg.qk_norm:
        q, k = (rms_norm(weights[f"{name}_norm"], y, cfg.norm_epsilon) for name, y in (("query", q), ("key", k)))
    if angles is not None:
        q, k = rotate(q, angles), rotate(k, angles)
    kv, (k, v) = cache.append_and_read(kv, (k, v), context)
    x = attention(
        q, k, v, context.mask, scale=cfg.attention_scale, dropout=cfg.attention_dropout,
        key=fold_in_name(key, "attention"), implementation=cfg.attention_implementation,
    )  # fmt: skip
    return linear(weights["output"], x, num_input_axes=2), kv


def _attention_inputs(
    cfg: Config, kind: LayerKind, context: cache.CacheContext, state: State | None
) -> tuple[cache.CacheContext, tuple[jax.Array, jax.Array] | None]:
    """For layers of one kind: the context with their attention mask, and the rotary angles (None for no_positions)."""
    base, scaling = cfg.rotary_base, cfg.rotary_scaling
    if kind == "window":
        assert cfg.window is not None
        context = cache.with_window(context, cfg.window, state)
        if cfg.window_rotary_base is not None:
            base, scaling = cfg.window_rotary_base, None
    if kind == "no_positions":
        return context, None
    return context, rotary_angles(context.positions, head_sizes(cfg)[2], base, scaling, cfg.max_positions)


logits = heads.decoder_logits
pool = heads.pool_last_token


def head_sizes(cfg: Config) -> tuple[int, int, int]:
    """The number of query heads, the number of key-value heads, and the width of a head."""
    kv_heads = cfg.num_heads if cfg.num_kv_heads is None else cfg.num_kv_heads
    return cfg.num_heads, kv_heads, cfg.embed_dim // cfg.num_heads if cfg.head_dim is None else cfg.head_dim


def layer_kinds(cfg: Config) -> tuple[LayerKind, ...]:
    """The kind of attention of each layer."""
    if cfg.pattern is None:
        return ("full" if cfg.window is None else "window",) * cfg.num_layers
    return common.layer_kinds(cfg)


def _check_pattern(cfg: Config) -> None:
    if cfg.pattern is not None:
        common.check_pattern(cfg)
    kinds = set(layer_kinds(cfg))
    if ("window" in kinds) != (cfg.window is not None):
        raise ValueError(
            f"window={cfg.window} and pattern={cfg.pattern} contradict each other: set window if and only if at least "
            f"one of the num_layers={cfg.num_layers} layers has the kind 'window'"
        )
    if cfg.window_rotary_base is not None and "window" not in kinds:
        raise ValueError(f"window_rotary_base={cfg.window_rotary_base} needs layers with a window")


def embedding_multiplier(cfg: Config) -> float:
    """The factor by which token embeddings are multiplied before the first layer."""
    return cfg.embed_dim**0.5 if cfg.block == "gemma" else 1.0


def specs(cfg: Config) -> dict[str, Any]:
    """The specs of all parameters."""
    D, (H, G, K) = cfg.embed_dim, head_sizes(cfg)
    normal, is_gemma = Normal(cfg.init_stddev), cfg.block == "gemma"
    norm, head_norm = (rms_norm_specs(width, minus_one=is_gemma) for width in (D, K))
    block = {
        "attention_norm": norm,
        "attention": {
            "query": linear_specs((D, H, K), ("embed", "heads", "kv"), normal, bias=cfg.qkv_bias),
            "key": linear_specs((D, G, K), ("embed", "heads", "kv"), normal, bias=cfg.qkv_bias),
            "value": linear_specs((D, G, K), ("embed", "heads", "kv"), normal, bias=cfg.qkv_bias),
            "output": linear_specs((H, K, D), ("heads", "kv", "embed"), normal, num_input_axes=2, bias=False),
            **({"query_norm": head_norm, "key_norm": head_norm} if cfg.qk_norm else {}),
        },
        "mlp_norm": norm,
        **({"attention_output_norm": norm, "mlp_output_norm": norm} if is_gemma else {}),
    }
    layers = ({**block, **experts.mlp_specs(cfg, layer, normal)} for layer in range(cfg.num_layers))
    return heads.decoder_specs(cfg, spec.layers(layers, stacked=cfg.scan_layers), norm, normal)


def state_specs(cfg: Config, batch: int, length: int) -> dict[str, ArraySpec]:
    """The specs of the key-value cache of ``batch`` rows of at most ``length`` tokens each, padding included."""
    shape = cfg.num_layers, batch, length, *head_sizes(cfg)[1:]
    return cache.cache_specs(*shape, jnp.dtype(cfg.dtype), stacked=cfg.scan_layers)


rollback = cache.rollback


_TINY = Config(vocab_size=128, max_positions=64, num_layers=2, num_heads=4, num_kv_heads=2, embed_dim=32, mlp_dim=48)
VARIANTS = {
    "llama-2-7b": Config(max_positions=4096, norm_epsilon=1e-5),
    "llama-3-8b": Config(
        vocab_size=128256, max_positions=8192, num_kv_heads=8, mlp_dim=14336, rotary_base=500000.0, norm_epsilon=1e-5
    ),
    "llama-3.2-1b": Config(
        vocab_size=128256, max_positions=131072, num_layers=16, num_kv_heads=8, embed_dim=2048, mlp_dim=8192,
        rotary_base=500000.0, rotary_scaling=RotaryScaling("llama3", 32.0, original_positions=8192),
        norm_epsilon=1e-5, tie_embeddings=True,
    ),
    "mixtral-8x7b": Config(
        max_positions=32768, num_kv_heads=8, mlp_dim=14336, num_experts=8, rotary_base=1e6, norm_epsilon=1e-5
    ),
    "mistral-7b": Config(max_positions=32768, num_kv_heads=8, mlp_dim=14336, window=4096, norm_epsilon=1e-5),
    "qwen2-0.5b": Config(
        vocab_size=151936, max_positions=131072, num_layers=24, num_heads=14, num_kv_heads=2, embed_dim=896,
        mlp_dim=4864, qkv_bias=True, rotary_base=1e6, tie_embeddings=True,
    ),
    "qwen3-0.6b": Config(
        vocab_size=151936, max_positions=40960, num_layers=28, num_heads=16, num_kv_heads=8, head_dim=128,
        embed_dim=1024, mlp_dim=3072, qk_norm=True, rotary_base=1e6, tie_embeddings=True,
    ),
    "qwen3-30b-a3b": Config(
        vocab_size=151936, max_positions=40960, num_layers=48, num_heads=32, num_kv_heads=4, head_dim=128,
        embed_dim=2048, mlp_dim=6144, qk_norm=True, rotary_base=1e6, num_experts=128, experts_per_token=8,
        expert_dim=768,
    ),
    "gemma-3-1b": Config(
        vocab_size=262144, max_positions=32768, num_layers=26, num_heads=4, num_kv_heads=1, head_dim=256,
        embed_dim=1152, mlp_dim=6912, qk_norm=True, window=512, pattern=("window",) * 5 + ("full",), rotary_base=1e6,
        window_rotary_base=10000.0, block="gemma", tie_embeddings=True,
    ),
    "smollm2-135m": Config(
        vocab_size=49152, max_positions=8192, num_layers=30, num_heads=9, num_kv_heads=3, embed_dim=576, mlp_dim=1536,
        rotary_base=100000.0, norm_epsilon=1e-5, init_stddev=1 / 24, tie_embeddings=True,
    ),
    "smollm2-360m": Config(
        vocab_size=49152, max_positions=8192, num_layers=32, num_heads=15, num_kv_heads=5, embed_dim=960, mlp_dim=2560,
        rotary_base=100000.0, norm_epsilon=1e-5, tie_embeddings=True,
    ),
    "smollm3-3b": Config(
        vocab_size=128256, max_positions=65536, num_layers=36, num_heads=16, num_kv_heads=4, embed_dim=2048,
        mlp_dim=11008, pattern=("full",) * 3 + ("no_positions",), rotary_base=5e6, tie_embeddings=True,
    ),
    "llama-tiny": _TINY,
    "gemma-3-tiny": dataclasses.replace(
        _TINY, head_dim=8, qk_norm=True, window=8, pattern=("window", "full"), window_rotary_base=100.0, block="gemma",
        tie_embeddings=True,
    ),
    "mixtral-tiny": dataclasses.replace(_TINY, num_experts=4),
}  # fmt: skip
