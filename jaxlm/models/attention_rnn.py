"""Recurrent encoder-decoders with attention: Bahdanau et al. 2015 ("RNNsearch") and Luong et al. 2015.

    bahdanau  GRUs, the encoder in both directions. The decoder attends with its state *before* the token,
              s[t-1]; what it finds enters the GRU, and a maxout layer of s[t-1], embedding and context feeds the head.
              The first state is tanh(W h) of the backward encoder's state at the first source token.
    luong     Stacked LSTMs, the decoder's start where the encoder's end. It attends with its state *after* the token,
              h[t]; h~[t] = tanh(W [c; h]) feeds the head and, at the next token, the first layer (input feeding).

Bahdanau's maxout reads s[t-1], not s[t], as in their appendix A.2.2 and their code (GroundHog). The GRU's reset gate
acts before the product, as there; its update gate is that of ``recurrence`` (z keeps the old state). Initial values are
uniform in both forms (Luong's way). Layers and heads have biases, scores have none. A source that is to be read
backwards (Luong's best models) is given backwards.

With ``copy``, either form may copy source tokens (See et al. 2017, eq. 8 and 9, where all source ids are in the shared
vocabulary; Gulcehre et al. 2016 and Gu et al. 2016 have variants): the next token is generated with probability
sigmoid(w_s s + w_x x + w_c c + b) of decoder state, embedding and context, and copied otherwise, from source position
i with the attention weight of i. Then ``apply`` gives [features D; gate 1; copied V]: beside the features, the logit of
generating, and the distribution of copied tokens, from which ``logits`` makes the mixture.

Legend: B batch, T target time, S source time, E embedding, C encoder width (bahdanau 2H, luong H), G gates, H hidden
width, D width of what the head reads, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from jaxlm.models import common
from jaxlm.nn import recurrence
from jaxlm.nn.alignment import Score, align, alignment_keys, alignment_specs, context, copied_tokens, mix_copied
from jaxlm.nn.dropout import dropout
from jaxlm.nn.embedding import embed, padded, unembed
from jaxlm.nn.linear import linear, linear_specs
from jaxlm.nn.weight_record import record
from jaxlm.sharding import constrain
from jaxlm.spec import ArraySpec, Constant, Uniform, fold_name

Attention = Literal["bahdanau", "luong"]
Task = Literal["seq2seq", "none"]

Attend = Callable[[jax.Array], tuple[jax.Array, jax.Array]]
"""Context [B, C] and attention weights [B, S] of a query [B, H]."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Shape and behaviour of a recurrent encoder-decoder. The defaults are RNNsearch of Bahdanau et al. 2015."""

    vocab_size: int = 30000
    """Number of target token ids."""
    source_vocab_size: int | None = 30000
    """Number of source token ids, in a table of their own; None: source and target share ids and table."""
    attention: Attention = "bahdanau"
    """Form of the model: bahdanau (GRUs, attends before each step) or luong (LSTMs, attends after it)."""
    score: Score = "concat"
    """How a query is compared with the source: dot, general or concat; bahdanau takes concat (its additive score)."""
    window: int | None = None
    """Attend only so far from a place that the query picks (local-p of Luong et al. 2015); None: everywhere."""
    num_layers: int = 1
    """Number of layers of encoder and of decoder; bahdanau has one."""
    embed_dim: int = 620
    """Width of the embeddings."""
    hidden_dim: int = 1000
    """Width of each layer (of each direction, in the encoder of bahdanau)."""
    attention_dim: int | None = None
    """Width of the concat score; None means hidden_dim."""
    output_dim: int = 500
    """Width of what the head reads: maxout units (bahdanau) or the attentional state h~ (luong)."""
    copy: bool = False
    """Mix the distribution of generated tokens with the attended source tokens (See et al. 2017); needs shared ids."""
    dropout: float = 0.0
    """Dropout rate while training: on embeddings, between layers, and on what the head reads."""
    init_bound: float = 0.1
    """Initial weights are uniform within this bound."""
    recurrent_init_bound: float | None = None
    """Initial weights of the recurrent layers are uniform within this bound; None means 1 / sqrt(hidden_dim)."""
    decoder_start_id: int = 0
    """The token before the first target."""
    task: Task = "seq2seq"
    """What the head is for: seq2seq gives logits of target tokens, none has no head."""
    vocab_multiple: int = 1
    """Pad the token tables to a multiple of this many rows, so that they divide over devices."""
    dtype: common.ComputeDtype = "float32"
    """Compute dtype of activations; parameters keep their own, and the recurrent state is float32."""

    def __post_init__(self) -> None:
        common.check_positive(
            self, "vocab_size", "num_layers", "embed_dim", "hidden_dim", "output_dim", "vocab_multiple"
        )
        for name in ("source_vocab_size", "window", "attention_dim"):
            if getattr(self, name) is not None:
                common.check_positive(self, name)
        common.check_rates(self, "dropout")
        if not 0 <= self.decoder_start_id < self.vocab_size:
            raise ValueError(
                f"decoder_start_id={self.decoder_start_id} is outside the vocabulary of {self.vocab_size} ids"
            )
        common.check_choices(
            self, attention=get_args(Attention), score=get_args(Score), task=get_args(Task),
            dtype=get_args(common.ComputeDtype),
        )  # fmt: skip
        if self.attention == "bahdanau":
            for name, only in (("num_layers", 1), ("score", "concat"), ("window", None)):
                if getattr(self, name) != only:
                    raise ValueError(
                        f"attention='bahdanau' has {name}={only!r}, got {getattr(self, name)!r}: take attention='luong'"
                    )
        if self.copy:
            for name, only in (("source_vocab_size", None), ("window", None), ("task", "seq2seq")):
                if getattr(self, name) != only:
                    raise ValueError(f"copy=True needs {name}={only!r}, got {getattr(self, name)!r}")


