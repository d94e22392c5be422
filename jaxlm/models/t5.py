"""T5 (Raffel et al. 2020): an encoder-decoder with RMS norms and relative position biases. Linear layers have no bias.

There are two published versions. v1.0 has a ReLU MLP, and its output head is the token table, applied to hidden states
scaled by ``1 / sqrt(D)``. v1.1 has a gated tanh-GELU MLP (Shazeer 2020) and a separate head without a scale; mT5 and
FLAN-T5 have the same architecture. umT5 is v1.1 with a table of position biases in every layer. In the other models,
the layers of the encoder share one table, and the layers of the decoder share another. Attention scores are not scaled
by ``1 / sqrt(K)``; the initial query weights are smaller by this factor instead. The initial weights of the v1.1 head
have standard deviation ``1 / sqrt(D)``, as in Mesh TensorFlow and t5x (1 in Hugging Face's code).

Shapes: B batch, T target time, S source time, D model width, H heads, K head width (H * K may differ from D), F hidden
width of the MLP, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxlm import spec
from jaxlm.models import common, heads
from jaxlm.nn.activation import activation
from jaxlm.nn.attention import attention, cache
from jaxlm.nn.attention.bias import AttentionBias, dense_if_shared_by_layers
from jaxlm.nn.attention.bucket_bias import bias_of_each_distance, distance_buckets
from jaxlm.nn.attention.distance_bias import distance_bias, distance_bias_at_positions
from jaxlm.nn.attention.mask import Mask, document_mask
from jaxlm.nn.attention.source import SourceKV, group_rows_by_source, project_source, with_source_kv
from jaxlm.nn.dropout import dropout
from jaxlm.nn.embedding import Unembedding, embed
from jaxlm.nn.linear import linear, linear_specs
from jaxlm.nn.norm import rms_norm, rms_norm_specs
from jaxlm.nn.token_layout import move_padding_last
from jaxlm.sharding import constrain
from jaxlm.spec import ArraySpec, Normal, Params, State, fold_in_name

Task = Literal["seq2seq", "none"]
Mlp = Literal["relu", "gated_gelu"]


@dataclasses.dataclass(frozen=True)
class Config(common.TransformerConfig):
    """Shape and behavior of a T5. The defaults are the published v1.0 model with 60M parameters."""

    vocab_size: int = 32128
    """Number of token ids."""
    num_layers: int = 6
    """Number of encoder blocks."""
    num_decoder_layers: int | None = dataclasses.field(default=None, metadata={"minimum": 0})
    """Number of decoder blocks; None means num_layers, 0 means an encoder only (with task "none")."""
    num_heads: int = 8
    """Attention heads of each block."""
    embed_dim: int = 512
    """Model width."""
    head_dim: int = 64
    """Width of each head; num_heads * head_dim may differ from embed_dim."""
    mlp_dim: int = 2048
    """Hidden width of the MLP."""
    mlp: Mlp = "relu"
    """Type of the MLP: relu for v1.0, gated_gelu for v1.1, mT5, FLAN-T5 and umT5."""
    tie_embeddings: bool = True
    """Use the token table as the output head, and scale its inputs by 1 / sqrt(embed_dim), as in v1.0."""
    num_buckets: int = 32
    """Number of distance buckets, which is the number of rows of a table of relative position biases."""
    max_distance: int = 128
    """All distances of at least this length are in the last bucket (in the encoder, the last bucket of a direction)."""
    bias_per_layer: bool = False
    """Whether each layer has its own table of position biases (umT5). False: encoder and decoder have a table each."""
    norm_epsilon: float = 1e-6
    """Added to the mean square in RMS norms."""
    dropout: float = 0.1
    """Dropout rate on embeddings, attention probabilities, MLP hidden layers, outputs of sublayers and final norms."""
    decoder_start_id: int = dataclasses.field(default=0, metadata={"minimum": 0})
    """Id of the first input of the decoder, before the first target; T5 uses its padding id."""
    task: Task = "seq2seq"
    """Output head: target tokens (seq2seq) or none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if _num_decoder_layers(self) == 0 and self.task != "none":
            raise ValueError(f"task={self.task!r} needs a decoder: set num_decoder_layers above 0, or task='none'")
        common.check_start_id(self)
        for bidirectional in (True, False):  # raises if num_buckets and max_distance are inconsistent
            distance_buckets(self.num_buckets, self.max_distance, bidirectional=bidirectional)


