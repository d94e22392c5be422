"""T5 (Raffel et al. 2020): an encoder and a decoder with RMS norms, relative position biases and no other biases.

Two published forms: v1.0 (ReLU; the token table is the head, and hidden states are scaled by ``1 / sqrt(D)`` before it)
and v1.1 (gated tanh-GELU after Shazeer 2020, a head of its own, no scale), which mT5 and FLAN-T5 share. umT5 is v1.1
with position biases of its own in every layer instead of one table per stack. Attention has no ``1 / sqrt(K)``: the
initial queries are that much smaller.

Follows Mesh TensorFlow and t5x, and not Hugging Face where they differ: the head of v1.1 starts with standard deviation
``1 / sqrt(D)``, which only concerns training from scratch.

Legend: B batch, T target time, S source time, D model width, H heads, K head width (H * K need not be D), F hidden
width of the MLP, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from jaxlm import spec
from jaxlm.models import common, files
from jaxlm.nn import cache
from jaxlm.nn.activation import activation
from jaxlm.nn.attention import attention
from jaxlm.nn.dropout import dropout
from jaxlm.nn.embedding import embed, padded, unembed
from jaxlm.nn.linear import linear, linear_specs
from jaxlm.nn.mask import Mask
from jaxlm.nn.norm import rms_norm, rms_norm_specs
from jaxlm.nn.relative import distance_term, distance_term_of_positions
from jaxlm.nn.relative_bias import distance_buckets, distance_table
from jaxlm.nn.term import Term
from jaxlm.sharding import constrain
from jaxlm.spec import ArraySpec, Normal, fold_name

Task = Literal["seq2seq", "none"]
Mlp = Literal["relu", "gated_gelu"]


@dataclasses.dataclass(frozen=True)
class Config:
    """Shape and behaviour of a T5. The defaults are the published v1.0 model of 60M parameters."""

    vocab_size: int = 32128
    """Number of token ids."""
    num_layers: int = 6
    """Number of encoder blocks."""
    num_decoder_layers: int | None = None
    """Number of decoder blocks; None means as many as the encoder has, 0 an encoder alone (task "none")."""
    num_heads: int = 8
    """Attention heads of each block."""
    embed_dim: int = 512
    """Model width."""
    head_dim: int = 64
    """Width of each head; heads times this need not be embed_dim."""
    mlp_dim: int = 2048
    """Hidden width of the MLP."""
    mlp: Mlp = "relu"
    """Form of the MLP: relu is v1.0, gated_gelu is v1.1, mT5, FLAN-T5 and umT5."""
    tie_embeddings: bool = True
    """Use the token table as output head, after a scale of 1 / sqrt(embed_dim), as v1.0 does."""
    num_buckets: int = 32
    """Rows of a table of relative position biases."""
    max_distance: int = 128
    """Distance from which on all share a bucket."""
    bias_per_layer: bool = False
    """A table of position biases in every layer (umT5), instead of one that the layers of a stack share."""
    norm_epsilon: float = 1e-6
    """Added to the mean square in RMS norms."""
    dropout: float = 0.1
    """Dropout rate while training, at every place: embeddings, attention, MLP, sublayers, outputs of both stacks."""
    decoder_start_id: int = 0
    """The token before the first target; T5 takes its padding id."""
    task: Task = "seq2seq"
    """What the head is for: seq2seq gives logits of target tokens, none has no head."""
    vocab_multiple: int = 1
    """Pad the token table to a multiple of this many rows, so that it divides over devices."""
    dtype: common.ComputeDtype = "float32"
    """Compute dtype of activations; parameters keep their own."""
    remat: common.Remat = "dots"
    """What the backward pass recomputes: nothing, all but matmuls and attention (dots), or every block (full)."""
    scan_layers: bool = True
    """Loop over layers in one compiled body; False unrolls them."""

    def __post_init__(self) -> None:
        common.check_positive(
            self, "vocab_size", "num_layers", "num_heads", "embed_dim", "head_dim", "mlp_dim", "vocab_multiple"
        )
        common.check_rates(self, "dropout")
        common.check_choices(
            self, mlp=get_args(Mlp), task=get_args(Task), dtype=get_args(common.ComputeDtype),
            remat=get_args(common.Remat),
        )  # fmt: skip
        if _decoder_layers(self) < 0:
            raise ValueError(f"num_decoder_layers={self.num_decoder_layers} must be at least 0")
        if _decoder_layers(self) == 0 and self.task != "none":
            raise ValueError(
                f"task={self.task!r} needs a decoder: set num_decoder_layers to at least 1, or task='none'"
            )
        if not 0 <= self.decoder_start_id < self.vocab_size:
            raise ValueError(
                f"decoder_start_id={self.decoder_start_id} is outside the vocabulary of {self.vocab_size} ids"
            )
        for bidirectional in (True, False):  # raises where they do not fit
            distance_buckets(self.num_buckets, self.max_distance, bidirectional=bidirectional)


def _decoder_layers(cfg: Config) -> int:
    return cfg.num_layers if cfg.num_decoder_layers is None else cfg.num_decoder_layers


def specs(cfg: Config) -> dict[str, Any]:
    """Every parameter of the model."""
    D, H, K, F = cfg.embed_dim, cfg.num_heads, cfg.head_dim, cfg.mlp_dim
    V = padded(cfg.vocab_size, cfg.vocab_multiple)
    normal = Normal(D**-0.5)

    def inward(init: Normal) -> dict[str, ArraySpec]:
        return linear_specs((D, H, K), ("embed", "heads", "kv"), init, bias=False)

    attention_specs = {
        "query": inward(Normal((D * K) ** -0.5)),
        "key": inward(normal),
        "value": inward(normal),
        "output": linear_specs((H, K, D), ("heads", "kv", "embed"), Normal((H * K) ** -0.5), inputs=2, bias=False),
    }
    bias = ArraySpec((cfg.num_buckets, H), (None, "heads"), normal)
    wide = ["up"] if cfg.mlp == "relu" else ["gate", "gated"]
    encoder_layer = {
        "attention_norm": rms_norm_specs(D),
        "attention": attention_specs,
        "mlp_norm": rms_norm_specs(D),
        "mlp": {
            **{name: linear_specs((D, F), ("embed", "mlp"), normal, bias=False) for name in wide},
            "down": linear_specs((F, D), ("mlp", "embed"), Normal(F**-0.5), bias=False),
        },
    }
    decoder_layer = {**encoder_layer, "cross_norm": rms_norm_specs(D), "cross_attention": attention_specs}

    def stack(layers: int, layer: dict[str, Any]) -> dict[str, Any]:
        own, shared = ({"relative_bias": bias}, {}) if cfg.bias_per_layer else ({}, {"relative_bias": bias})
        return {"layers": spec.stack(layers, {**layer, **own}), **shared, "final_norm": rms_norm_specs(D)}

    tree = {
        "token_embedding": ArraySpec((V, D), ("vocab", "embed"), Normal(1.0), decay=True),
        "encoder": stack(cfg.num_layers, encoder_layer),
    }
    if _decoder_layers(cfg) > 0:
        tree["decoder"] = stack(_decoder_layers(cfg), decoder_layer)
    if cfg.task == "seq2seq" and not cfg.tie_embeddings:
        tree["head"] = ArraySpec((V, D), ("vocab", "embed"), normal, decay=True)
    return tree


# ------------------------------------------------------------------------------------------- source and state


def encode(
    cfg: Config,
    params: dict[str, Any],
    source: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    key: jax.Array | None = None,
) -> jax.Array:
    """What the encoder makes of a source, [B, S, D], after its final norm.

    Args:
        source: [B, S] integer ids. An id outside the vocabulary gives NaN.
        segment_ids: [B, S] int32, 0 padding, 1.. documents that do not see each other. Default: one document.
        key: random key for dropout; None is deterministic.
    """
    common.check_tokens(source, segment_ids, None, None, what="source")
    key = fold_name(key, "encoder")
    mask = Mask(query_segments=segment_ids, key_segments=segment_ids)
    S = source.shape[1]  # within a document, places are as far apart as positions
    bias_of = _biases(cfg, params["encoder"], S, None, bidirectional=True)
    x = _embed(cfg, params, source, key)

    def block(x: jax.Array, layer: Any) -> tuple[jax.Array, None]:
        weights, _, layer_key = layer
        normal = _norm(cfg, weights["attention_norm"], x)
        k, v = _keys_values(weights["attention"], normal)
        own_key = fold_name(layer_key, "attention")
        x = x + _attention(cfg, weights["attention"], normal, k, v, mask, bias_of(weights), own_key)
        x = x + _mlp(cfg, weights, x, layer_key)
        return constrain(x, ("batch", "seq", "activation_embed")), None

    x, _ = common.scan_layers(
        block, x, params["encoder"]["layers"], None, key,
        count=cfg.num_layers, remat=cfg.remat, unroll=not cfg.scan_layers,
    )  # fmt: skip
    return dropout(_norm(cfg, params["encoder"]["final_norm"], x), cfg.dropout, fold_name(key, "output"))


def state_specs(cfg: Config, batch: int, length: int, source_length: int = 1) -> dict[str, Any]:
    """What the decoder carries: a cache of ``length`` target tokens per row, and the keys and values of the source.

    As it starts, a row has read no source; :func:`start` gives a state that has.
    """

    def slots(count: int) -> dict[str, ArraySpec]:
        return cache.cache_specs(_decoder_layers(cfg), batch, count, cfg.num_heads, cfg.head_dim, jnp.dtype(cfg.dtype))

    read = slots(source_length)
    return {**slots(length), "source": {name: read[name] for name in ("layers", "segment_ids")}}


def start(
    cfg: Config, params: dict[str, Any], source: jax.Array, length: int, *, segment_ids: jax.Array | None = None
) -> dict[str, Any]:
    """A state that has read ``source`` [B, S] and has room for ``length`` target tokens, padding included.

    Without segment ids of their own, target tokens are document 1 and see document 1 of the source.
    """
    _require_decoder(cfg)
    encoded = encode(cfg, params, source, segment_ids=segment_ids)
    layers = params["decoder"]["layers"]

    def read(layer: Any) -> tuple[jax.Array, jax.Array]:
        return _keys_values(layer["cross_attention"], encoded)

    if isinstance(layers, tuple):
        k, v = (jnp.stack(x) for x in zip(*map(read, layers), strict=True))
    else:
        k, v = jax.lax.map(read, layers)
    k, v = (x.reshape(*x.shape[:3], -1) for x in (k, v))
    state = spec.init(state_specs(cfg, source.shape[0], length, source.shape[1]))
    kept = {"layers": {"key": k, "value": v}, "segment_ids": common.segments_of(source, segment_ids)}
    return {**state, "source": kept}


# ---------------------------------------------------------------------------------------------------- decoder


def apply(
    cfg: Config,
    params: dict[str, Any],
    tokens: jax.Array,
    *,
    source: jax.Array | None = None,
    source_segment_ids: jax.Array | None = None,
    state: Any = None,
    segment_ids: jax.Array | None = None,
    positions: jax.Array | None = None,
    key: jax.Array | None = None,
) -> tuple[jax.Array, Any]:
    """Hidden states of the decoder after its final norm, [B, T, D], and the new state (None without one).

    Takes a source (training: it is encoded, then decoded) or a state (decoding), exactly one of them.

    Args:
        tokens: [B, T] integer ids, beginning with ``decoder_start_id``. An id outside the vocabulary gives NaN.
        source: [B, S] integer ids.
        source_segment_ids: [B, S] int32, as ``segment_ids``; target document n sees source document n.
        state: from :func:`start`; the tokens then continue what it holds. A row that runs past its end gives NaN.
        segment_ids: [B, T] int32, 0 padding, 1.. documents that do not see each other. Default: one document.
        positions: [B, T] int32. Default: the place within the document.
        key: random key for dropout; None is deterministic.
    """
    _require_decoder(cfg)
    common.check_tokens(tokens, segment_ids, positions, None)
    common.check_source(tokens, source, source_segment_ids, state)
    place, state = cache.span(tokens, state, segment_ids, positions)
    layers, encoded = params["decoder"]["layers"], None
    if state is None:
        assert source is not None
        encoded = encode(cfg, params, source, segment_ids=source_segment_ids, key=key)
        pairs = None if positions is None else (positions, positions)
        source_segments = common.segments_of(source, source_segment_ids)
    else:
        layers = _with_source(layers, state["source"]["layers"], _decoder_layers(cfg))
        pairs = place.positions, state["positions"]
        source_segments = state["source"]["segment_ids"]
    cross_mask = Mask(query_segments=common.segments_of(tokens, segment_ids), key_segments=source_segments)
    key = fold_name(key, "decoder")
    bias_of = _biases(cfg, params["decoder"], tokens.shape[1], pairs, bidirectional=False)
    x = _embed(cfg, params, tokens, key)

    def read_source(weights: dict[str, Any]) -> tuple[Any, Any]:
        own = weights["source"] if "source" in weights else cache.layer(state["source"]["layers"], weights["number"])
        return cache.by_heads(own, cfg.num_heads)

    def block(x: jax.Array, layer: Any) -> tuple[jax.Array, Any]:
        weights, kv, layer_key = layer
        normal = _norm(cfg, weights["attention_norm"], x)
        k, v = _keys_values(weights["attention"], normal)
        kv, (k, v) = cache.extended(kv, (k, v), place)
        own_key = fold_name(layer_key, "attention")
        x = x + _attention(cfg, weights["attention"], normal, k, v, place.mask, bias_of(weights), own_key)

        normal = _norm(cfg, weights["cross_norm"], x)
        k, v = read_source(weights) if encoded is None else _keys_values(weights["cross_attention"], encoded)
        own_key = fold_name(layer_key, "cross_attention")
        x = x + _attention(cfg, weights["cross_attention"], normal, k, v, cross_mask, None, own_key)
        x = x + _mlp(cfg, weights, x, layer_key)
        return constrain(x, ("batch", "seq", "activation_embed")), kv

    kv = None if state is None else state["layers"]
    x, kv = common.scan_layers(
        block, x, layers, kv, key, count=_decoder_layers(cfg), remat=cfg.remat, unroll=not cfg.scan_layers,
        in_place=cache.stays_in_place(state, tokens.shape[1]),
    )  # fmt: skip
    x = dropout(_norm(cfg, params["decoder"]["final_norm"], x), cfg.dropout, fold_name(key, "output"))
    if state is None:
        return x, None
    assert place.valid_B is not None
    x = jnp.where(place.valid_B[:, None, None], x, jnp.nan)
    return x, {**state, "layers": kv}


def logits(cfg: Config, params: dict[str, Any], hidden: jax.Array) -> jax.Array:
    """Unnormalised log-probabilities of the next target token, [B, T, V] float32 (V padded to ``vocab_multiple``).

    Raises:
        ValueError: the model has no head.
    """
    if cfg.task == "none":
        raise ValueError("a T5 with task='none' has no head: set task='seq2seq' for logits of target tokens")
    if cfg.tie_embeddings:
        table, hidden = params["token_embedding"], hidden * cfg.embed_dim**-0.5
    else:
        table = params["head"]
    return constrain(unembed(table, hidden, cfg.vocab_size), ("batch", None, "vocab"))


def _require_decoder(cfg: Config) -> None:
    if _decoder_layers(cfg) == 0:
        raise ValueError("a T5 with num_decoder_layers=0 decodes nothing: call encode")


def _with_source(layers: Any, source: Any, count: int) -> Any:
    """The layers' weights, each with the keys and values of the ``source``, or with its ``number``, by which it finds
    them in place: a loop over stacks would copy each layer's part out."""
    if isinstance(layers, tuple):
        return tuple({**layer, "source": cache.layer(source, i)} for i, layer in enumerate(layers))
    return {**layers, "number": jnp.arange(count)}