def _layers(cfg: Config) -> list[str]:
    return [f"layer_{index}" for index in range(cfg.num_layers)]


def specs(cfg: Config) -> dict[str, Any]:
    """Every parameter of the model."""
    E, H, D, V = cfg.embed_dim, cfg.hidden_dim, cfg.output_dim, padded(cfg.vocab_size, cfg.vocab_multiple)
    A = H if cfg.attention_dim is None else cfg.attention_dim
    uniform = Uniform(cfg.init_bound)
    recurrent = None if cfg.recurrent_init_bound is None else Uniform(cfg.recurrent_init_bound)
    gated = ("embed", None, "mlp")
    tree: dict[str, Any] = {"token_embedding": ArraySpec((V, E), ("vocab", "embed"), uniform, decay=True)}
    if cfg.source_vocab_size is not None:
        rows = padded(cfg.source_vocab_size, cfg.vocab_multiple)
        tree["source_embedding"] = ArraySpec((rows, E), ("vocab", "embed"), uniform, decay=True)
    if cfg.attention == "bahdanau":
        layer, C = recurrence.gru_specs(E, H, recurrent, reset="before"), 2 * H
        tree["encoder"] = {"forward": layer, "backward": layer}
        tree["decoder"] = {
            "begin": linear_specs((H, H), ("embed", "mlp"), uniform),
            "layer_0": layer,
            "context": linear_specs((C, 3, H), gated, uniform, bias=False),  # C_r, C_z, C of the paper
        }
        tree["output"] = {
            "state": linear_specs((H, D, 2), ("embed", "mlp", None), uniform),
            "embedding": linear_specs((E, D, 2), ("embed", "mlp", None), uniform, bias=False),
            "context": linear_specs((C, D, 2), ("embed", "mlp", None), uniform, bias=False),
        }
    else:
        layers, C = {name: recurrence.lstm_specs(H if i else E, H, recurrent) for i, name in enumerate(_layers(cfg))}, H
        tree["encoder"] = layers
        tree["decoder"] = {**layers, "feed": linear_specs((D, 4, H), gated, uniform, bias=False)}
        tree["output"] = {  # together W_c of the paper
            "state": linear_specs((H, D), ("embed", "mlp"), uniform),
            "context": linear_specs((C, D), ("embed", "mlp"), uniform, bias=False),
        }
    alignment = alignment_specs(cfg.score, H, C, A, uniform, local=cfg.window is not None)
    if alignment:
        tree["alignment"] = alignment
    if cfg.copy:
        tree["copy"] = {
            name: linear_specs((width, 1), ("embed", None), uniform, bias=False)
            for name, width in (("state", H), ("embedding", E), ("context", C))
        }
        # Copying before the attention is trained costs probability: at first, mostly generate.
        tree["copy"]["bias"] = ArraySpec((1,), (None,), Constant(1.0))
    if cfg.task == "seq2seq":
        weight = ArraySpec((V, D), ("vocab", "embed"), uniform, decay=True)
        tree["head"] = {"weight": weight, "bias": ArraySpec((V,), ("vocab",))}
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
    """The encoder's states at each source token, [B, S, C]: of both directions (bahdanau) or the last layer (luong).

    Args:
        source: [B, S] integer ids. An id outside the vocabulary gives NaN.
        segment_ids: [B, S] int32, 0 padding, 1.. documents that do not see each other. Default: one document.
        key: random key for dropout; None is deterministic.
    """
    return _encode(cfg, params, source, segment_ids, key)["encoded"]


