"""Recurrent encoder-decoders with attention: Bahdanau et al. 2015 ("RNNsearch") and Luong et al. 2015.

``jaxlm.models.bahdanau`` and ``jaxlm.models.luong`` define the encoder, the decoder step and the initial state of the
two forms. This module has the shared code: the loop over target tokens, attention, copying, the head and the state.

Initial weights are uniform in both forms, as in Luong et al. Layers and heads have biases; attention scores have none.
Luong's best models read the source backwards. To do the same, reverse the source before the call.

With ``copy``, both forms can also copy source tokens (``jaxlm.nn.copying``). Source and target must share their ids.
With ``copy``, ``apply`` returns the concatenation [features D; gate 1; copied V]: the features, the logit of the
generation probability, and the distribution of copied tokens. ``logits`` computes the mixture from this concatenation.

Shapes: B batch, T target time, S source time, E embedding, C encoder width (bahdanau 2H, luong H), G gates, H hidden
width, D width of the head's input, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxlm.models import bahdanau, common, heads, luong
from jaxlm.nn.alignment import Score, align, alignment_keys, alignment_specs, context
from jaxlm.nn.attention.source import group_rows_by_source
from jaxlm.nn.copying import copied_tokens, copy_gate, copy_gate_specs, mix_copied
from jaxlm.nn.dropout import dropout
from jaxlm.nn.embedding import Unembedding, embed, round_up
from jaxlm.nn.recurrence import project_time_major
from jaxlm.nn.segments import segment_boundaries, select_state
from jaxlm.nn.weight_record import record
from jaxlm.sharding import constrain
from jaxlm.spec import ArraySpec, Params, State, Uniform, fold_in_name

Attention = Literal["bahdanau", "luong"]
Task = Literal["seq2seq", "none"]


@dataclasses.dataclass(frozen=True)
class Config(common.ModelConfig):
    """Shape and behavior of a recurrent encoder-decoder. The defaults are RNNsearch of Bahdanau et al. 2015."""

    vocab_size: int = 30000
    """Number of target token ids."""
    source_vocab_size: int | None = 30000
    """Number of source token ids, with a separate token table; None: source and target share ids and table."""
    attention: Attention = "bahdanau"
    """Form of the model: bahdanau (GRUs, attention before each step) or luong (LSTMs, attention after each step)."""
    score: Score = "concat"
    """Attention score: dot, general or concat; bahdanau needs concat (its additive score)."""
    window: int | None = None
    """Maximum distance of attended source positions from a predicted center (local-p, Luong 2015); None: no limit."""
    num_layers: int = 1
    """Number of layers of encoder and of decoder; bahdanau has one."""
    embed_dim: int = 620
    """Width of the embeddings."""
    hidden_dim: int = 1000
    """Width of each layer (of each direction in bahdanau's encoder)."""
    attention_dim: int | None = None
    """Hidden width of the concat score; None means hidden_dim."""
    output_dim: int = 500
    """Width of the head's input: maxout units (bahdanau) or the attentional state h~ (luong)."""
    copy: bool = False
    """Mix distributions of generated and copied tokens (See et al. 2017); source_vocab_size and window must be None."""
    dropout: float = 0.0
    """Dropout rate on embeddings, between layers, and on the head's input."""
    init_bound: float = 0.1
    """Initial weights, except those of recurrent layers, are uniform in [-init_bound, init_bound]."""
    recurrent_init_bound: float | None = None
    """Bound of the uniform initial weights of the recurrent layers; None means 1 / sqrt(hidden_dim)."""
    decoder_start_id: int = dataclasses.field(default=0, metadata={"minimum": 0})
    """Id of the first input of the decoder, before the first target."""
    task: Task = "seq2seq"
    """Output head: target tokens (seq2seq) or none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        common.check_start_id(self)
        if self.attention == "bahdanau":
            common.check_values(self, "attention='bahdanau'", num_layers=1, score="concat", window=None)
        if self.copy:
            common.check_values(self, "copy=True", source_vocab_size=None, window=None, task="seq2seq")


def apply(
    cfg: Config, params: Params, tokens: jax.Array, *, source: jax.Array | None = None,
    source_segment_ids: jax.Array | None = None, state: State | None = None, segment_ids: jax.Array | None = None,
    key: jax.Array | None = None,
) -> tuple[jax.Array, State | None]:  # fmt: skip
    """The head's input at each target token, [B, T, D], and the new state (None without a state).

    With ``cfg.copy``, the last axis is the concatenation that the module docstring describes. Exactly one of
    ``source`` (for training) and ``state`` (for decoding) must be given.

    Args:
        tokens: [B, T] integer ids, the inputs of the decoder. In training, these are ``decoder_start_id`` and then the
            targets without the last target. An id outside the vocabulary gives NaN, also for later tokens of its
            document.
        source: [B, S] integer ids. An id outside the vocabulary gives NaN for all target tokens of the row.
        source_segment_ids: [B, S] int32, like ``segment_ids``. Document n of the target attends to document n of the
            source.
        state: the result of :func:`init_decode_state`, or the state that the call for the preceding tokens returned.
            Several rows may share a source (``jaxlm.nn.attention.source``).
        segment_ids: [B, T] int32, 0 for padding and n for document n. Documents do not interact. Default: one document.
        key: random key for dropout; None: no dropout.

    Raises:
        ValueError: the inputs are not integers of matching shapes; both or none of ``source`` and ``state`` are given;
            or ``source_segment_ids`` are given with a state.
    """
    common.check_tokens(tokens, segment_ids)
    common.check_source(tokens, source, source_segment_ids, state)
    common.check_numbered_layers(params["decoder"], None if state is None else state["decoder"], cfg.num_layers)
    form, params = _FORMS[cfg.attention], _gather_weights(cfg, params)
    decode_state = state
    if decode_state is None:
        assert source is not None
        decode_state = init_decode_state(cfg, params, source, tokens.shape[1], segment_ids=source_segment_ids, key=key)
    source_state, segments = decode_state["source"], common.segment_ids_or_ones(tokens, segment_ids)
    reset, keep, document = segment_boundaries(segments, decode_state["document"])
    is_one_document = state is None and segment_ids is None and source_segment_ids is None
    initial_states = None if is_one_document else _initial_states(cfg, params, source_state, segments)
    key = fold_in_name(key, "decoder")
    x = _embed(cfg, params["token_embedding"], tokens, cfg.vocab_size, key)
    steps_key = fold_in_name(key, "steps")
    step_keys = None if steps_key is None else jax.random.split(steps_key, tokens.shape[1])

    def step(carry: Any, inputs: Any) -> Any:
        projected_BGH, segment_B, reset_B, keep_B, initial_state, step_key = inputs
        if initial_state is not None:
            carry = select_state(reset_B, initial_state, carry)
        attend = functools.partial(_attend, cfg, params, source_state, segment_B)
        new_carry, outputs = form.step(cfg, params, attend, projected_BGH, carry, step_key)
        return select_state(keep_B, new_carry, carry), outputs

    time_major = jax.tree.map(lambda x_BT: jnp.swapaxes(x_BT, 0, 1), (segments, reset, keep, initial_states))
    projected_TBGH = project_time_major(params["decoder"]["layer_0"], x)
    decoder, outputs = jax.lax.scan(step, decode_state["decoder"], (projected_TBGH, *time_major, step_keys))
    outputs = jax.tree.map(lambda x_TB: jnp.swapaxes(x_TB, 0, 1), outputs)
    record(outputs["weights"][:, None], "source")
    hidden = form.features(params["output"], x, outputs)
    hidden = constrain(dropout(hidden, cfg.dropout, fold_in_name(key, "output")), ("batch", "seq", "activation_embed"))
    if cfg.copy:
        hidden = _with_copied(cfg, params["copy"], hidden, x, outputs, source_state["tokens"])
    return hidden, None if state is None else {"decoder": decoder, "document": document, "source": source_state}


def _attend(
    cfg: Config, params: Params, source: dict[str, Any], segment_B: jax.Array, query_BH: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The context vectors [B, C] and attention weights [B, S] of one query per row.

    A query attends only to the source tokens of the row's current document.

    Args:
        source: the source state from :func:`init_decode_state`. Several rows may share a source
            (``jaxlm.nn.attention.source``).
        segment_B: the current document of each row.
    """

    def attend(query_BH: jax.Array, segment_B: jax.Array) -> tuple[jax.Array, jax.Array]:
        keys_BSA = source.get("key", source["encoded"])
        visible_BS = source["segment_ids"] == segment_B[:, None]
        weights_BS = align(params.get("alignment", {}), query_BH, keys_BSA, visible_BS, window=cfg.window)
        return context(weights_BS, source["encoded"]), weights_BS

    num_rows, num_sources = query_BH.shape[0], source["segment_ids"].shape[0]
    if num_rows == num_sources:
        return attend(query_BH, segment_B)
    queries, segments = (group_rows_by_source(x[:, None], num_sources) for x in (query_BH, segment_B))
    outputs = jax.vmap(attend, in_axes=1, out_axes=1)(queries, segments)
    return jax.tree.map(lambda x: x.reshape(num_rows, *x.shape[2:]), outputs)


def _with_copied(
    cfg: Config, params: Params, features: jax.Array, x: jax.Array, outputs: Any, source_BS: jax.Array
) -> jax.Array:
    """The concatenation [features D; gate 1; copied V], from which :func:`logits` computes the mixture."""
    gate = copy_gate(params, outputs["state"], x, outputs["context"])
    weights = group_rows_by_source(outputs["weights"], source_BS.shape[0])
    copied = copied_tokens(weights, source_BS, round_up(cfg.vocab_size, cfg.vocab_multiple))
    copied = copied.reshape(*x.shape[:2], -1).astype(features.dtype)
    return constrain(jnp.concatenate([features, gate, copied], axis=-1), ("batch", "seq", None))


def logits(cfg: Config, params: Params, hidden: jax.Array) -> jax.Array | Unembedding:
    """The logits of the next target token, as an ``Unembedding``.

    With ``copy``, the result is an array [B, T, V] (V padded, see ``vocab_multiple``): the log-probabilities of the
    mixture of generated and copied tokens, float32.

    Raises:
        ValueError: the model has no head.
    """
    if cfg.task == "none":
        raise ValueError("a model with task='none' has no head: set task='seq2seq' to get logits of target tokens")
    head = params["head"]
    features = hidden[..., : cfg.output_dim]
    unembedding = Unembedding(head["weight"], features, head["bias"], vocab_size=cfg.vocab_size)
    if not cfg.copy:
        return unembedding
    gate_BT1, copied_BTV = jnp.split(hidden[..., cfg.output_dim :], [1], axis=-1)
    return constrain(mix_copied(unembedding.logits(), gate_BT1, copied_BTV), ("batch", None, "vocab"))


def encode(
    cfg: Config, params: Params, source: jax.Array, *, segment_ids: jax.Array | None = None,
    key: jax.Array | None = None,
) -> jax.Array:  # fmt: skip
    """The encoder's states at each source token, [B, S, C]: of both directions (bahdanau) or of the last layer (luong).

    Args:
        source: [B, S] integer ids. An id outside the vocabulary gives NaN, also for other tokens of its document.
        segment_ids: [B, S] int32, 0 for padding and n for document n. Documents do not interact. Default: one document.
        key: random key for dropout; None: no dropout.
    """
    return _encode(cfg, params, source, segment_ids, key)["encoded"]


def _encode(
    cfg: Config, params: Params, source: jax.Array, segment_ids: jax.Array | None, key: jax.Array | None
) -> dict[str, Any]:
    """The encoded source: a dict with ``encoded`` (see :func:`encode`) and ``segment_ids``.

    For luong, the dict also has ``states``, the LSTM state of each layer after each token. With ``copy``, it also has
    ``tokens``, the source ids.
    """
    common.check_tokens(source, segment_ids, name="source")
    key, weights = fold_in_name(key, "encoder"), _gather_weights(cfg, params)["encoder"]
    table, size = params["token_embedding"], cfg.vocab_size
    if cfg.source_vocab_size is not None:
        table, size = params["source_embedding"], cfg.source_vocab_size
    x = _embed(cfg, table, source, size, key)
    segments = common.segment_ids_or_ones(source, segment_ids)
    encoded = _FORMS[cfg.attention].encode(cfg, weights, x, segments, key)
    tokens = {"tokens": jnp.asarray(source, jnp.int32)} if cfg.copy else {}
    return {**encoded, "segment_ids": segments, **tokens}


def init_decode_state(
    cfg: Config, params: Params, source: jax.Array, length: int, *, segment_ids: jax.Array | None = None,
    key: jax.Array | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The decode state for ``source`` [B, S], before the first target token of each row; ``length`` is not used.

    Target tokens without segment ids belong to document 1 and attend to document 1 of the source. With a ``key``, the
    encoder applies dropout.
    """
    source_state = _encode(cfg, params, source, segment_ids, key)
    if cfg.score != "dot":
        source_state["key"] = alignment_keys(params["alignment"], source_state["encoded"])
    segments = source_state["segment_ids"]
    first_document_B1 = jnp.take_along_axis(segments, jnp.argmax(segments > 0, axis=1)[:, None], axis=1)
    decoder = jax.tree.map(lambda x_B1H: x_B1H[:, 0], _initial_states(cfg, params, source_state, first_document_B1))
    return {"decoder": decoder, "document": first_document_B1[:, 0], "source": source_state}


def _initial_states(cfg: Config, params: Params, source: dict[str, Any], documents_BT: jax.Array) -> dict[str, Any]:
    """The decoder's state before the first token of each given document, [B, T, ...].

    The state is zero for a document that the source does not contain, and for document 0 (padding). Several rows may
    share a source (``jaxlm.nn.attention.source``).
    """
    shape, documents_BT = documents_BT.shape, group_rows_by_source(documents_BT, source["segment_ids"].shape[0])
    in_document_BTS = (source["segment_ids"][:, None, :] == documents_BT[:, :, None]) & (documents_BT > 0)[:, :, None]
    has_source_BT = jnp.any(in_document_BTS, axis=-1)
    state = _FORMS[cfg.attention].initial_states(cfg, params["decoder"], source, in_document_BTS)
    state = select_state(has_source_BT, state, jax.tree.map(jnp.zeros_like, state))
    return jax.tree.map(lambda x: x.reshape(*shape, *x.shape[2:]), state)


def state_specs(cfg: Config, batch: int, length: int, source_length: int = 1) -> dict[str, Any]:
    """The specs of the decode state: the decoder's recurrent state, the current document of each row, and the source.

    The sizes do not depend on ``length``. The initial values are the state of a row without a source;
    :func:`init_decode_state` returns the state for a source.
    """

    def source_spec(width: int, dtype: DTypeLike) -> ArraySpec:
        return ArraySpec((batch, source_length, width), ("batch", None, "activation_embed"), dtype=dtype)

    form = _FORMS[cfg.attention]
    segments = ArraySpec((batch, source_length), ("batch", None), dtype=jnp.int32)
    decoder, states = form.state_specs(cfg, batch, source_spec)
    source = {"encoded": source_spec(form.encoder_width(cfg), cfg.dtype), "segment_ids": segments, **states}
    if cfg.copy:
        source["tokens"] = segments
    if cfg.score != "dot":
        width = (cfg.attention_dim or cfg.hidden_dim) if cfg.score == "concat" else cfg.hidden_dim
        source["key"] = source_spec(width, cfg.dtype)
    return {"decoder": decoder, "document": ArraySpec((batch,), ("batch",), dtype=jnp.int32), "source": source}


def specs(cfg: Config) -> dict[str, Any]:
    """The specs of all parameters."""
    E, H, D = cfg.embed_dim, cfg.hidden_dim, cfg.output_dim
    form, uniform = _FORMS[cfg.attention], Uniform(cfg.init_bound)
    tree: dict[str, Any] = {"token_embedding": heads.table_specs(cfg, E, uniform)}
    if cfg.source_vocab_size is not None:
        rows = round_up(cfg.source_vocab_size, cfg.vocab_multiple)
        tree["source_embedding"] = ArraySpec((rows, E), ("vocab", "embed"), uniform, decay=True)
    C = form.encoder_width(cfg)
    recurrent_init = None if cfg.recurrent_init_bound is None else Uniform(cfg.recurrent_init_bound)
    tree |= form.specs(cfg, uniform, recurrent_init)
    score_specs = alignment_specs(cfg.score, H, C, cfg.attention_dim or H, uniform, local=cfg.window is not None)
    if score_specs:
        tree["alignment"] = score_specs
    if cfg.copy:
        tree["copy"] = copy_gate_specs(H, E, C, uniform)
    if cfg.task == "seq2seq":
        tree["head"] = {"weight": heads.table_specs(cfg, D, uniform), "bias": heads.vocab_bias_specs(cfg)}
    return tree


def _embed(cfg: Config, table_VE: jax.Array, ids: jax.Array, size: int, key: jax.Array | None) -> jax.Array:
    x = embed(table_VE, ids, jnp.dtype(cfg.dtype), size=size)
    x = dropout(x, cfg.dropout, fold_in_name(key, "embedding"))
    return constrain(x, ("batch", "seq", "activation_embed"))


def _gather_weights(cfg: Config, params: Params) -> dict[str, Any]:
    """The parameters, with an all-gather of the parameters that loops over time use (``common.gather_weights``)."""
    in_loops = ("encoder", "decoder", "alignment", "output")
    loop_specs = {name: tree for name, tree in specs(cfg).items() if name in in_loops}
    return {**params, **common.gather_weights(loop_specs, {name: params[name] for name in loop_specs})}


_FORMS = {"bahdanau": bahdanau, "luong": luong}
# With smaller initial values, the gradients of such a small model would be too small to learn in a few steps.
_TINY = Config(
    vocab_size=128, source_vocab_size=None, embed_dim=24, hidden_dim=32, output_dim=24, dropout=0.1, init_bound=0.4,
    recurrent_init_bound=0.5,
)  # fmt: skip
VARIANTS = {
    "bahdanau-2015": Config(),
    "luong-2015": Config(
        vocab_size=50000, source_vocab_size=50000, attention="luong", score="dot", num_layers=4, embed_dim=1000,
        output_dim=1000, dropout=0.2, recurrent_init_bound=0.1,
    ),
    "attention-rnn-tiny": _TINY,
    "attention-rnn-luong-tiny": dataclasses.replace(
        _TINY, attention="luong", score="general", num_layers=2, init_bound=0.6
    ),
    "attention-rnn-copy-tiny": dataclasses.replace(_TINY, copy=True),
}  # fmt: skip