def encode(
    cfg: Config, params: Params, source: jax.Array, *, segment_ids: jax.Array | None = None,
    key: jax.Array | None = None,
) -> jax.Array:  # fmt: skip
    """The hidden states of the encoder after its final norm, [B, S, D].

    Args:
        source: [B, S] integer ids. An id outside the vocabulary gives NaN, also for other tokens of the row.
        segment_ids: [B, S] int32, 0 for padding and n for document n. Documents do not interact. Default: one document.
        key: random key for dropout; None: no dropout.
    """
    common.check_tokens(source, segment_ids, name="source")
    key = fold_in_name(key, "encoder")
    # The position biases count indices. So padding must not be between the tokens of a document.
    source, layout = move_padding_last(source, segment_ids, None)
    mask = document_mask(layout.segment_ids)
    encoder = params["encoder"]
    bias_fn = _bias_fn(cfg, encoder, source.shape[1], None, bidirectional=True)
    x = _embed(cfg, params, source, key)

    def block(x: jax.Array, layer: Any) -> tuple[jax.Array, None]:
        weights, _, layer_key = layer
        normed = _norm(cfg, weights["attention_norm"], x)
        kv, bias = _project_kv(weights["attention"], normed), bias_fn(weights)
        x = x + _attention(cfg, weights, "attention", normed, kv, mask, bias, layer_key)
        x = x + _mlp(cfg, weights["mlp"], _norm(cfg, weights["mlp_norm"], x), x.dtype, layer_key)
        return constrain(x, ("batch", "seq", "activation_embed")), None

    x, _ = common.run_layers(block, x, encoder["layers"], None, key, remat=cfg.remat, num_layers=cfg.num_layers)
    x = dropout(_norm(cfg, encoder["final_norm"], x), cfg.dropout, fold_in_name(key, "output"))
    return layout.restore(x)