def _encode(
    cfg: Config, params: dict[str, Any], source: jax.Array, segment_ids: Any, key: jax.Array | None
) -> dict[str, Any]:
    """``encoded``, ``segment_ids``, (luong) ``states`` of each layer after each token, and (copy) the ``tokens``."""
    common.check_tokens(source, segment_ids, None, None, what="source")
    key, weights = fold_name(key, "encoder"), _gathered(cfg, params)["encoder"]
    x = _embed(cfg, params.get("source_embedding", params["token_embedding"]), source, key)
    segments = common.segments_of(source, segment_ids)
    tokens = {"tokens": jnp.asarray(source, jnp.int32)} if cfg.copy else {}
    reset, keep, _ = recurrence.borders(segments)
    if cfg.attention == "bahdanau":
        ahead = recurrence.gru(weights["forward"], x, reset_BT=reset, keep_BT=keep)[0]
        reset = recurrence.borders(segments, reverse=True)[0]
        back = recurrence.gru(weights["backward"], x, reset_BT=reset, keep_BT=keep, reverse=True)[0]
        encoded = constrain(jnp.concatenate([ahead, back], axis=-1), ("batch", None, "activation_embed"))
        return {"encoded": encoded, "segment_ids": segments, **tokens}
    states: dict[str, Any] = {}
    for name in _layers(cfg):
        if states:
            x = dropout(x, cfg.dropout, fold_name(key, name))
        states[name] = _lstm_states(weights[name], x, reset, keep)
        x = constrain(states[name]["hidden"].astype(x.dtype), ("batch", None, "activation_embed"))
    return {"encoded": x, "segment_ids": segments, "states": states, **tokens}


def _lstm_states(
    params: dict[str, Any], x_BSE: jax.Array, reset_BS: jax.Array, keep_BS: jax.Array
) -> dict[str, jax.Array]:
    """Hidden state and cell after each token, [B, S, H] float32: ``recurrence.lstm`` gives only the last cell."""

    def step(state: Any, inputs: Any) -> Any:
        projected_BGH, reset_B, keep_B = inputs
        state = _where(reset_B, jax.tree.map(jnp.zeros_like, state), state)
        state = _where(keep_B, recurrence.lstm_cell(params, projected_BGH, state), state)
        return state, state

    projected_SBGH = _projected(params, x_BSE)
    zeros_BH = jnp.zeros_like(projected_SBGH[0, :, 0], jnp.float32)
    _, states = jax.lax.scan(step, {"hidden": zeros_BH, "cell": zeros_BH}, (projected_SBGH, reset_BS.T, keep_BS.T))
    return jax.tree.map(lambda x_SBH: jnp.swapaxes(x_SBH, 0, 1), states)


def state_specs(cfg: Config, batch: int, length: int, source_length: int = 1) -> dict[str, Any]:
    """What the decoder carries: its own state, the document that each row is in, and the source.

    ``length`` does not matter. As it starts, a row has read no source; :func:`start` gives a state that has.
    """

    def places(width: int, dtype: Any) -> ArraySpec:
        return ArraySpec((batch, source_length, width), ("batch", None, "activation_embed"), dtype=dtype)

    H = cfg.hidden_dim
    segments = ArraySpec((batch, source_length), ("batch", None), dtype=jnp.int32)
    source: dict[str, Any] = {"encoded": places(H, cfg.dtype), "segment_ids": segments}
    if cfg.copy:
        source["tokens"] = segments
    if cfg.attention == "bahdanau":
        decoder: dict[str, Any] = {"layer_0": recurrence.gru_state_specs(batch, H)}
        source["encoded"] = places(2 * H, cfg.dtype)
    else:
        decoder = {name: recurrence.lstm_state_specs(batch, H) for name in _layers(cfg)}
        decoder["feed"] = ArraySpec((batch, cfg.output_dim), ("batch", "activation_embed"))
        state = {name: places(H, jnp.float32) for name in ("hidden", "cell")}
        source["states"] = dict.fromkeys(_layers(cfg), state)
    if cfg.score == "concat":
        source["key"] = places(H if cfg.attention_dim is None else cfg.attention_dim, cfg.dtype)
    elif cfg.score == "general":
        source["key"] = places(H, cfg.dtype)
    return {"decoder": decoder, "document": ArraySpec((batch,), ("batch",), dtype=jnp.int32), "source": source}


