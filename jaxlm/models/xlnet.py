"""XLNet (Yang et al. 2019): a transformer with relative positions that predicts tokens in any order, in two streams.

Follows the authors' code and Hugging Face's weights. The content stream holds what stands at each place. The query
stream stands at a place, starts from one learned vector and does not see that place's token: the head predicts from it.
Both share all weights, and only the content stream (and the memory) gives keys and values, so a block runs on the two
streams side by side, and attends for one after the other. Who sees whom is an integer per place: the content stream
sees orders up to its own, the query stream only those below. Hugging Face computes ``gelu`` exactly, so files read from
there do so too; the published weights were trained with the tanh form (``VARIANTS``).

Legend: B batch, T time, P places of the query stream, Q = T (+ P) queries, M memory slots, S = M + T keys, D model
width, H heads, K head width (D / H), F hidden width of the MLP, R distances, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, get_args

import jax
import jax.numpy as jnp
from flax import struct

from jaxlm import spec
from jaxlm.models import common, files, heads
from jaxlm.nn import memory
from jaxlm.nn.activation import Activation, activation
from jaxlm.nn.attention import attention
from jaxlm.nn.dropout import dropout
from jaxlm.nn.embedding import embed, padded, unembed
from jaxlm.nn.linear import linear, linear_specs
from jaxlm.nn.mask import Mask
from jaxlm.nn.norm import layer_norm, layer_norm_specs
from jaxlm.nn.relative import (
    distance_term,
    distance_term_of_positions,
    distance_term_of_queries,
    sinusoids,
    type_term,
)
from jaxlm.sharding import constrain
from jaxlm.spec import ArraySpec, Normal, fold_name


@dataclasses.dataclass(frozen=True)
class Config:
    """Shape and behaviour of an XLNet. The defaults are the published large model, as Hugging Face runs it."""

    vocab_size: int = 32000
    """Number of token ids."""
    num_layers: int = 24
    """Number of blocks."""
    num_heads: int = 16
    """Attention heads of each block; must divide embed_dim."""
    embed_dim: int = 1024
    """Model width; even."""
    mlp_dim: int = 4096
    """Hidden width of the MLP."""
    activation: Activation = "gelu"
    """Nonlinearity of the MLP."""
    norm_epsilon: float = 1e-12
    """Added to the variance in layer norms."""
    init_stddev: float = 0.02
    """Standard deviation of initial weights."""
    clamp_length: int | None = None
    """Longest distance that is told apart; None tells all."""
    reuse_length: int | None = None
    """How many tokens from the start of a call with an order go into the memory; None means all."""
    task: heads.Task = "permutation"
    """Head: permutation (language model), classification, tagging, span_qa or none."""
    num_labels: int = 2
    """Outputs of the classification or tagging head."""
    dropout: float = 0.1
    """Dropout rate on embeddings, attention probabilities, what each sublayer adds and the output, while training."""
    summary_dropout: float | None = None
    """Dropout rate on what the classifier reads, while training; None means dropout."""
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
            self, "vocab_size", "num_layers", "num_heads", "embed_dim", "mlp_dim", "num_labels", "vocab_multiple"
        )
        common.check_rates(self, "dropout", *(["summary_dropout"] if self.summary_dropout is not None else []))
        common.check_choices(
            self, activation=get_args(Activation), dtype=get_args(common.ComputeDtype), remat=get_args(common.Remat),
            task=("permutation", *heads.HEADS, "none"),
        )  # fmt: skip
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"num_heads={self.num_heads} does not divide embed_dim={self.embed_dim}: change one of them"
            )
        if self.embed_dim % 2:
            raise ValueError(f"embed_dim={self.embed_dim} must be even: distances are encoded as sines and cosines")
        for name in ("clamp_length", "reuse_length"):
            if getattr(self, name) is not None:
                common.check_positive(self, name)


def specs(cfg: Config) -> dict[str, Any]:
    """Every parameter of the model."""
    D, H, K, F = cfg.embed_dim, cfg.num_heads, cfg.embed_dim // cfg.num_heads, cfg.mlp_dim
    V = padded(cfg.vocab_size, cfg.vocab_multiple)
    normal = Normal(cfg.init_stddev)
    projection = linear_specs((D, H, K), ("embed", "heads", "kv"), normal, bias=False)
    score_bias = ArraySpec((H, K), ("heads", "kv"), normal)
    block = {
        "attention": {
            "query": projection,
            "key": projection,
            "value": projection,
            "relative": projection,
            "output": linear_specs((H, K, D), ("heads", "kv", "embed"), normal, inputs=2, bias=False),
            # What a query is worth at all when it meets a content, a distance, an equal or other token type.
            "content_bias": score_bias,
            "position_bias": score_bias,
            "type_bias": score_bias,
            "type_embedding": ArraySpec((2, H, K), (None, "heads", "kv"), normal, decay=True),
        },
        "attention_norm": layer_norm_specs(D),
        "mlp": {
            "up": linear_specs((D, F), ("embed", "mlp"), normal),
            "down": linear_specs((F, D), ("mlp", "embed"), normal),
        },
        "mlp_norm": layer_norm_specs(D),
    }
    tree = {
        "token_embedding": ArraySpec((V, D), ("vocab", "embed"), normal, decay=True),
        "mask_embedding": ArraySpec((D,), ("embed",), normal),
        "layers": spec.stack(cfg.num_layers, block),
        **heads.head_specs(cfg.task, D, cfg.num_labels, normal),
    }
    if cfg.task == "permutation":
        tree["output_bias"] = ArraySpec((V,), ("vocab",))
    if cfg.task == "classification":
        tree["summary"] = linear_specs((D, D), ("embed", None), normal)
    return tree


def state_specs(cfg: Config, batch: int, length: int) -> dict[str, ArraySpec]:
    """The memory of the last ``length`` tokens of ``batch`` rows: inputs of every block, segments, token types.

    Raises:
        TypeError: a task that reads whole texts, so that nothing is carried on.
    """
    if cfg.task != "permutation":
        raise TypeError(f"an XLNet with task={cfg.task!r} sees whole texts at once, so it cannot decode or stream")
    return {
        **memory.memory_specs(cfg.num_layers, batch, length, cfg.embed_dim, jnp.dtype(cfg.dtype)),
        "token_types": ArraySpec((batch, length), ("batch", None), dtype=jnp.int32),
    }


_BEFORE_ALL = -(2**30)
"""The order of the memory: far from the smallest integer, for orders are subtracted."""


@struct.dataclass
class _Stream:
    """Where the queries of one stream stand, before S keys.

    Attributes:
        mask: who sees whom.
        ahead: how many places after the first key the first query stands, and the others follow one by one.
        places: how many places after the first key each query stands, [B, P], where they do not; else None.
        positions: of queries and of keys, [1 or B, T or P] and [1 or B, S], where keys do not stand at their places;
            else None.
        types: [B, T or P] token types of the queries, or None.
    """

    mask: Mask
    ahead: int = struct.field(pytree_node=False)
    places: Any
    positions: Any
    types: Any


@struct.dataclass
class _Place:
    """Where everything stands.

    Attributes:
        streams: the content stream and, for the task ``permutation``, the query stream.
        key_types: [B, S] token types of the keys, or None.
        sinusoids: [R, D] of distances S, S - 1, ..., for both signs as far as they are needed.
        kept: of ``memory.Span``.
    """

    streams: tuple[_Stream, ...]
    key_types: Any
    sinusoids: Any
    kept: Any


def apply(
    cfg: Config,
    params: dict[str, Any],
    tokens: jax.Array,
    *,
    state: Any = None,
    segment_ids: jax.Array | None = None,
    key: jax.Array | None = None,
    token_types: jax.Array | None = None,
    right_to_left: jax.Array | None = None,
    order: jax.Array | None = None,
    targets: jax.Array | None = None,
) -> tuple[jax.Array, Any]:
    """Hidden states and the new memory (None without one).

    The task ``permutation`` gives the query stream. With an ``order``, [B, P, D] at the places ``targets``. Without,
    [B, T, D]: the usual left-to-right language model, the query at t standing at the place after token t and seeing
    tokens up to t. The other tasks give the content stream [B, T, D], where every token of a document sees every other.

    Args:
        tokens: [B, T] integer ids. An id outside the vocabulary gives NaN.
        state: from ``state_specs``; the tokens then see and continue what it holds. It rolls: the newest tokens stay.
        segment_ids: [B, T] int32, 0 padding, 1.. documents that do not see each other. Default: one document.
        key: random key for dropout; None is deterministic.
        token_types: [B, T] int32, for example 0 and 1 for the two sentences of a pair; only whether two are equal
            counts. Default: none, which is not the same as all equal.
        right_to_left: [B] bool, rows whose tokens are in reverse order of the text: their distances change sign.
        order: [B, T] int32, the factorization order (Yang et al. 2019, eq. 3): the content at a place sees places of
            the same or a lower order, the query at it only those of a lower one.
        targets: [B, P] int32, places that are predicted. One outside of the row gives NaN.
    """
    common.check_tokens(tokens, segment_ids, None, None)
    _check(cfg, tokens, token_types, right_to_left, order, targets)
    dtype = jnp.dtype(cfg.dtype)
    T = tokens.shape[1]
    place, state = _place(cfg, tokens, state, segment_ids, key, token_types, right_to_left, order, targets)

    x = embed(params["token_embedding"], tokens, dtype)
    if cfg.task == "permutation":
        inside_BP = jnp.ones_like(tokens, bool) if targets is None else (targets >= 0) & (targets < T)
        start_BPD = jnp.where(inside_BP[..., None], params["mask_embedding"].astype(dtype)[None, None], jnp.nan)
        x = jnp.concatenate([x, start_BPD], axis=1)
    x = dropout(x, cfg.dropout, fold_name(key, "embedding"))
    x = constrain(x, ("batch", "seq", "activation_embed"))

    def block(x: jax.Array, layer: Any) -> tuple[jax.Array, Any]:
        weights, old, layer_key = layer
        remembered = None if old is None else old["hidden"]
        attended = _attention(cfg, weights["attention"], x, T, remembered, place, layer_key)
        new = None if old is None else {"hidden": x[:, : _remembered(cfg, T, order)]}
        x = layer_norm(weights["attention_norm"], x + attended, cfg.norm_epsilon)
        x = constrain(x, ("batch", "seq", "activation_embed"))
        x = layer_norm(weights["mlp_norm"], x + _mlp(cfg, weights["mlp"], x, layer_key), cfg.norm_epsilon)
        return constrain(x, ("batch", "seq", "activation_embed")), new

    old = None if state is None else state["layers"]
    x, new = common.scan_layers(
        block, x, params["layers"], old, key, count=cfg.num_layers, remat=cfg.remat, unroll=not cfg.scan_layers
    )
    hidden = dropout(x[:, T:] if cfg.task == "permutation" else x, cfg.dropout, fold_name(key, "output"))
    return hidden, None if state is None else {**state, "layers": memory.append_layers(old, new, place.kept)}


def _check(cfg: Config, tokens: Any, token_types: Any, right_to_left: Any, order: Any, targets: Any) -> None:
    B, T = tokens.shape
    expected = {"token_types": (token_types, (B, T)), "right_to_left": (right_to_left, (B,)), "order": (order, (B, T))}
    for name, (x, shape) in expected.items():
        if x is not None and x.shape != shape:
            raise ValueError(f"{name} {list(x.shape)} must be {list(shape)} for tokens {list(tokens.shape)}")
    if (order is None) != (targets is None):
        raise ValueError("order and targets come together (places to predict, in which order), got only one of them")
    if targets is None:
        return
    if cfg.task != "permutation":
        raise ValueError(f"task={cfg.task!r} predicts no tokens: order and targets are for task='permutation'")
    if targets.ndim != 2 or targets.shape[0] != B:
        raise ValueError(f"targets {list(targets.shape)} must be [{B}, places] for tokens {list(tokens.shape)}")


def _remembered(cfg: Config, T: int, order: Any) -> int:
    """How many of the tokens go into the memory."""
    return T if order is None or cfg.reuse_length is None else min(T, cfg.reuse_length)


def _place(
    cfg: Config,
    tokens: jax.Array,
    state: Any,
    segment_ids: Any,
    key: jax.Array | None,
    token_types: Any,
    right_to_left: Any,
    order: Any,
    targets: Any,
) -> tuple[_Place, Any]:
    """Where everything stands, and the state with everything but ``hidden`` written."""
    B, T = tokens.shape
    two_streams = cfg.task == "permutation"
    span, _ = memory.span(tokens, state, segment_ids, causal=two_streams)

    def of_targets(content_BT: Any) -> Any:
        """What the query stream's places have of a number of each place."""
        if content_BT is None or targets is None:
            return content_BT
        return jnp.take_along_axis(jnp.broadcast_to(content_BT, (B, T)), targets, axis=1, mode="clip")

    M = 0 if state is None else state["segment_ids"].shape[1]
    S = M + T
    types_BS = token_types
    if token_types is not None and state is not None:
        types_BS = jnp.concatenate([state["token_types"], token_types.astype(jnp.int32)], axis=1)
    sign = 1 if right_to_left is None else jnp.where(right_to_left, -1, 1)[:, None]

    def stream(of: Callable[[Any], Any], later: int, order_BT: Any, picked: bool) -> _Stream:
        """Places ``of`` the content (picked among them, or all), ``later`` by so much, that see up to ``order_BT``."""
        segments_BT = span.mask.query_segments
        mask = Mask(
            causal=two_streams,
            query_order=order_BT,
            key_order=None if order_BT is None else key_order,
            query_segments=of(segments_BT),
            key_segments=span.mask.key_segments,
        )
        positions = None
        if segment_ids is not None or right_to_left is not None:
            positions = (of(span.query_positions) + later) * sign, span.key_positions * sign
        places = M + later + of(jnp.arange(T)[None]) if picked else None
        return _Stream(mask, M + later, places, positions, types=of(token_types))

    key_order = None
    if order is not None:
        key_order = jnp.pad(order, ((0, 0), (M, 0)), constant_values=_BEFORE_ALL)
        streams = [stream(lambda x: x, 0, order, False), stream(of_targets, 0, of_targets(order) - 1, True)]
    elif two_streams:
        key_order = span.key_positions
        order_BT = None if state is None and segment_ids is None else span.query_positions  # None: that of places
        streams = [stream(lambda x: x, later, order_BT, False) for later in (0, 1)]
    else:
        streams = [stream(lambda x: x, 0, None, False)]

    lowest = -S if right_to_left is not None else 0 if two_streams and order is None else 1 - T
    distance_R = jnp.arange(S, lowest - 1, -1)
    if cfg.clamp_length is not None:
        distance_R = jnp.clip(distance_R, -cfg.clamp_length, cfg.clamp_length)
    # One dropout mask for all rows, where the authors draw one for each.
    encoded_RD = dropout(sinusoids(distance_R, cfg.embed_dim), cfg.dropout, fold_name(key, "distance"))

    kept = None
    if state is not None:
        last = _remembered(cfg, T, order)
        saved, state = memory.span(tokens[:, :last], state, None if segment_ids is None else segment_ids[:, :last])
        kept = saved.kept
        types_BT = jnp.zeros((B, T), jnp.int32) if token_types is None else token_types
        state = {**state, "token_types": memory.append(state["token_types"], types_BT[:, :last], kept)}
    return _Place(tuple(streams), types_BS, encoded_RD.astype(cfg.dtype), kept), state