def apply(
    cfg: Config, params: Params, tokens: jax.Array, *, source: jax.Array | None = None,
    source_segment_ids: jax.Array | None = None, state: State | None = None, segment_ids: jax.Array | None = None,
    positions: jax.Array | None = None, key: jax.Array | None = None,
) -> tuple[jax.Array, State | None]:  # fmt: skip
    """The hidden states of the decoder after its final norm, [B, T, D], and the new state (None without a state).

    Exactly one of ``source`` (for training) and ``state`` (for decoding) must be given.

    Args:
        tokens: [B, T] integer ids, the inputs of the decoder. In training, these are ``decoder_start_id`` and then the
            targets without the last target. An id outside the vocabulary gives NaN, also for other tokens of the row.
        source: [B, S] integer ids.
        source_segment_ids: [B, S] int32, like ``segment_ids``. Document n attends to document n of the source.
        state: the result of :func:`init_decode_state`, or the state that the call for the preceding tokens returned. A
            row whose tokens do not fit into the cache gives NaN. Row b reads source ``b // (B / N)`` of the N sources.
        segment_ids: [B, T] int32, 0 for padding and n for document n. Documents do not interact. Default: one document.
        positions: [B, T] int32. Default: the position within the document.
        key: random key for dropout; None: no dropout.

    Raises:
        ValueError: the model has no decoder; the inputs are not integers of matching shapes, or contradict the state;
            or there are more tokens than slots in the state.
    """
    _require_decoder(cfg)
    common.check_tokens(tokens, segment_ids, positions)
    common.check_source(tokens, source, source_segment_ids, state)
    if state is None:  # as in ``encode``
        tokens, layout = move_padding_last(tokens, segment_ids, None)
        segment_ids, positions = layout.segment_ids, layout.reorder(positions)
    context, state = cache.make_context(tokens, state, segment_ids, positions)
    if state is None:
        assert source is not None
        bias_positions = None if positions is None else (positions, positions)
        encoded = encode(cfg, params, source, segment_ids=source_segment_ids, key=key)
        layers, source_kv = params["decoder"]["layers"], _source_projection(encoded)
        source_segments = common.segment_ids_or_ones(source, source_segment_ids)
    else:
        bias_positions = context.positions, state["positions"]
        layers, source_kv = with_source_kv(params["decoder"]["layers"], state["source"]["layers"], cfg.num_heads)
        source_segments = state["source"]["segment_ids"]
    num_sources = source_segments.shape[0]
    segments = group_rows_by_source(common.segment_ids_or_ones(tokens, segment_ids), num_sources)
    cross_mask = Mask(query_segments=segments, key_segments=source_segments)
    key = fold_in_name(key, "decoder")
    bias_fn = _bias_fn(cfg, params["decoder"], tokens.shape[1], bias_positions, bidirectional=False)
    x = _embed(cfg, params, tokens, key)

    def block(x: jax.Array, layer: Any) -> tuple[jax.Array, Any]:
        weights, kv, layer_key = layer
        normed = _norm(cfg, weights["attention_norm"], x)
        kv, cached = cache.append_and_read(kv, _project_kv(weights["attention"], normed), context)
        x = x + _attention(cfg, weights, "attention", normed, cached, context.mask, bias_fn(weights), layer_key)
        normed = group_rows_by_source(_norm(cfg, weights["cross_norm"], x), num_sources)
        attended = _attention(cfg, weights, "cross_attention", normed, source_kv(weights), cross_mask, None, layer_key)
        x = x + attended.reshape(x.shape)
        x = x + _mlp(cfg, weights["mlp"], _norm(cfg, weights["mlp_norm"], x), x.dtype, layer_key)
        return constrain(x, ("batch", "seq", "activation_embed")), kv

    kv = None if state is None else state["layers"]
    in_place = cache.updates_in_place(state, tokens.shape[1])
    x, kv = common.run_layers(
        block, x, layers, kv, key, remat=cfg.remat, num_layers=_num_decoder_layers(cfg), in_place=in_place
    )
    x = dropout(_norm(cfg, params["decoder"]["final_norm"], x), cfg.dropout, fold_in_name(key, "output"))
    return common.decoder_outputs(x if state is not None else layout.restore(x), kv, context, state)


def _attention(
    cfg: Config, layer: Params, name: str, x: jax.Array, kv: tuple[Any, Any], mask: Mask, bias: Any,
    key: jax.Array | None,
) -> jax.Array:  # fmt: skip
    weights, key = layer[name], fold_in_name(key, name)
    q = constrain(linear(weights["query"], x), ("batch", "seq", "heads", "kv"))
    key, probabilities_key = fold_in_name(key, "output"), fold_in_name(key, "probabilities")
    x = attention(q, *kv, mask, scale=1.0, bias=bias, dropout=cfg.dropout, key=probabilities_key)
    return dropout(linear(weights["output"], x, num_input_axes=2), cfg.dropout, key)


