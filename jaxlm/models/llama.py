"""Llama (Touvron et al. 2023) and the families of its shape: Mistral, Qwen2, SmolLM.

A causal transformer with pre-norm blocks, RMS norm, rotary positions, grouped-query attention, a SwiGLU MLP and no
biases. Mistral (Jiang et al. 2023) adds a sliding window, Qwen2 (Yang et al. 2024) biases of queries, keys and values.

Legend: B batch, T time, S slots of the cache, D model width, H query heads, G heads of keys and values, K head width,
F hidden width of the MLP, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from jaxlm import spec
from jaxlm.models import common, files, heads
from jaxlm.nn import cache
from jaxlm.nn.attention import Implementation, attention
from jaxlm.nn.embedding import embed, padded, unembed
from jaxlm.nn.linear import linear, linear_specs
from jaxlm.nn.mask import Mask
from jaxlm.nn.norm import rms_norm, rms_norm_specs
from jaxlm.nn.rotary import Kind, RotaryScaling, rotary_angles, rotate
from jaxlm.sharding import constrain
from jaxlm.spec import ArraySpec, Normal, fold_name

Task = Literal["causal", "classification", "tagging", "span_qa", "none"]


@dataclasses.dataclass(frozen=True)
class Config:
    """Shape and behaviour of a Llama. The defaults are the first one's, 6.7B parameters."""

    vocab_size: int = 32000
    """Number of token ids."""
    max_positions: int = 2048
    """Longest sequence. No parameter depends on it, so it may be raised; whether the model copes is another matter."""
    num_layers: int = 32
    """Number of blocks."""
    num_heads: int = 32
    """Query heads of each block."""
    num_kv_heads: int | None = None
    """Heads of keys and values, each read by num_heads / num_kv_heads query heads; None means num_heads."""
    head_dim: int | None = None
    """Width of a head; None means embed_dim / num_heads."""
    embed_dim: int = 4096
    """Model width."""
    mlp_dim: int = 11008
    """Hidden width of the MLP."""
    qkv_bias: bool = False
    """Whether queries, keys and values have biases (Qwen2)."""
    window: int | None = None
    """A token sees only this many tokens, itself included (Mistral); None means all before it."""
    rotary_base: float = 10000.0
    """Base of the frequencies of rotary positions."""
    rotary_scaling: RotaryScaling | None = None
    """How rotary positions are stretched beyond the lengths of the first training; None means not at all."""
    norm_epsilon: float = 1e-6
    """Added to the mean square in RMS norms."""
    init_stddev: float = 0.02
    """Standard deviation of initial weights."""
    tie_embeddings: bool = False
    """Use the token table as output head."""
    task: Task = "causal"
    """What the model is for, and so its head: the next token, a label for the text or each token, a span, or none."""
    num_labels: int = 2
    """Number of labels, where the task is classification or tagging."""
    attention_dropout: float = 0.0
    """Dropout rate on attention probabilities, while training."""
    vocab_multiple: int = 1
    """Pad the token table to a multiple of this many rows, so that it divides over devices."""
    dtype: common.ComputeDtype = "float32"
    """Compute dtype of activations; parameters keep their own."""
    remat: common.Remat = "dots"
    """What the backward pass recomputes: nothing, all but matmuls and attention (dots), or every block (full)."""
    scan_layers: bool = True
    """Loop over layers in one compiled body; False unrolls them."""
    attention_implementation: Implementation | None = None
    """Named attention implementation; None picks the best for the device and shape."""

    def __post_init__(self) -> None:
        common.check_positive(
            self, "vocab_size", "max_positions", "num_layers", "num_heads", "embed_dim", "mlp_dim", "num_labels",
            "vocab_multiple",
        )  # fmt: skip
        optional = [name for name in ("num_kv_heads", "head_dim", "window") if getattr(self, name) is not None]
        common.check_positive(self, *optional)
        common.check_rates(self, "attention_dropout")
        common.check_choices(
            self, task=get_args(Task), dtype=get_args(common.ComputeDtype), remat=get_args(common.Remat),
            attention_implementation=(None, *get_args(Implementation)),
        )  # fmt: skip
        if self.head_dim is None and self.embed_dim % self.num_heads:
            raise ValueError(
                f"num_heads={self.num_heads} does not divide embed_dim={self.embed_dim}: change one of them, or set "
                "head_dim"
            )
        _, kv_heads, width = _heads(self)
        if self.num_heads % kv_heads:
            raise ValueError(f"num_kv_heads={kv_heads} does not divide num_heads={self.num_heads}: change one of them")
        if width % 2:
            raise ValueError(f"a head width of {width} is odd, rotary positions turn pairs: change head_dim")