# -------------------------------------------------------------------------------------------------- both stacks


def _embed(cfg: Config, params: dict[str, Any], tokens: jax.Array, key: jax.Array | None) -> jax.Array:
    # Sums over sublayers leave the range of float16 in the published weights: there the residual stream is float32.
    dtype = jnp.float32 if cfg.dtype == "float16" else jnp.dtype(cfg.dtype)
    x = dropout(embed(params["token_embedding"], tokens, dtype), cfg.dropout, fold_name(key, "embedding"))
    return constrain(x, ("batch", "seq", "activation_embed"))


def _norm(cfg: Config, params: dict[str, Any], x: jax.Array) -> jax.Array:
    return rms_norm(params, x, cfg.norm_epsilon).astype(cfg.dtype)


def _biases(
    cfg: Config, params: dict[str, Any], length: int, positions: Any, *, bidirectional: bool
) -> Callable[[Any], Term]:
    """Weights of a layer -> its position bias: made anew in each, or once for the whole stack.

    ``positions``: those of queries and of keys; None: the places of one sequence of ``length``.
    """

    def of(weights: Any) -> Term:
        table = distance_table(weights["relative_bias"], cfg.max_distance, bidirectional=bidirectional)
        if positions is None:
            return distance_term(table, cfg.max_distance, length, length, ahead=0)
        return distance_term_of_positions(table, cfg.max_distance, *positions)

    if cfg.bias_per_layer:
        return of
    shared = of(params)
    return lambda weights: shared