def _project_kv(weights: Params, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    k, v = common.project_heads(weights, x, "key", "value")
    return k, v


def _source_projection(encoded: jax.Array) -> SourceKV:
    return lambda layer: _project_kv(layer["cross_attention"], encoded)


def _mlp(cfg: Config, weights: Params, x: jax.Array, residual_dtype: Any, key: jax.Array | None) -> jax.Array:
    if cfg.mlp == "relu":
        x = activation("relu")(linear(weights["up"], x))
    else:
        x = activation("gelu_tanh")(linear(weights["gate"], x)) * linear(weights["gated"], x)
    x = dropout(constrain(x, ("batch", "seq", "mlp")), cfg.dropout, fold_in_name(key, "mlp_hidden"))
    # With compute dtype float16, this matmul is float32: with published weights, a float16 result would overflow.
    return dropout(linear(weights["down"], x.astype(residual_dtype)), cfg.dropout, fold_in_name(key, "mlp_output"))


def _norm(cfg: Config, params: Params, x: jax.Array) -> jax.Array:
    return rms_norm(params, x, cfg.norm_epsilon).astype(cfg.dtype)


def _embed(cfg: Config, params: Params, tokens: jax.Array, key: jax.Array | None) -> jax.Array:
    # With compute dtype float16, the residual stream is float32: with published weights, float16 would overflow.
    dtype = jnp.float32 if cfg.dtype == "float16" else jnp.dtype(cfg.dtype)
    x = embed(params["token_embedding"], tokens, dtype, size=cfg.vocab_size)
    return constrain(dropout(x, cfg.dropout, fold_in_name(key, "embedding")), ("batch", "seq", "activation_embed"))


def _bias_fn(
    cfg: Config, params: Params, length: int, positions: Any, *, bidirectional: bool
) -> Callable[[Any], AttentionBias]:
    """A function from the weights of a layer to the position bias of this layer.

    Args:
        params: the parameters of the encoder or of the decoder, with the shared table of position biases, if any.
        positions: (positions of queries, positions of keys); None: 0, 1, ... ``length - 1`` for both.
    """

    def bias(weights: Any) -> AttentionBias:
        table = bias_of_each_distance(weights["relative_bias"], cfg.max_distance, bidirectional=bidirectional)
        if positions is None:
            return distance_bias(table, cfg.max_distance, length, length, query_offset=0)
        return distance_bias_at_positions(table, cfg.max_distance, *positions)

    if cfg.bias_per_layer:
        return bias
    shared = bias(params) if positions is not None else dense_if_shared_by_layers(bias(params), length, length)
    return lambda weights: shared


def logits(cfg: Config, params: Params, hidden: jax.Array) -> jax.Array | Unembedding:
    """The logits of the next target token, as an ``Unembedding``.

    Raises:
        ValueError: the model has no head.
    """
    if cfg.task == "none":
        raise ValueError("a T5 with task='none' has no head: set task='seq2seq' for logits of target tokens")
    name, scale = ("token_embedding", cfg.embed_dim**-0.5) if cfg.tie_embeddings else ("head", 1.0)
    return Unembedding(params[name], hidden * scale, vocab_size=cfg.vocab_size)


def init_decode_state(
    cfg: Config, params: Params, source: jax.Array, length: int, *, segment_ids: jax.Array | None = None
) -> dict[str, Any]:
    """The decode state for ``source`` [B, S], with room for ``length`` target tokens per row, padding included.

    Target tokens without segment ids are document 1 and attend to document 1 of the source.

    Raises:
        ValueError: the model has no decoder, or the source is not an integer array [B, S].
    """
    _require_decoder(cfg)
    encoded = encode(cfg, params, source, segment_ids=segment_ids)
    state = spec.init(state_specs(cfg, source.shape[0], length, source.shape[1]))
    layers = project_source(_source_projection(encoded), params["decoder"]["layers"])
    return {**state, "source": {"layers": layers, "segment_ids": common.segment_ids_or_ones(source, segment_ids)}}


def state_specs(cfg: Config, batch: int, length: int, source_length: int = 1) -> dict[str, Any]:
    """The specs of the decode state, for ``length`` target tokens and ``source_length`` source tokens per row.

    The initial values are a state without a source. A model without a decoder raises ``ValueError``.
    """
    _require_decoder(cfg)
    sizes, dtype = (cfg.num_heads, cfg.head_dim), jnp.dtype(cfg.dtype)
    target, source = (
        cache.cache_specs(_num_decoder_layers(cfg), batch, slots, *sizes, dtype, stacked=cfg.scan_layers)
        for slots in (length, source_length)
    )
    return {**target, "source": {name: source[name] for name in ("layers", "segment_ids")}}


def _require_decoder(cfg: Config) -> None:
    if _num_decoder_layers(cfg) == 0:
        raise ValueError("a T5 with num_decoder_layers=0 has no decoder: call encode instead")


def _num_decoder_layers(cfg: Config) -> int:
    return cfg.num_layers if cfg.num_decoder_layers is None else cfg.num_decoder_layers


def specs(cfg: Config) -> dict[str, Any]:
    """The specs of all parameters."""
    D, H, K, F = cfg.embed_dim, cfg.num_heads, cfg.head_dim, cfg.mlp_dim
    normal = Normal(D**-0.5)
    output = linear_specs((H, K, D), ("heads", "kv", "embed"), Normal((H * K) ** -0.5), num_input_axes=2, bias=False)
    projections = {
        name: linear_specs((D, H, K), ("embed", "heads", "kv"), Normal(stddev), bias=False)
        for name, stddev in (("query", (D * K) ** -0.5), ("key", D**-0.5), ("value", D**-0.5))
    }
    attention_specs = {**projections, "output": output}
    up = linear_specs((D, F), ("embed", "mlp"), normal, bias=False)
    mlp = {"up": up} if cfg.mlp == "relu" else {"gate": up, "gated": up}
    mlp["down"] = linear_specs((F, D), ("mlp", "embed"), Normal(F**-0.5), bias=False)
    norm, bias = rms_norm_specs(D), {"relative_bias": ArraySpec((cfg.num_buckets, H), (None, "heads"), normal)}
    encoder_layer = {"attention_norm": norm, "attention": attention_specs, "mlp_norm": norm, "mlp": mlp}
    decoder_layer = {**encoder_layer, "cross_norm": norm, "cross_attention": attention_specs}

    def stack_specs(num_layers: int, layer: dict[str, Any]) -> dict[str, Any]:
        per_layer, shared = (bias, {}) if cfg.bias_per_layer else ({}, bias)
        layers = spec.layers([layer | per_layer] * num_layers, stacked=cfg.scan_layers)
        return {"layers": layers, **shared, "final_norm": norm}

    tree: dict[str, Any] = {"token_embedding": heads.table_specs(cfg, D, Normal(1.0))}
    tree["encoder"] = stack_specs(cfg.num_layers, encoder_layer)
    if _num_decoder_layers(cfg) > 0:
        tree["decoder"] = stack_specs(_num_decoder_layers(cfg), decoder_layer)
    if cfg.task == "seq2seq" and not cfg.tie_embeddings:
        tree["head"] = heads.table_specs(cfg, D, normal)
    return tree


rollback = cache.rollback
_V1_1 = Config(mlp="gated_gelu", tie_embeddings=False, mlp_dim=1024, num_layers=8, num_heads=6)
VARIANTS = {
    "t5-small": Config(),
    "t5-base": Config(num_layers=12, num_heads=12, embed_dim=768, mlp_dim=3072),
    "t5-large": Config(num_layers=24, num_heads=16, embed_dim=1024, mlp_dim=4096),
    "t5-3b": Config(num_layers=24, num_heads=32, embed_dim=1024, head_dim=128, mlp_dim=16384),
    "t5-v1.1-small": _V1_1,
    "t5-v1.1-base": dataclasses.replace(_V1_1, num_layers=12, num_heads=12, embed_dim=768, mlp_dim=2048),
    "t5-v1.1-large": dataclasses.replace(_V1_1, num_layers=24, num_heads=16, embed_dim=1024, mlp_dim=2816),
    "mt5-small": dataclasses.replace(_V1_1, vocab_size=250112),
    "umt5-small": dataclasses.replace(_V1_1, vocab_size=256384, bias_per_layer=True),
    "t5-tiny": Config(vocab_size=128, num_layers=2, num_heads=4, embed_dim=32, head_dim=16, mlp_dim=64),
}