def _attention(
    cfg: Config, weights: dict[str, Any], x_BQD: jax.Array, T: int, old: Any, place: _Place, key: jax.Array | None
) -> jax.Array:
    q = constrain(linear(weights["query"], x_BQD), ("batch", "seq", "heads", "kv"))
    read = x_BQD[:, :T] if old is None else jnp.concatenate([old, x_BQD[:, :T]], axis=1)
    scale, S = q.shape[-1] ** -0.5, read.shape[1]
    directly = old is not None and memory.is_met_directly(q, read, dropout=cfg.dropout, key=key)
    if directly:
        table = place.sinusoids[:, None]
    else:
        k, v = (constrain(linear(weights[name], read), ("batch", "seq", "heads", "kv")) for name in ("key", "value"))
        table = linear(weights["relative"], place.sinusoids)

    def meeting(name: str, q_BTHK: jax.Array) -> jax.Array:
        """The queries as they meet the table or the keys."""
        return memory.absorbed(weights[name]["weight"], q_BTHK) if directly else q_BTHK

    mixed = []
    for q_BTHK, stream, name in zip((q[:, :T], q[:, T:]), place.streams, ("content", "query")):

        def plus(name: str, q_BTHK: jax.Array = q_BTHK) -> jax.Array:
            return q_BTHK + weights[name].astype(q_BTHK.dtype)[None, None]

        vectors: dict[str, Any] = {"q_BTHK": meeting("relative", plus("position_bias")), "scale": scale}
        if stream.positions is not None:
            terms = [distance_term_of_positions(table, S, *stream.positions, **vectors)]
        elif stream.places is not None:
            terms = [distance_term_of_queries(table, S, stream.places, S, **vectors)]
        else:
            terms = [distance_term(table, S, q_BTHK.shape[1], S, ahead=stream.ahead, **vectors)]
        if stream.types is not None:
            types_2HK = weights["type_embedding"].astype(q.dtype)
            terms.append(type_term(plus("type_bias"), types_2HK, stream.types, place.key_types, scale=scale))
        content, own_key = meeting("key", plus("content_bias")), fold_name(key, f"{name}_attention")
        if directly:
            mixed.append(memory.attend(content, read, stream.mask, scale=scale, terms=terms))
        else:
            mixed.append(
                attention(content, k, v, stream.mask, scale=scale, bias=terms, dropout=cfg.dropout, key=own_key)
            )
    values = jnp.concatenate(mixed, axis=1)
    if directly:
        values = memory.projected(weights["value"]["weight"], values)
    out = linear(weights["output"], values, inputs=2)
    return dropout(out, cfg.dropout, fold_name(key, "output"))