def start(
    cfg: Config, params: dict[str, Any], source: jax.Array, length: int, *, segment_ids: jax.Array | None = None
) -> dict[str, Any]:
    """A state that has read ``source`` [B, S] and is about to decode its first document; it has room for any length.

    Without segment ids of their own, target tokens are document 1 and see document 1 of the source.
    """
    return _start(cfg, params, source, segment_ids, None)


def _start(
    cfg: Config, params: dict[str, Any], source: jax.Array, segment_ids: Any, key: jax.Array | None
) -> dict[str, Any]:
    read = _encode(cfg, params, source, segment_ids, key)
    segments = read["segment_ids"]
    if cfg.score != "dot":
        read["key"] = alignment_keys(params["alignment"], read["encoded"])
    first_B1 = jnp.take_along_axis(segments, jnp.argmax(segments > 0, axis=1)[:, None], axis=1)
    decoder = jax.tree.map(lambda x_B1H: x_B1H[:, 0], _beginnings(cfg, params, read, first_B1))
    return {"decoder": decoder, "document": first_B1[:, 0], "source": read}


def _beginnings(cfg: Config, params: dict[str, Any], read: dict[str, Any], documents_BT: jax.Array) -> dict[str, Any]:
    """The decoder's state before the first token of given documents, [B, T, ...]; zeros if there is no such source.

    Rows may share sources (``common.by_source``).
    """
    shape, documents_BT = documents_BT.shape, common.by_source(documents_BT, read["segment_ids"].shape[0])
    here_BTS = read["segment_ids"][:, None, :] == documents_BT[:, :, None]
    some_BT = jnp.any(here_BTS, axis=-1)

    def at(x_BSH: jax.Array, places_BT: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x_BSH, places_BT[:, :, None], axis=1)

    if cfg.attention == "bahdanau":
        back_BTH = at(read["encoded"][:, :, cfg.hidden_dim :], jnp.argmax(here_BTS, axis=-1))
        hidden_BTH = jnp.tanh(linear(params["decoder"]["begin"], back_BTH)).astype(jnp.float32)
        state: dict[str, Any] = {"layer_0": {"hidden": hidden_BTH}}
    else:
        last_BT = here_BTS.shape[-1] - 1 - jnp.argmax(jnp.flip(here_BTS, axis=-1), axis=-1)
        state = jax.tree.map(lambda x_BSH: at(x_BSH, last_BT), read["states"])
        state["feed"] = jnp.zeros((*documents_BT.shape, cfg.output_dim))
    state = _where(some_BT, state, jax.tree.map(jnp.zeros_like, state))
    return jax.tree.map(lambda x: x.reshape(*shape, *x.shape[2:]), state)


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
    key: jax.Array | None = None,
) -> tuple[jax.Array, Any]:
    """What the head reads at each target token (dropped, when training), [B, T, D], and the new state (None without).

    Takes a source (training: it is encoded, then decoded) or a state (decoding), exactly one of them.

    Args:
        tokens: [B, T] integer ids, beginning with one that stands before the first target. An id outside the vocabulary
            gives NaN, there and from there on.
        source: [B, S] integer ids.
        source_segment_ids: [B, S] int32, as ``segment_ids``; target document n sees source document n.
        state: from :func:`start`; the tokens then continue what it holds. Rows may share sources
            (``common.by_source``).
        segment_ids: [B, T] int32, 0 padding, 1.. documents that do not see each other. Default: one document.
        key: random key for dropout; None is deterministic.
    """
    common.check_tokens(tokens, segment_ids, None, None)
    common.check_source(tokens, source, source_segment_ids, state)
    params = _gathered(cfg, params)
    old = _start(cfg, params, source, source_segment_ids, key) if state is None else state  # type: ignore[arg-type]
    read, segments = old["source"], common.segments_of(tokens, segment_ids)
    reset, keep, document = recurrence.borders(segments, old["document"])
    one_document = state is None and segment_ids is None and source_segment_ids is None
    beginnings = None if one_document else _beginnings(cfg, params, read, segments)
    key = fold_name(key, "decoder")
    x = _embed(cfg, params["token_embedding"], tokens, key)
    steps = fold_name(key, "steps")
    step_keys = None if steps is None else jax.random.split(steps, tokens.shape[1])

    def step(carry: Any, inputs: Any) -> Any:
        projected_BGH, segment_B, reset_B, keep_B, beginning, step_key = inputs
        if beginning is not None:
            carry = _where(reset_B, beginning, carry)

        def one(query_BH: jax.Array, segment_B: jax.Array) -> tuple[jax.Array, jax.Array]:
            keys_BSA = read.get("key", read["encoded"])
            visible_BS = read["segment_ids"] == segment_B[:, None]
            weights_BS = align(params.get("alignment", {}), query_BH, keys_BSA, visible_BS, window=cfg.window)
            return context(weights_BS, read["encoded"]), weights_BS

        def attend(query_BH: jax.Array) -> tuple[jax.Array, jax.Array]:
            rows, sources = query_BH.shape[0], read["segment_ids"].shape[0]
            if rows == sources:
                return one(query_BH, segment_B)
            queries, segments = (common.by_source(x[:, None], sources) for x in (query_BH, segment_B))
            found = jax.vmap(one, in_axes=1, out_axes=1)(queries, segments)
            return jax.tree.map(lambda x: x.reshape(rows, *x.shape[2:]), found)

        if cfg.attention == "bahdanau":
            new, output = _bahdanau_step(params["decoder"], attend, projected_BGH, carry)
        else:
            new, output = _luong_step(cfg, params, attend, projected_BGH, carry, step_key)
        return _where(keep_B, new, carry), output

    by_time = jax.tree.map(lambda x_BT: jnp.swapaxes(x_BT, 0, 1), (segments, reset, keep, beginnings))
    projected_TBGH = _projected(params["decoder"]["layer_0"], x)
    decoder, outputs = jax.lax.scan(step, old["decoder"], (projected_TBGH, *by_time, step_keys))
    outputs = jax.tree.map(lambda x_TB: jnp.swapaxes(x_TB, 0, 1), outputs)
    record(outputs["weights"][:, None], "source")
    hidden = _maxout(params["output"], x, outputs) if cfg.attention == "bahdanau" else outputs["attentional"]
    hidden = constrain(dropout(hidden, cfg.dropout, fold_name(key, "output")), ("batch", "seq", "activation_embed"))
    if cfg.copy:
        hidden = _with_copied(cfg, params["copy"], hidden, x, outputs, read["tokens"])
    return hidden, None if state is None else {"decoder": decoder, "document": document, "source": read}