def _keys_values(weights: dict[str, Any], x: jax.Array) -> tuple[jax.Array, jax.Array]:
    k, v = (constrain(linear(weights[name], x), ("batch", "seq", "heads", "kv")) for name in ("key", "value"))
    return k, v


def _attention(
    cfg: Config,
    weights: dict[str, Any],
    x: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    bias: Term | None,
    key: jax.Array | None,
) -> jax.Array:
    q = constrain(linear(weights["query"], x), ("batch", "seq", "heads", "kv"))
    mixed = attention(
        q, k, v, mask, scale=1.0, bias=bias, dropout=cfg.dropout, key=fold_name(key, "probabilities")
    )  # fmt: skip
    return dropout(linear(weights["output"], mixed, inputs=2), cfg.dropout, fold_name(key, "output"))


def _mlp(cfg: Config, weights: dict[str, Any], x: jax.Array, key: jax.Array | None) -> jax.Array:
    own, normal = weights["mlp"], _norm(cfg, weights["mlp_norm"], x)
    if cfg.mlp == "relu":
        hidden = activation("relu")(linear(own["up"], normal))
    else:
        hidden = activation("gelu_tanh")(linear(own["gate"], normal)) * linear(own["gated"], normal)
    hidden = dropout(constrain(hidden, ("batch", "seq", "mlp")), cfg.dropout, fold_name(key, "mlp_hidden"))
    # In the dtype of the residual stream: of all products this one overflows float16 first.
    return dropout(linear(own["down"], hidden.astype(x.dtype)), cfg.dropout, fold_name(key, "mlp_output"))