def _mlp(cfg: Config, weights: dict[str, Any], x: jax.Array, key: jax.Array | None) -> jax.Array:
    hidden = constrain(activation(cfg.activation)(linear(weights["up"], x)), ("batch", "seq", "mlp"))
    hidden = dropout(hidden, cfg.dropout, fold_name(key, "mlp_hidden"))
    return dropout(linear(weights["down"], hidden), cfg.dropout, fold_name(key, "mlp_output"))


def summary(
    cfg: Config,
    params: dict[str, Any],
    hidden: jax.Array,
    segment_ids: jax.Array | None = None,
    key: jax.Array | None = None,
) -> jax.Array:
    """What the classifier reads, [B, 1, D]: a tanh layer on each row's last token that is not padding."""
    last = jnp.tanh(linear(params["summary"], heads.last_real(hidden, segment_ids)))
    return dropout(last, _summary_dropout(cfg), fold_name(key, "summary"))


def _summary_dropout(cfg: Config) -> float:
    return cfg.dropout if cfg.summary_dropout is None else cfg.summary_dropout


def logits(cfg: Config, params: dict[str, Any], hidden: jax.Array) -> jax.Array:
    """Outputs of the head of ``cfg.task`` in float32. Language model: [B, P, V] (V padded to ``vocab_multiple``)."""
    if cfg.task != "permutation":
        return heads.head_logits(cfg.task, params, hidden)
    logits = unembed(params["token_embedding"], hidden, cfg.vocab_size)
    return constrain(logits + params["output_bias"].astype(jnp.float32)[None, None], ("batch", None, "vocab"))