def _bahdanau_step(weights: dict[str, Any], attend: Attend, projected_BGH: jax.Array, carry: Any) -> tuple[Any, Any]:
    """Bahdanau et al. 2015, appendix A.2.2: the next state, and s[t-1], c[t] and the attention weights."""
    state_BH = carry["layer_0"]["hidden"].astype(projected_BGH.dtype)
    context_BC, weights_BS = attend(state_BH)
    projected_BGH = projected_BGH + linear(weights["context"], context_BC)
    new = {"layer_0": recurrence.gru_cell(weights["layer_0"], projected_BGH, carry["layer_0"])}
    return new, {"state": state_BH, "context": context_BC, "weights": weights_BS}


def _maxout(weights: dict[str, Any], x_BTE: jax.Array, outputs: dict[str, jax.Array]) -> jax.Array:
    """The larger of each two of U s + V e + C c (Goodfellow et al. 2013), [B, T, D]."""
    inputs = {"state": outputs["state"], "embedding": x_BTE, "context": outputs["context"]}
    pairs_BTD2 = sum(linear(weights[name], x) for name, x in inputs.items())
    return jnp.max(pairs_BTD2, axis=-1)


def _luong_step(
    cfg: Config, params: dict[str, Any], attend: Attend, projected_BGH: jax.Array, carry: Any, key: jax.Array | None
) -> tuple[Any, Any]:
    """Luong et al. 2015, section 3: the next state, and h[t], c[t], the attention weights and h~[t]."""
    weights, output, dtype = params["decoder"], params["output"], projected_BGH.dtype
    projected_BGH = projected_BGH + linear(weights["feed"], carry["feed"].astype(dtype))
    new = {"layer_0": recurrence.lstm_cell(weights["layer_0"], projected_BGH, carry["layer_0"])}
    x_BH = new["layer_0"]["hidden"].astype(dtype)
    for name in _layers(cfg)[1:]:
        projected_BGH = recurrence.project(weights[name], dropout(x_BH, cfg.dropout, fold_name(key, name)))
        new[name] = recurrence.lstm_cell(weights[name], projected_BGH, carry[name])
        x_BH = new[name]["hidden"].astype(dtype)
    context_BC, weights_BS = attend(x_BH)
    attentional_BD = jnp.tanh(linear(output["state"], x_BH) + linear(output["context"], context_BC))
    outputs = {"state": x_BH, "context": context_BC, "weights": weights_BS, "attentional": attentional_BD}
    return {**new, "feed": attentional_BD.astype(jnp.float32)}, outputs