# ------------------------------------------------------------------------------------------- published sizes and files

_V1_1 = {"mlp": "gated_gelu", "tie_embeddings": False, "mlp_dim": 1024, "num_layers": 8, "num_heads": 6}


def _v1_1(**fields: Any) -> Config:
    return Config(**{**_V1_1, **fields})


VARIANTS = {
    "t5-small": Config(),
    "t5-base": Config(num_layers=12, num_heads=12, embed_dim=768, mlp_dim=3072),
    "t5-large": Config(num_layers=24, num_heads=16, embed_dim=1024, mlp_dim=4096),
    "t5-3b": Config(num_layers=24, num_heads=32, embed_dim=1024, head_dim=128, mlp_dim=16384),
    "t5-v1.1-small": _v1_1(),
    "t5-v1.1-base": _v1_1(num_layers=12, num_heads=12, embed_dim=768, mlp_dim=2048),
    "t5-v1.1-large": _v1_1(num_layers=24, num_heads=16, embed_dim=1024, mlp_dim=2816),
    "mt5-small": _v1_1(vocab_size=250112),
    "umt5-small": _v1_1(vocab_size=256384, bias_per_layer=True),
    "t5-tiny": Config(vocab_size=128, num_layers=2, num_heads=4, embed_dim=32, head_dim=16, mlp_dim=64),
}