VARIANTS = {
    "xlnet-base-cased": Config(num_layers=12, num_heads=12, embed_dim=768, mlp_dim=3072, activation="gelu_tanh"),
    "xlnet-large-cased": Config(activation="gelu_tanh"),
    # 0.02 is little for vectors this short: it would learn slowly.
    "xlnet-tiny": Config(vocab_size=128, num_layers=2, num_heads=4, embed_dim=32, mlp_dim=64, init_stddev=0.1),
}


def _read_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    clamp = config.get("clamp_len", -1)
    if type(clamp) is not int:
        raise ValueError(f"clamp_len={clamp!r} must be a whole number")
    width, num_heads = config.get("d_model", Config.embed_dim), config.get("n_head", Config.num_heads)
    d_head = config.get("d_head", 0)
    if "d_head" in config and (type(d_head) is not int or d_head * num_heads != width):
        raise ValueError(f"d_head={d_head!r} is not d_model / n_head = {width} / {num_heads}")
    return {"clamp_length": clamp if clamp > 0 else None}


def _write_fields(cfg: Config) -> dict[str, Any]:
    return {
        "clamp_len": -1 if cfg.clamp_length is None else cfg.clamp_length,
        "summary_last_dropout": _summary_dropout(cfg),
    }


HUGGING_FACE = (
    files.Format(
        architectures={
            "XLNetLMHeadModel": {"task": "permutation"},
            "XLNetModel": {"task": "none"},
            "XLNetForSequenceClassification": {"task": "classification"},
            "XLNetForTokenClassification": {"task": "tagging"},
            "XLNetForQuestionAnsweringSimple": {"task": "span_qa"},
        },
        model_type="xlnet",
        prefix="transformer.",
        fields={
            "vocab_size": "vocab_size",
            "num_layers": "n_layer",
            "num_heads": "n_head",
            "embed_dim": "d_model",
            "mlp_dim": "d_inner",
            "activation": "ff_activation",
            "norm_epsilon": "layer_norm_eps",
            "init_stddev": "initializer_range",
            "reuse_length": "reuse_len",
            "dropout": "dropout",
            "summary_dropout": "summary_last_dropout",
        },
        read_fields=_read_fields,
        write_fields=_write_fields,
        values={"ff_activation": {"gelu": "gelu", "gelu_new": "gelu_tanh", "relu": "relu"}},
        # Behaviour that this family does not have, or has per call (bi_data, ``right_to_left``).
        required={
            "attn_type": "bi",
            "bi_data": False,
            "same_length": False,
            "untie_r": True,
            "tie_word_embeddings": True,
            "summary_type": "last",
            "summary_use_proj": True,
            "summary_activation": "tanh",
        },
        aliases={
            "n_token": "vocab_size",
            "hidden_size": "d_model",
            "num_attention_heads": "n_head",
            "num_hidden_layers": "n_layer",
        },
        token_ids={"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 5},
        tensors={
            "token_embedding": "word_embedding.weight",
            "mask_embedding": "mask_emb",
            "layers/attention/query/weight": "layer.{layer}.rel_attn.q",
            "layers/attention/key/weight": "layer.{layer}.rel_attn.k",
            "layers/attention/value/weight": "layer.{layer}.rel_attn.v",
            "layers/attention/relative/weight": "layer.{layer}.rel_attn.r",
            "layers/attention/output/weight": "layer.{layer}.rel_attn.o",
            "layers/attention/content_bias": "layer.{layer}.rel_attn.r_w_bias",
            "layers/attention/position_bias": "layer.{layer}.rel_attn.r_r_bias",
            "layers/attention/type_bias": "layer.{layer}.rel_attn.r_s_bias",
            "layers/attention/type_embedding": "layer.{layer}.rel_attn.seg_embed",
            "layers/attention_norm/scale": "layer.{layer}.rel_attn.layer_norm.weight",
            "layers/attention_norm/bias": "layer.{layer}.rel_attn.layer_norm.bias",
            "layers/mlp/up/weight": "layer.{layer}.ff.layer_1.weight",
            "layers/mlp/up/bias": "layer.{layer}.ff.layer_1.bias",
            "layers/mlp/down/weight": "layer.{layer}.ff.layer_2.weight",
            "layers/mlp/down/bias": "layer.{layer}.ff.layer_2.bias",
            "layers/mlp_norm/scale": "layer.{layer}.ff.layer_norm.weight",
            "layers/mlp_norm/bias": "layer.{layer}.ff.layer_norm.bias",
        },
        head={
            "output_bias": "lm_loss.bias",
            "summary/weight": "sequence_summary.summary.weight",
            "summary/bias": "sequence_summary.summary.bias",
            "classifier/weight": "logits_proj.weight",
            "classifier/bias": "logits_proj.bias",
            "tagger/weight": "classifier.weight",
            "tagger/bias": "classifier.bias",
            "span/weight": "qa_outputs.weight",
            "span/bias": "qa_outputs.bias",
        },
        copies={"lm_loss.weight": "token_embedding"},
        layouts={
            "mask_embedding": ((), (), (0,)),
            "layers/attention/output/weight": ((2,), (0,), (1,)),
            "layers/mlp/up/weight": files.TRANSPOSED,
            "layers/mlp/down/weight": files.TRANSPOSED,
            "summary/weight": files.TRANSPOSED,
            "classifier/weight": files.TRANSPOSED,
            "tagger/weight": files.TRANSPOSED,
            "span/weight": files.TRANSPOSED,
        },
    ),
)
