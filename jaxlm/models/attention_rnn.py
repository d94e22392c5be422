"""Recurrent encoder-decoders with attention: Bahdanau et al. 2015 ("RNNsearch") and Luong et al. 2015.

    bahdanau  A bidirectional GRU encoder and a GRU decoder. The decoder attends with the state *before* the token,
              s[t-1]; the context is an input of the GRU. A maxout layer of s[t-1], embedding and context feeds the
              head. The initial state is tanh(W h), where h is the backward encoder's state at the first source token.
    luong     Stacked LSTMs; the decoder starts with the final states of the encoder. It attends with the state *after*
              the token, h[t]. The attentional state h~[t] = tanh(W [c; h]) feeds the head and the first layer at the
              next token (input feeding).

Bahdanau's maxout layer reads s[t-1] instead of s[t], as in appendix A.2.2 of the paper and in the authors' code
(GroundHog). The GRU's reset gate is applied before the recurrent matmul, as in the paper. Its update gate z is the
weight of the old state, as in ``recurrence``. Initial weights are uniform in both forms, as in Luong et al. Layers and
heads have biases; attention scores have none. Luong's best models read the source backwards. To reproduce this, reverse
the source before the call.

With ``copy``, both forms can copy source tokens (See et al. 2017, eq. 8 and 9, with all source ids in the shared
vocabulary; Gulcehre et al. 2016 and Gu et al. 2016 describe variants). The next token is generated with probability
sigmoid(w_s s + w_x x + w_c c + b), for the decoder state s, the embedding x and the context c. Otherwise it is copied
from source position i, with the attention weight of i as the probability. ``apply`` then returns the concatenation
[features D; gate 1; copied V]: the features, the logit of the generation probability, and the distribution of copied
tokens. ``logits`` computes the mixture from it.

Shapes: B batch, T target time, S source time, E embedding, C encoder width (bahdanau 2H, luong H), G gates, H hidden
width, D width of the head's input, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from jaxlm.models import common
from jaxlm.nn import recurrence
from jaxlm.nn.alignment import Score, align, alignment_keys, alignment_specs, context, copied_tokens, mix_copied
from jaxlm.nn.dropout import dropout
from jaxlm.nn.embedding import embed, round_up, unembed
from jaxlm.nn.linear import linear, linear_specs
from jaxlm.nn.segments import segment_boundaries
from jaxlm.nn.weight_record import record
from jaxlm.sharding import constrain
from jaxlm.spec import ArraySpec, Constant, Uniform, fold_name

Attention = Literal["bahdanau", "luong"]
Task = Literal["seq2seq", "none"]

Attend = Callable[[jax.Array], tuple[jax.Array, jax.Array]]
"""A function from queries [B, H] to context vectors [B, C] and attention weights [B, S]."""


@dataclasses.dataclass(frozen=True)
class Config(common.ModelConfig):
    """Shape and behaviour of a recurrent encoder-decoder. The defaults are RNNsearch of Bahdanau et al. 2015."""

    vocab_size: int = 30000
    """Number of target token ids."""
    source_vocab_size: int | None = 30000
    """Number of source token ids, with a separate token table; None: source and target share ids and table."""
    attention: Attention = "bahdanau"
    """Form of the model: bahdanau (GRUs, attention before each step) or luong (LSTMs, attention after each step)."""
    score: Score = "concat"
    """Attention score: dot, general or concat; bahdanau needs concat (its additive score)."""
    window: int | None = None
    """Maximum distance of attended source positions from a predicted centre (local-p of Luong et al. 2015); None means
    no limit."""
    num_layers: int = 1
    """Number of layers of encoder and of decoder; bahdanau has one."""
    embed_dim: int = 620
    """Width of the embeddings."""
    hidden_dim: int = 1000
    """Width of each layer (of each direction in bahdanau's encoder)."""
    attention_dim: int | None = None
    """Width of the concat score; None means hidden_dim."""
    output_dim: int = 500
    """Width of the head's input: maxout units (bahdanau) or the attentional state h~ (luong)."""
    copy: bool = False
    """Mix the distributions of generated and of copied tokens (See et al. 2017); needs source_vocab_size=None."""
    dropout: float = 0.0
    """Dropout rate on embeddings, between layers, and on the head's input."""
    init_bound: float = 0.1
    """Initial weights are uniform in [-init_bound, init_bound]."""
    recurrent_init_bound: float | None = None
    """The corresponding bound for the weights of the recurrent layers; None means 1 / sqrt(hidden_dim)."""
    decoder_start_id: int = 0
    """Id of the first input of the decoder, before the first target."""
    task: Task = "seq2seq"
    """Output head: target tokens (seq2seq) or none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        common.check_positive(self, "vocab_size", "num_layers", "embed_dim", "hidden_dim", "output_dim")
        for name in ("source_vocab_size", "window", "attention_dim"):
            if getattr(self, name) is not None:
                common.check_positive(self, name)
        common.check_rates(self, "dropout")
        common.check_start_id(self)
        common.check_choices(self, attention=get_args(Attention), score=get_args(Score), task=get_args(Task))
        if self.attention == "bahdanau":
            for name, required in (("num_layers", 1), ("score", "concat"), ("window", None)):
                if getattr(self, name) != required:
                    raise ValueError(
                        f"attention='bahdanau' requires {name}={required!r}, got {getattr(self, name)!r}: change it, "
                        "or use attention='luong'"
                    )
        if self.copy:
            for name, required in (("source_vocab_size", None), ("window", None), ("task", "seq2seq")):
                if getattr(self, name) != required:
                    raise ValueError(f"copy=True needs {name}={required!r}, got {getattr(self, name)!r}")


def apply(
    cfg: Config,
    params: dict[str, Any],
    tokens: jax.Array,
    *,
    source: jax.Array | None = None,
    source_segment_ids: jax.Array | None = None,
    state: Any = None,
    segment_ids: jax.Array | None = None,
    key: jax.Array | None = None,
) -> tuple[jax.Array, Any]:
    """The head's input at each target token, [B, T, D], and the new state (None without a state).

    Exactly one of ``source`` (for training) and ``state`` (for decoding) must be given.

    Args:
        tokens: [B, T] integer ids, the inputs of the decoder. In training, these are ``decoder_start_id`` and then the
            targets without the last target. An id outside the vocabulary gives NaN at its position and at later ones.
        source: [B, S] integer ids.
        source_segment_ids: [B, S] int32, like ``segment_ids``. Document n of the target attends to document n of the
            source.
        state: from :func:`init_decode_state`, or the state after earlier tokens, continued by ``tokens``. Several rows
            may share a source (``common.group_rows_by_source``).
        segment_ids: [B, T] int32, 0 for padding and n for document n. Documents do not interact. Default: one document.
        key: random key for dropout; None: no dropout.
    """
    common.check_tokens(tokens, segment_ids, None, None)
    common.check_source(tokens, source, source_segment_ids, state)
    params = _gather_weights(cfg, params)
    initial = state
    if state is None:
        assert source is not None
        initial = _init_state(cfg, params, source, source_segment_ids, key)
    source_state, segments = initial["source"], common.segment_ids_or_ones(tokens, segment_ids)
    reset, keep, document = segment_boundaries(segments, initial["document"])
    one_document = state is None and segment_ids is None and source_segment_ids is None
    initial_states = None if one_document else _initial_states(cfg, params, source_state, segments)
    key = fold_name(key, "decoder")
    x = _embed(cfg, params["token_embedding"], tokens, cfg.vocab_size, key)
    steps_key = fold_name(key, "steps")
    step_keys = None if steps_key is None else jax.random.split(steps_key, tokens.shape[1])

    def step(carry: Any, inputs: Any) -> Any:
        projected_BGH, segment_B, reset_B, keep_B, initial_state, step_key = inputs
        if initial_state is not None:
            carry = _where(reset_B, initial_state, carry)
        attend = functools.partial(_attend, cfg, params, source_state, segment_B)
        if cfg.attention == "bahdanau":
            new_carry, outputs = _bahdanau_step(params["decoder"], attend, projected_BGH, carry)
        else:
            new_carry, outputs = _luong_step(cfg, params, attend, projected_BGH, carry, step_key)
        return _where(keep_B, new_carry, carry), outputs

    time_major = jax.tree.map(lambda x_BT: jnp.swapaxes(x_BT, 0, 1), (segments, reset, keep, initial_states))
    projected_TBGH = _project_time_major(params["decoder"]["layer_0"], x)
    decoder, outputs = jax.lax.scan(step, initial["decoder"], (projected_TBGH, *time_major, step_keys))
    outputs = jax.tree.map(lambda x_TB: jnp.swapaxes(x_TB, 0, 1), outputs)
    record(outputs["weights"][:, None], "source")
    hidden = _maxout(params["output"], x, outputs) if cfg.attention == "bahdanau" else outputs["attentional"]
    hidden = constrain(dropout(hidden, cfg.dropout, fold_name(key, "output")), ("batch", "seq", "activation_embed"))
    if cfg.copy:
        hidden = _with_copied(cfg, params["copy"], hidden, x, outputs, source_state["tokens"])
    return hidden, None if state is None else {"decoder": decoder, "document": document, "source": source_state}


def _attend(
    cfg: Config, params: dict[str, Any], source: dict[str, Any], segment_B: jax.Array, query_BH: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Context vectors [B, C] and attention weights [B, S] of one query per row, over the row's current document.

    Args:
        source: the source state from :func:`_init_state`. Several rows may share a source
            (``common.group_rows_by_source``).
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
    queries, segments = (common.group_rows_by_source(x[:, None], num_sources) for x in (query_BH, segment_B))
    outputs = jax.vmap(attend, in_axes=1, out_axes=1)(queries, segments)
    return jax.tree.map(lambda x: x.reshape(num_rows, *x.shape[2:]), outputs)


def _bahdanau_step(weights: dict[str, Any], attend: Attend, projected_BGH: jax.Array, carry: Any) -> tuple[Any, Any]:
    """The next state, and s[t-1], c[t] and the attention weights (Bahdanau et al. 2015, appendix A.2.2)."""
    state_BH = carry["layer_0"]["hidden"].astype(projected_BGH.dtype)
    context_BC, weights_BS = attend(state_BH)
    projected_BGH = projected_BGH + linear(weights["context"], context_BC)
    new_carry = {"layer_0": recurrence.gru_cell(weights["layer_0"], projected_BGH, carry["layer_0"])}
    return new_carry, {"state": state_BH, "context": context_BC, "weights": weights_BS}


def _maxout(weights: dict[str, Any], x_BTE: jax.Array, outputs: dict[str, jax.Array]) -> jax.Array:
    """The maximum of each pair of units of U s + V e + C c (Goodfellow et al. 2013), [B, T, D]."""
    inputs = {"state": outputs["state"], "embedding": x_BTE, "context": outputs["context"]}
    pairs_BTD2 = sum(linear(weights[name], x) for name, x in inputs.items())
    return jnp.max(pairs_BTD2, axis=-1)


def _luong_step(
    cfg: Config, params: dict[str, Any], attend: Attend, projected_BGH: jax.Array, carry: Any, key: jax.Array | None
) -> tuple[Any, Any]:
    """The next state, and h[t], c[t], the attention weights and h~[t] (Luong et al. 2015, section 3)."""
    weights, output, dtype = params["decoder"], params["output"], projected_BGH.dtype
    projected_BGH = projected_BGH + linear(weights["feed"], carry["feed"].astype(dtype))
    new_carry = {"layer_0": recurrence.lstm_cell(weights["layer_0"], projected_BGH, carry["layer_0"])}
    x_BH = new_carry["layer_0"]["hidden"].astype(dtype)
    for name in _layer_names(cfg)[1:]:
        projected_BGH = recurrence.project(weights[name], dropout(x_BH, cfg.dropout, fold_name(key, name)))
        new_carry[name] = recurrence.lstm_cell(weights[name], projected_BGH, carry[name])
        x_BH = new_carry[name]["hidden"].astype(dtype)
    context_BC, weights_BS = attend(x_BH)
    attentional_BD = jnp.tanh(linear(output["state"], x_BH) + linear(output["context"], context_BC))
    outputs = {"state": x_BH, "context": context_BC, "weights": weights_BS, "attentional": attentional_BD}
    return {**new_carry, "feed": attentional_BD.astype(jnp.float32)}, outputs


def _with_copied(
    cfg: Config,
    params: dict[str, Any],
    features_BTD: jax.Array,
    x_BTE: jax.Array,
    outputs: dict[str, jax.Array],
    source_BS: jax.Array,
) -> jax.Array:
    """[features D; gate 1; copied V] (See et al. 2017: the gate of eq. 8, the sum over source positions of eq. 9)."""
    inputs = {"state": outputs["state"], "embedding": x_BTE, "context": outputs["context"]}
    bias_BT1 = params["bias"].astype(features_BTD.dtype)[None, None, :]
    gate_BT1 = sum((linear(params[name], x) for name, x in inputs.items()), bias_BT1)
    weights_BTS = common.group_rows_by_source(outputs["weights"], source_BS.shape[0])
    copied_BTV = copied_tokens(weights_BTS, source_BS, round_up(cfg.vocab_size, cfg.vocab_multiple))
    copied_BTV = copied_BTV.reshape(*x_BTE.shape[:2], -1)
    hidden = jnp.concatenate([features_BTD, gate_BT1, copied_BTV.astype(features_BTD.dtype)], axis=-1)
    return constrain(hidden, ("batch", "seq", "activation_embed"))


def logits(cfg: Config, params: dict[str, Any], hidden: jax.Array) -> jax.Array:
    """The logits of the next target token, [B, T, V] float32 (V padded, see ``vocab_multiple``).

    With ``copy``, these are log-probabilities of the mixture of generated and copied tokens.

    Raises:
        ValueError: the model has no head.
    """
    if cfg.task == "none":
        raise ValueError("a model with task='none' has no head: set task='seq2seq' for logits of target tokens")
    scores = unembed(params["head"]["weight"], hidden[..., : cfg.output_dim], cfg.vocab_size)
    scores = constrain(scores + params["head"]["bias"].astype(jnp.float32)[None, None, :], ("batch", None, "vocab"))
    if not cfg.copy:
        return scores
    gate_BT1, copied_BTV = jnp.split(hidden[..., cfg.output_dim :], [1], axis=-1)
    return constrain(mix_copied(scores, gate_BT1, copied_BTV), ("batch", None, "vocab"))


# ------------------------------------------------------------------------------------------------------- encoder


def encode(
    cfg: Config,
    params: dict[str, Any],
    source: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    key: jax.Array | None = None,
) -> jax.Array:
    """The encoder's states at each source token, [B, S, C]: of both directions (bahdanau) or of the last layer (luong).

    Args:
        source: [B, S] integer ids. An id outside the vocabulary gives NaN.
        segment_ids: [B, S] int32, 0 for padding and n for document n. Documents do not interact. Default: one document.
        key: random key for dropout; None: no dropout.
    """
    return _encode(cfg, params, source, segment_ids, key)["encoded"]


def _encode(
    cfg: Config, params: dict[str, Any], source: jax.Array, segment_ids: Any, key: jax.Array | None
) -> dict[str, Any]:
    """The encoded source: a dict with ``encoded`` (see :func:`encode`) and ``segment_ids``.

    For luong, it also has ``states``, the LSTM state of each layer after each token; with copy, also ``tokens``.
    """
    common.check_tokens(source, segment_ids, None, None, what="source")
    key, weights = fold_name(key, "encoder"), _gather_weights(cfg, params)["encoder"]
    table, size = params["token_embedding"], cfg.vocab_size
    if cfg.source_vocab_size is not None:
        table, size = params["source_embedding"], cfg.source_vocab_size
    x = _embed(cfg, table, source, size, key)
    segments = common.segment_ids_or_ones(source, segment_ids)
    tokens = {"tokens": jnp.asarray(source, jnp.int32)} if cfg.copy else {}
    reset, keep, _ = segment_boundaries(segments)
    if cfg.attention == "bahdanau":
        forward = recurrence.gru(weights["forward"], x, reset_BT=reset, keep_BT=keep)[0]
        reset = segment_boundaries(segments, reverse=True)[0]
        backward = recurrence.gru(weights["backward"], x, reset_BT=reset, keep_BT=keep, reverse=True)[0]
        encoded = constrain(jnp.concatenate([forward, backward], axis=-1), ("batch", None, "activation_embed"))
        return {"encoded": encoded, "segment_ids": segments, **tokens}
    states: dict[str, Any] = {}
    for name in _layer_names(cfg):
        if states:
            x = dropout(x, cfg.dropout, fold_name(key, name))
        states[name] = _lstm_states(weights[name], x, reset, keep)
        x = constrain(states[name]["hidden"].astype(x.dtype), ("batch", None, "activation_embed"))
    return {"encoded": x, "segment_ids": segments, "states": states, **tokens}


def _lstm_states(
    params: dict[str, Any], x_BSE: jax.Array, reset_BS: jax.Array, keep_BS: jax.Array
) -> dict[str, jax.Array]:
    """Hidden and cell state after each token, [B, S, H] float32; ``recurrence.lstm`` returns only the last cell."""

    def step(state: Any, inputs: Any) -> Any:
        projected_BGH, reset_B, keep_B = inputs
        state = _where(reset_B, jax.tree.map(jnp.zeros_like, state), state)
        state = _where(keep_B, recurrence.lstm_cell(params, projected_BGH, state), state)
        return state, state

    projected_SBGH = _project_time_major(params, x_BSE)
    zeros_BH = jnp.zeros_like(projected_SBGH[0, :, 0], jnp.float32)
    _, states = jax.lax.scan(step, {"hidden": zeros_BH, "cell": zeros_BH}, (projected_SBGH, reset_BS.T, keep_BS.T))
    return jax.tree.map(lambda x_SBH: jnp.swapaxes(x_SBH, 0, 1), states)


# --------------------------------------------------------------------------------------------------------- state


def init_decode_state(
    cfg: Config, params: dict[str, Any], source: jax.Array, length: int, *, segment_ids: jax.Array | None = None
) -> dict[str, Any]:
    """The decode state for ``source`` [B, S], before the first token of its first document; ``length`` is not used.

    Target tokens without segment ids are document 1 and attend to document 1 of the source.
    """
    return _init_state(cfg, params, source, segment_ids, None)


def _init_state(
    cfg: Config, params: dict[str, Any], source: jax.Array, segment_ids: Any, key: jax.Array | None
) -> dict[str, Any]:
    """The decode state after the source is encoded, before the first target token."""
    source_state = _encode(cfg, params, source, segment_ids, key)
    segments = source_state["segment_ids"]
    if cfg.score != "dot":
        source_state["key"] = alignment_keys(params["alignment"], source_state["encoded"])
    first_B1 = jnp.take_along_axis(segments, jnp.argmax(segments > 0, axis=1)[:, None], axis=1)
    decoder = jax.tree.map(lambda x_B1H: x_B1H[:, 0], _initial_states(cfg, params, source_state, first_B1))
    return {"decoder": decoder, "document": first_B1[:, 0], "source": source_state}


def _initial_states(
    cfg: Config, params: dict[str, Any], source: dict[str, Any], documents_BT: jax.Array
) -> dict[str, Any]:
    """The decoder's state before the first token of each given document, [B, T, ...].

    The state is zero for a document that the source does not contain. Several rows may share a source
    (``common.group_rows_by_source``).
    """
    shape, documents_BT = documents_BT.shape, common.group_rows_by_source(documents_BT, source["segment_ids"].shape[0])
    in_document_BTS = source["segment_ids"][:, None, :] == documents_BT[:, :, None]
    has_source_BT = jnp.any(in_document_BTS, axis=-1)

    def take(x_BSH: jax.Array, positions_BT: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x_BSH, positions_BT[:, :, None], axis=1)

    if cfg.attention == "bahdanau":
        first_BT = jnp.argmax(in_document_BTS, axis=-1)
        backward_BTH = take(source["encoded"][:, :, cfg.hidden_dim :], first_BT)
        hidden_BTH = jnp.tanh(linear(params["decoder"]["begin"], backward_BTH)).astype(jnp.float32)
        state: dict[str, Any] = {"layer_0": {"hidden": hidden_BTH}}
    else:
        last_BT = in_document_BTS.shape[-1] - 1 - jnp.argmax(jnp.flip(in_document_BTS, axis=-1), axis=-1)
        state = jax.tree.map(lambda x_BSH: take(x_BSH, last_BT), source["states"])
        state["feed"] = jnp.zeros((*documents_BT.shape, cfg.output_dim))
    state = _where(has_source_BT, state, jax.tree.map(jnp.zeros_like, state))
    return jax.tree.map(lambda x: x.reshape(*shape, *x.shape[2:]), state)


def state_specs(cfg: Config, batch: int, length: int, source_length: int = 1) -> dict[str, Any]:
    """The specs of the decode state: the decoder's recurrent state, the current document of each row, and the source.

    The size does not depend on ``length``. The initial values are the state of a row without a source;
    :func:`init_decode_state` returns the state for a source.
    """

    def source_spec(width: int, dtype: Any) -> ArraySpec:
        return ArraySpec((batch, source_length, width), ("batch", None, "activation_embed"), dtype=dtype)

    H = cfg.hidden_dim
    segments = ArraySpec((batch, source_length), ("batch", None), dtype=jnp.int32)
    source: dict[str, Any] = {"encoded": source_spec(H, cfg.dtype), "segment_ids": segments}
    if cfg.copy:
        source["tokens"] = segments
    if cfg.attention == "bahdanau":
        decoder: dict[str, Any] = {"layer_0": recurrence.gru_state_specs(batch, H)}
        source["encoded"] = source_spec(2 * H, cfg.dtype)
    else:
        decoder = {name: recurrence.lstm_state_specs(batch, H) for name in _layer_names(cfg)}
        decoder["feed"] = ArraySpec((batch, cfg.output_dim), ("batch", "activation_embed"))
        state = {name: source_spec(H, jnp.float32) for name in ("hidden", "cell")}
        source["states"] = dict.fromkeys(_layer_names(cfg), state)
    if cfg.score == "concat":
        source["key"] = source_spec(H if cfg.attention_dim is None else cfg.attention_dim, cfg.dtype)
    elif cfg.score == "general":
        source["key"] = source_spec(H, cfg.dtype)
    return {"decoder": decoder, "document": ArraySpec((batch,), ("batch",), dtype=jnp.int32), "source": source}


# ---------------------------------------------------------------------------------------------------- parameters


def specs(cfg: Config) -> dict[str, Any]:
    """The specs of all parameters."""
    E, H, D, V = cfg.embed_dim, cfg.hidden_dim, cfg.output_dim, round_up(cfg.vocab_size, cfg.vocab_multiple)
    A = H if cfg.attention_dim is None else cfg.attention_dim
    uniform = Uniform(cfg.init_bound)
    tree: dict[str, Any] = {"token_embedding": ArraySpec((V, E), ("vocab", "embed"), uniform, decay=True)}
    if cfg.source_vocab_size is not None:
        rows = round_up(cfg.source_vocab_size, cfg.vocab_multiple)
        tree["source_embedding"] = ArraySpec((rows, E), ("vocab", "embed"), uniform, decay=True)
    C = 2 * H if cfg.attention == "bahdanau" else H
    tree |= _bahdanau_specs(cfg, uniform) if cfg.attention == "bahdanau" else _luong_specs(cfg, uniform)
    alignment = alignment_specs(cfg.score, H, C, A, uniform, local=cfg.window is not None)
    if alignment:
        tree["alignment"] = alignment
    if cfg.copy:
        tree["copy"] = {
            name: linear_specs((width, 1), ("embed", None), uniform, bias=False)
            for name, width in (("state", H), ("embedding", E), ("context", C))
        }
        # The initial bias favours generation, because copying with untrained attention gives targets low probability.
        tree["copy"]["bias"] = ArraySpec((1,), (None,), Constant(1.0))
    if cfg.task == "seq2seq":
        weight = ArraySpec((V, D), ("vocab", "embed"), uniform, decay=True)
        tree["head"] = {"weight": weight, "bias": ArraySpec((V,), ("vocab",))}
    return tree


def _bahdanau_specs(cfg: Config, uniform: Uniform) -> dict[str, Any]:
    E, H, D, C = cfg.embed_dim, cfg.hidden_dim, cfg.output_dim, 2 * cfg.hidden_dim
    layer = recurrence.gru_specs(E, H, _recurrent_init(cfg), reset="before")
    return {
        "encoder": {"forward": layer, "backward": layer},
        "decoder": {
            "begin": linear_specs((H, H), ("embed", "mlp"), uniform),
            "layer_0": layer,
            "context": linear_specs((C, 3, H), ("embed", None, "mlp"), uniform, bias=False),  # C_r, C_z, C of the paper
        },
        "output": {
            "state": linear_specs((H, D, 2), ("embed", "mlp", None), uniform),
            "embedding": linear_specs((E, D, 2), ("embed", "mlp", None), uniform, bias=False),
            "context": linear_specs((C, D, 2), ("embed", "mlp", None), uniform, bias=False),
        },
    }


def _luong_specs(cfg: Config, uniform: Uniform) -> dict[str, Any]:
    E, H, D = cfg.embed_dim, cfg.hidden_dim, cfg.output_dim
    layers = {
        name: recurrence.lstm_specs(H if i else E, H, _recurrent_init(cfg)) for i, name in enumerate(_layer_names(cfg))
    }
    return {
        "encoder": layers,
        "decoder": {**layers, "feed": linear_specs((D, 4, H), ("embed", None, "mlp"), uniform, bias=False)},
        "output": {  # both halves of W_c of the paper
            "state": linear_specs((H, D), ("embed", "mlp"), uniform),
            "context": linear_specs((H, D), ("embed", "mlp"), uniform, bias=False),
        },
    }


def _recurrent_init(cfg: Config) -> Uniform | None:
    return None if cfg.recurrent_init_bound is None else Uniform(cfg.recurrent_init_bound)


def _layer_names(cfg: Config) -> list[str]:
    return [f"layer_{index}" for index in range(cfg.num_layers)]


# ------------------------------------------------------------------------------------------------------- helpers


def _embed(cfg: Config, table_VE: jax.Array, ids: jax.Array, size: int, key: jax.Array | None) -> jax.Array:
    x = embed(table_VE, ids, jnp.dtype(cfg.dtype), size=size)
    x = dropout(x, cfg.dropout, fold_name(key, "embedding"))
    return constrain(x, ("batch", "seq", "activation_embed"))


def _gather_weights(cfg: Config, params: dict[str, Any]) -> dict[str, Any]:
    """The parameters, with all-gathered weights for the loops over time, so that these are not sharded over ``fsdp``.

    So the weights are gathered once, instead of in each step of a loop. This is also needed for correctness: if weights
    in a loop are sharded over ``fsdp``, XLA computes wrong gradients for data=2, fsdp=2, tensor=2 (jax 0.10.2 on CPU;
    the contract test of the sharded step shows it).
    """

    def gather(leaf: ArraySpec, x: jax.Array) -> jax.Array:
        return constrain(x, tuple("activation_embed" if axis == "embed" else axis for axis in leaf.axes))

    names_in_loops = ("encoder", "decoder", "alignment", "output")
    loop_specs = {name: tree for name, tree in specs(cfg).items() if name in names_in_loops}
    return {**params, **jax.tree.map(gather, loop_specs, {name: params[name] for name in loop_specs})}


def _project_time_major(params: dict[str, Any], x_BTE: jax.Array) -> jax.Array:
    """The input's contribution to the gates, [T, B, G, H]. Time is not sharded, because steps are sequential."""
    return constrain(recurrence.project(params, jnp.swapaxes(x_BTE, 0, 1)), (None, "batch", None, "mlp"))


def _where(condition: jax.Array, x: Any, y: Any) -> Any:
    """``jnp.where(condition, x, y)`` for trees ``x`` and ``y`` with leaves [..., H] and a condition of shape [...]."""
    return jax.tree.map(lambda a, b: jnp.where(condition[..., None], a, b), x, y)


_LUONG = Config(
    vocab_size=50000, source_vocab_size=50000, attention="luong", score="dot", num_layers=4, embed_dim=1000,
    output_dim=1000, dropout=0.2, recurrent_init_bound=0.1,
)  # fmt: skip
# With smaller initial values, the gradients of such a small model would be too small to learn in a few steps.
_TINY = Config(
    vocab_size=128, source_vocab_size=None, embed_dim=24, hidden_dim=32, output_dim=24, dropout=0.1, init_bound=0.4,
    recurrent_init_bound=0.5,
)  # fmt: skip

VARIANTS = {
    "bahdanau-2015": Config(),
    "luong-2015": _LUONG,
    "attention-rnn-tiny": _TINY,
    "attention-rnn-luong-tiny": dataclasses.replace(
        _TINY, attention="luong", score="general", num_layers=2, init_bound=0.6
    ),
    "attention-rnn-copy-tiny": dataclasses.replace(_TINY, copy=True),
}