def _stack_names(stack: str, mlp: int) -> dict[str, str]:
    """Our path -> their name in one stack; ``mlp`` is the number of its MLP among the sublayers."""
    block, norms = f"{stack}.block.{{layer}}.layer.", {"attention": 0, "cross": 1, "mlp": mlp}
    names = {
        f"{stack}/relative_bias": f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        f"{stack}/layers/relative_bias": f"{block}0.SelfAttention.relative_attention_bias.weight",
        f"{stack}/final_norm/scale": f"{stack}.final_layer_norm.weight",
    }
    for ours, number in norms.items():
        names[f"{stack}/layers/{ours}_norm/scale"] = f"{block}{number}.layer_norm.weight"
    for ours, theirs in (("attention", "0.SelfAttention"), ("cross_attention", "1.EncDecAttention")):
        for name in ("query", "key", "value", "output"):
            names[f"{stack}/layers/{ours}/{name}/weight"] = f"{block}{theirs}.{name[0]}.weight"
    for ours, theirs in (("up", "wi"), ("gate", "wi_0"), ("gated", "wi_1"), ("down", "wo")):
        names[f"{stack}/layers/mlp/{ours}/weight"] = f"{block}{mlp}.DenseReluDense.{theirs}.weight"
    return names


def _layout(path: str) -> files.Layout:
    if "attention/" not in path:
        return files.TRANSPOSED
    return ((2,), (0, 1)) if "/output/" in path else ((1, 2), (0,))


_COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")  # the last when tied
_TENSORS = {"token_embedding": "shared.weight", **_stack_names("encoder", 1), **_stack_names("decoder", 2)}


def _read_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """The start of a target, where the config has no ``decoder_start_token_id``: T5 takes its padding id."""
    pad = config.get("pad_token_id")
    return {} if "decoder_start_token_id" in config or type(pad) is not int else {"decoder_start_id": pad}


def _format(model_type: str, prefix: str, implied: dict[str, Any]) -> files.Format:
    return files.Format(
        architectures={
            f"{prefix}ForConditionalGeneration": {"task": "seq2seq"},
            f"{prefix}EncoderModel": {"task": "none", "num_decoder_layers": 0},
            f"{prefix}Model": {"task": "none"},
        },
        model_type=model_type,
        prefix="",
        fields={
            "vocab_size": "vocab_size", "num_layers": "num_layers", "num_decoder_layers": "num_decoder_layers",
            "num_heads": "num_heads", "embed_dim": "d_model", "head_dim": "d_kv", "mlp_dim": "d_ff",
            "mlp": "feed_forward_proj", "tie_embeddings": "tie_word_embeddings",
            "num_buckets": "relative_attention_num_buckets", "max_distance": "relative_attention_max_distance",
            "norm_epsilon": "layer_norm_epsilon", "dropout": "dropout_rate",
            "decoder_start_id": "decoder_start_token_id",
        },
        implied=implied,
        read_fields=_read_fields,
        values={"feed_forward_proj": {"relu": "relu", "gated-gelu": "gated_gelu"}},
        token_ids={"pad_token_id": 0, "eos_token_id": 1},
        tensors=_TENSORS,
        head={"head": "lm_head.weight"},
        copies=dict.fromkeys(_COPIES, "token_embedding"),
        layouts={path: _layout(path) for path in _TENSORS if path.endswith("/weight")},
        # A table that v1.0 files carry and nobody reads.
        ignored=(r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",),
    )  # fmt: skip


_MULTILINGUAL = {**_V1_1, "vocab_size": 250112}
HUGGING_FACE = (
    _format("t5", "T5", {"bias_per_layer": False}),
    _format("mt5", "MT5", {**_MULTILINGUAL, "bias_per_layer": False}),
    _format("umt5", "UMT5", {**_MULTILINGUAL, "tie_embeddings": True, "bias_per_layer": True}),
)