def _heads(cfg: Config) -> tuple[int, int, int]:
    """Query heads, heads of keys and values, and their width."""
    kv_heads = cfg.num_heads if cfg.num_kv_heads is None else cfg.num_kv_heads
    return cfg.num_heads, kv_heads, cfg.embed_dim // cfg.num_heads if cfg.head_dim is None else cfg.head_dim


def specs(cfg: Config) -> dict[str, Any]:
    """Every parameter of the model."""
    D, F, (H, G, K) = cfg.embed_dim, cfg.mlp_dim, _heads(cfg)
    V = padded(cfg.vocab_size, cfg.vocab_multiple)
    normal = Normal(cfg.init_stddev)
    block = {
        "attention_norm": rms_norm_specs(D),
        "attention": {
            "query": linear_specs((D, H, K), ("embed", "heads", "kv"), normal, bias=cfg.qkv_bias),
            "key": linear_specs((D, G, K), ("embed", "heads", "kv"), normal, bias=cfg.qkv_bias),
            "value": linear_specs((D, G, K), ("embed", "heads", "kv"), normal, bias=cfg.qkv_bias),
            "output": linear_specs((H, K, D), ("heads", "kv", "embed"), normal, inputs=2, bias=False),
        },
        "mlp_norm": rms_norm_specs(D),
        "mlp": {
            "gate": linear_specs((D, F), ("embed", "mlp"), normal, bias=False),
            "up": linear_specs((D, F), ("embed", "mlp"), normal, bias=False),
            "down": linear_specs((F, D), ("mlp", "embed"), normal, bias=False),
        },
    }
    tree = {
        "token_embedding": ArraySpec((V, D), ("vocab", "embed"), normal, decay=True),
        "layers": spec.stack(cfg.num_layers, block),
        "final_norm": rms_norm_specs(D),
        **heads.head_specs(cfg.task, D, cfg.num_labels, normal, bias=cfg.task != "classification"),
    }
    if cfg.task == "causal" and not cfg.tie_embeddings:
        tree["head"] = ArraySpec((V, D), ("vocab", "embed"), normal, decay=True)
    return tree


def state_specs(cfg: Config, batch: int, length: int) -> dict[str, ArraySpec]:
    """The key-value cache of ``batch`` rows of at most ``length`` tokens each, padding included."""
    if length > cfg.max_positions:
        raise ValueError(
            f"a state of {length} tokens exceeds max_positions={cfg.max_positions}: shorten prompt or output"
        )
    _, kv_heads, width = _heads(cfg)
    return cache.cache_specs(cfg.num_layers, batch, length, kv_heads, width, jnp.dtype(cfg.dtype))