def _with_copied(
    cfg: Config,
    params: dict[str, Any],
    features_BTD: jax.Array,
    x_BTE: jax.Array,
    outputs: dict[str, jax.Array],
    source_BS: jax.Array,
) -> jax.Array:
    """[features D; gate 1; copied V]: See et al. 2017, eq. 8, and the sum over the source in eq. 9."""
    inputs = {"state": outputs["state"], "embedding": x_BTE, "context": outputs["context"]}
    bias_BT1 = params["bias"].astype(features_BTD.dtype)[None, None, :]
    gate_BT1 = sum((linear(params[name], x) for name, x in inputs.items()), bias_BT1)
    weights_BTS = common.by_source(outputs["weights"], source_BS.shape[0])
    copied_BTV = copied_tokens(weights_BTS, source_BS, padded(cfg.vocab_size, cfg.vocab_multiple))
    copied_BTV = copied_BTV.reshape(*x_BTE.shape[:2], -1)
    hidden = jnp.concatenate([features_BTD, gate_BT1, copied_BTV.astype(features_BTD.dtype)], axis=-1)
    return constrain(hidden, ("batch", "seq", "activation_embed"))


def logits(cfg: Config, params: dict[str, Any], hidden: jax.Array) -> jax.Array:
    """Unnormalised log-probabilities of the next target token, [B, T, V] float32 (V padded to ``vocab_multiple``).

    With ``copy``, those of the mixture of generated and copied tokens.

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


# --------------------------------------------------------------------------------------------------- small things


def _embed(cfg: Config, table_VE: jax.Array, ids: jax.Array, key: jax.Array | None) -> jax.Array:
    x = dropout(embed(table_VE, ids, jnp.dtype(cfg.dtype)), cfg.dropout, fold_name(key, "embedding"))
    return constrain(x, ("batch", "seq", "activation_embed"))


def _gathered(cfg: Config, params: dict[str, Any]) -> dict[str, Any]:
    """Fully sharded weights are gathered once, before the loops over time, and not in each of their steps.

    Not only for speed: with them split over ``fsdp`` inside a loop, XLA gives wrong gradients under data=2, fsdp=2,
    tensor=2 (jax 0.10.2 on CPU; the contract test of the sharded step sees it).
    """

    def whole(leaf: ArraySpec, x: jax.Array) -> jax.Array:
        return constrain(x, tuple("activation_embed" if axis == "embed" else axis for axis in leaf.axes))

    inside = {name: own for name, own in specs(cfg).items() if name in ("encoder", "decoder", "alignment", "output")}
    return {**params, **jax.tree.map(whole, inside, {name: params[name] for name in inside})}


def _projected(params: dict[str, Any], x_BTE: jax.Array) -> jax.Array:
    # A split of time ends here: the steps go one after the other.
    return constrain(recurrence.project(params, jnp.swapaxes(x_BTE, 0, 1)), (None, "batch", None, "mlp"))


def _where(choose: jax.Array, one: Any, other: Any) -> Any:
    """Of two trees [..., H], the first where ``choose`` [...] is True."""
    return jax.tree.map(lambda a, b: jnp.where(choose[..., None], a, b), one, other)


_LUONG = Config(
    vocab_size=50000, source_vocab_size=50000, attention="luong", score="dot", num_layers=4, embed_dim=1000,
    output_dim=1000, dropout=0.2, recurrent_init_bound=0.1,
)  # fmt: skip
# Wide initial values: so small a model otherwise starts with too small gradients to learn anything in a few steps.
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