def apply(
    cfg: Config,
    params: dict[str, Any],
    tokens: jax.Array,
    *,
    state: Any = None,
    segment_ids: jax.Array | None = None,
    positions: jax.Array | None = None,
    key: jax.Array | None = None,
) -> tuple[jax.Array, Any]:
    """Hidden states after the final norm, [B, T, D], and the new state (None without one).

    Args:
        tokens: [B, T] integer ids. An id outside the vocabulary gives NaN.
        state: from ``state_specs``; the tokens then continue what it holds. A row that runs past the end of its state
            gives NaN.
        segment_ids: [B, T] int32, 0 padding, 1.. documents that do not see each other. Default: one document.
        positions: [B, T] int32. Default: the place within the document.
        key: random key for dropout; None is deterministic.
    """
    common.check_tokens(tokens, segment_ids, positions, cfg.max_positions)
    place, state = cache.span(tokens, state, segment_ids, positions)
    mask = place.mask if cfg.window is None else _windowed(place.mask, cfg.window, state)
    angles = rotary_angles(place.positions, _heads(cfg)[2], cfg.rotary_base, cfg.rotary_scaling, cfg.max_positions)

    x = embed(params["token_embedding"], tokens, jnp.dtype(cfg.dtype))
    x = constrain(x, ("batch", "seq", "activation_embed"))

    def block(x: jax.Array, layer: Any) -> tuple[jax.Array, Any]:
        weights, kv, layer_key = layer
        attended, kv = _attention(cfg, weights, x, kv, place, mask, angles, layer_key)
        x = constrain(x + attended, ("batch", "seq", "activation_embed"))
        x = x + _mlp(cfg, weights, x)
        return constrain(x, ("batch", "seq", "activation_embed")), kv

    kv = None if state is None else state["layers"]
    x, kv = common.scan_layers(
        block, x, params["layers"], kv, key, count=cfg.num_layers, remat=cfg.remat, unroll=not cfg.scan_layers,
        in_place=cache.stays_in_place(state, tokens.shape[1]),
    )  # fmt: skip
    x = rms_norm(params["final_norm"], x, cfg.norm_epsilon)
    if state is None:
        return x, None
    assert place.valid_B is not None
    x = jnp.where(place.valid_B[:, None, None], x, jnp.nan)
    return x, {**state, "layers": kv}


def _windowed(mask: Mask, window: int, state: Any) -> Mask:
    """The mask with a window that counts real tokens only: a cache also holds the pads of earlier calls."""
    if state is None:
        return dataclasses.replace(mask, window=window)
    count_BS = jnp.cumsum(state["segment_ids"] > 0, axis=1, dtype=jnp.int32)
    query_order = jnp.take_along_axis(count_BS, mask.query_order, axis=1)
    return dataclasses.replace(mask, window=window, query_order=query_order, key_order=count_BS)


def _attention(
    cfg: Config,
    weights: dict[str, Any],
    x: jax.Array,
    kv: Any,
    place: cache.Span,
    mask: Mask,
    angles: tuple[jax.Array, jax.Array],
    key: jax.Array | None,
) -> tuple[jax.Array, Any]:
    normal = rms_norm(weights["attention_norm"], x, cfg.norm_epsilon)
    q, k, v = (
        constrain(linear(weights["attention"][name], normal), ("batch", "seq", "heads", "kv"))
        for name in ("query", "key", "value")
    )
    q, k = rotate(q, angles), rotate(k, angles)
    kv, (k, v) = cache.extended(kv, (k, v), place)
    mixed = attention(
        q, k, v, mask, dropout=cfg.attention_dropout, key=fold_name(key, "attention"),
        implementation=cfg.attention_implementation,
    )  # fmt: skip
    return linear(weights["attention"]["output"], mixed, inputs=2), kv


def _mlp(cfg: Config, weights: dict[str, Any], x: jax.Array) -> jax.Array:
    normal = rms_norm(weights["mlp_norm"], x, cfg.norm_epsilon)
    gate, up = (constrain(linear(weights["mlp"][name], normal), ("batch", "seq", "mlp")) for name in ("gate", "up"))
    return linear(weights["mlp"]["down"], jax.nn.silu(gate) * up)


def logits(cfg: Config, params: dict[str, Any], hidden: jax.Array) -> jax.Array:
    """What the head of the task says, float32: of the next token [B, T, V] (V padded to ``vocab_multiple``), or of the
    labels (``heads.head_logits``; classification reads :func:`summary`)."""
    if cfg.task != "causal":
        return heads.head_logits(cfg.task, params, hidden)
    table = params["token_embedding"] if cfg.tie_embeddings else params["head"]
    return constrain(unembed(table, hidden, cfg.vocab_size), ("batch", None, "vocab"))


def summary(
    cfg: Config,
    params: dict[str, Any],
    hidden: jax.Array,
    segment_ids: jax.Array | None = None,
    key: jax.Array | None = None,
) -> jax.Array:
    """What the classifier reads: the hidden state of each row's last real token, [B, 1, D]."""
    return heads.last_real(hidden, segment_ids)


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
    "mistral-7b": Config(max_positions=32768, num_kv_heads=8, mlp_dim=14336, window=4096, norm_epsilon=1e-5),
    "qwen2-0.5b": Config(
        vocab_size=151936, max_positions=131072, num_layers=24, num_heads=14, num_kv_heads=2, embed_dim=896,
        mlp_dim=4864, qkv_bias=True, rotary_base=1e6, tie_embeddings=True,
    ),
    "smollm2-135m": Config(
        vocab_size=49152, max_positions=8192, num_layers=30, num_heads=9, num_kv_heads=3, embed_dim=576, mlp_dim=1536,
        rotary_base=100000.0, norm_epsilon=1e-5, init_stddev=1 / 24, tie_embeddings=True,
    ),
    "smollm2-360m": Config(
        vocab_size=49152, max_positions=8192, num_layers=32, num_heads=15, num_kv_heads=5, embed_dim=960, mlp_dim=2560,
        rotary_base=100000.0, norm_epsilon=1e-5, tie_embeddings=True,
    ),
    "llama-tiny": Config(
        vocab_size=128, max_positions=64, num_layers=2, num_heads=4, num_kv_heads=2, embed_dim=32, mlp_dim=48
    ),
}  # fmt: skip


# ------------------------------------------------------------------------------------------ Hugging Face files

_SCALING = {  # field of RotaryScaling: what they call it, and the kinds that have it
    "factor": ("factor", get_args(Kind)),
    "original_positions": ("original_max_position_embeddings", ("llama3", "yarn")),
    "low_frequency_factor": ("low_freq_factor", ("llama3",)),
    "high_frequency_factor": ("high_freq_factor", ("llama3",)),
    "fast_turns": ("beta_fast", ("yarn",)),
    "slow_turns": ("beta_slow", ("yarn",)),
    "whole_pairs": ("truncate", ("yarn",)),
    "magnitude": ("attention_factor", ("yarn",)),
}


def _read_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "num_kv_heads": _whole(config, "num_key_value_heads"),
        "head_dim": _whole(config, "head_dim"),
    }
    theirs = {**(config.get("rope_parameters") or config.get("rope_scaling") or {})}
    if "rope_theta" in theirs:  # transformers 5 keeps it here
        fields["rotary_base"] = theirs.pop("rope_theta")
    older = theirs.pop("type", "default")
    kind = theirs.pop("rope_type", older)
    if kind == "default":
        return fields
    if kind == "dynamic":
        theirs.pop("original_max_position_embeddings", None)  # which they do not read
    if kind not in get_args(Kind):
        raise ValueError(f"rope_type={kind!r} is not supported: choose from default, {', '.join(get_args(Kind))}")
    words = {word: field for field, (word, kinds) in _SCALING.items() if kind in kinds}
    for word, value in theirs.items():
        if word not in words or isinstance(value, str):
            raise ValueError(
                f"{word}={value!r} of {kind} rope_scaling is not supported: it may hold {', '.join(words)}"
            )
    scaling = {words[word]: value for word, value in theirs.items() if value is not None}
    if "factor" not in scaling:
        raise ValueError(f"rope_scaling of type {kind} lacks its factor")
    if kind in ("dynamic", "yarn"):
        scaling.setdefault("original_positions", config.get("max_position_embeddings"))
    return {**fields, "rotary_scaling": RotaryScaling(kind, **scaling)}


def _write_fields(cfg: Config) -> dict[str, Any]:
    fields: dict[str, Any] = {"num_key_value_heads": _heads(cfg)[1]}
    if cfg.head_dim is not None:
        fields["head_dim"] = cfg.head_dim
    scaling = cfg.rotary_scaling
    if scaling is None:
        return fields
    if scaling.kind == "dynamic" and scaling.original_positions != cfg.max_positions:
        raise ValueError(
            f"dynamic rotary scaling from {scaling.original_positions} to max_positions={cfg.max_positions} has no "
            "counterpart in files, whose readers choose the base anew for each text"
        )
    words = {word: getattr(scaling, field) for field, (word, kinds) in _SCALING.items() if scaling.kind in kinds}
    words = {word: value for word, value in words.items() if value is not None}
    return {**fields, "rope_scaling": {"rope_type": scaling.kind, **words}}


def _read_mistral(config: Mapping[str, Any]) -> dict[str, Any]:
    config = {"num_key_value_heads": 8, "sliding_window": 4096, **config}  # their defaults, unlike Llama's
    return {**_read_fields(config), "window": _whole(config, "sliding_window")}


def _write_mistral(cfg: Config) -> dict[str, Any]:
    return {**_write_fields(cfg), "sliding_window": cfg.window}


def _read_qwen2(config: Mapping[str, Any]) -> dict[str, Any]:
    window, layers = None, _whole(config, "num_hidden_layers", 32)
    if config.get("use_sliding_window", False):
        first = _whole(config, "max_window_layers", 28)
        kinds = config.get("layer_types") or ["sliding_attention" if i >= first else "" for i in range(layers)]
        windowed = kinds.count("sliding_attention")
        if 0 < windowed < layers:
            raise ValueError(f"a sliding window in {windowed} of {layers} layers is not supported: all or none")
        window = _whole(config, "sliding_window", 4096) if windowed else None
    return {**_read_fields(config), "window": window}


def _write_qwen2(cfg: Config) -> dict[str, Any]:
    # Written in both cases: what a loaded config says of its window must not outlive another choice.
    kind = "full_attention" if cfg.window is None else "sliding_attention"
    fields = {
        **_write_fields(cfg),
        "use_sliding_window": cfg.window is not None,
        "layer_types": [kind] * cfg.num_layers,
    }
    return fields if cfg.window is None else {**fields, "sliding_window": cfg.window, "max_window_layers": 0}


def _whole(config: Mapping[str, Any], name: str, default: int | None = None) -> Any:
    value = config.get(name, default)
    if value is not None and type(value) is not int:
        raise ValueError(f"{name}={value!r} is no whole number")
    return value


_LLAMA = files.Format(
    architectures={
        "LlamaForCausalLM": {"task": "causal"},
        "LlamaModel": {"task": "none"},
        "LlamaForSequenceClassification": {"task": "classification"},
        "LlamaForTokenClassification": {"task": "tagging"},
    },
    model_type="llama",
    prefix="model.",
    implied={"qkv_bias": False, "window": None},
    fields={
        "vocab_size": "vocab_size",
        "max_positions": "max_position_embeddings",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "embed_dim": "hidden_size",
        "mlp_dim": "intermediate_size",
        "rotary_base": "rope_theta",
        "norm_epsilon": "rms_norm_eps",
        "init_stddev": "initializer_range",
        "tie_embeddings": "tie_word_embeddings",
        "attention_dropout": "attention_dropout",
    },
    read_fields=_read_fields,
    write_fields=_write_fields,
    required={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
    token_ids={"bos_token_id": 1, "eos_token_id": 2},
    tensors={
        "token_embedding": "embed_tokens.weight",
        "layers/attention_norm/scale": "layers.{layer}.input_layernorm.weight",
        "layers/attention/query/weight": "layers.{layer}.self_attn.q_proj.weight",
        "layers/attention/query/bias": "layers.{layer}.self_attn.q_proj.bias",
        "layers/attention/key/weight": "layers.{layer}.self_attn.k_proj.weight",
        "layers/attention/key/bias": "layers.{layer}.self_attn.k_proj.bias",
        "layers/attention/value/weight": "layers.{layer}.self_attn.v_proj.weight",
        "layers/attention/value/bias": "layers.{layer}.self_attn.v_proj.bias",
        "layers/attention/output/weight": "layers.{layer}.self_attn.o_proj.weight",
        "layers/mlp_norm/scale": "layers.{layer}.post_attention_layernorm.weight",
        "layers/mlp/gate/weight": "layers.{layer}.mlp.gate_proj.weight",
        "layers/mlp/up/weight": "layers.{layer}.mlp.up_proj.weight",
        "layers/mlp/down/weight": "layers.{layer}.mlp.down_proj.weight",
        "final_norm/scale": "norm.weight",
    },
    head={
        "head": "lm_head.weight",
        "classifier/weight": "score.weight",
        "tagger/weight": "score.weight",
        "tagger/bias": "score.bias",
        "span/weight": "qa_outputs.weight",
        "span/bias": "qa_outputs.bias",
    },
    copies={"lm_head.weight": "token_embedding"},  # when tied
    layouts={
        **{f"layers/attention/{name}/weight": ((1, 2), (0,)) for name in ("query", "key", "value")},
        **{f"layers/attention/{name}/bias": ((0, 1),) for name in ("query", "key", "value")},
        "layers/attention/output/weight": ((2,), (0, 1)),
        **{f"layers/mlp/{name}/weight": files.TRANSPOSED for name in ("gate", "up", "down")},
        **{f"{name}/weight": files.TRANSPOSED for name in ("classifier", "tagger", "span")},
    },
    ignored=(r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),  # of old files
)
_MISTRAL = dataclasses.replace(
    _LLAMA,
    architectures={
        "MistralForCausalLM": {"task": "causal"},
        "MistralModel": {"task": "none"},
        "MistralForSequenceClassification": {"task": "classification"},
        "MistralForTokenClassification": {"task": "tagging"},
        "MistralForQuestionAnswering": {"task": "span_qa"},
    },
    model_type="mistral",
    implied={"qkv_bias": False, "mlp_dim": 14336, "max_positions": 131072},
    read_fields=_read_mistral,
    write_fields=_write_mistral,
    required={"hidden_act": "silu"},
)
_QWEN2 = dataclasses.replace(
    _LLAMA,
    architectures={
        "Qwen2ForCausalLM": {"task": "causal"},
        "Qwen2Model": {"task": "none"},
        "Qwen2ForSequenceClassification": {"task": "classification"},
        "Qwen2ForTokenClassification": {"task": "tagging"},
    },
    model_type="qwen2",
    implied={"qkv_bias": True, "vocab_size": 151936, "mlp_dim": 22016, "max_positions": 32768},
    read_fields=_read_qwen2,
    write_fields=_write_qwen2,
    required={"hidden_act": "silu"},
    token_ids={},
)


def _span_qa(table: files.Format, architecture: str) -> files.Format:
    """The table of a class of theirs that calls its base model otherwise than its siblings do."""
    return dataclasses.replace(
        table, architectures={architecture: {"task": "span_qa"}}, prefix="transformer.",
        implied={**table.implied, "task": "span_qa"},
    )  # fmt: skip


HUGGING_FACE = (
    _span_qa(_LLAMA, "LlamaForQuestionAnswering"),
    _LLAMA,
    _MISTRAL,
    _span_qa(_QWEN2, "Qwen2ForQuestionAnswering"),
    _QWEN2,
)
