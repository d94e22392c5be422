"""LSTMs that attend to their own outputs: a language model (Daniluk et al. 2017) and a classifier (Lin et al. 2017).

    causal          "Frustratingly Short Attention Spans", section 2. Each output h[t] asks the outputs before it, the
                    last ``window`` of its document: a = softmax(v . tanh(Y k[s] + W k[t])), r = sum a v[s], and the
                    head reads tanh(R r + X p[t]). Key k, value v and prediction p are all h (``parts`` 1), or the
                    halves or thirds of h: key-value (p = v) and key-value-predict attention.
    classification  "A Structured Self-attentive Sentence Embedding". LSTMs in both directions, pooled by ``hops``
                    attentions without a query, side by side. One hop is the attention of Yang et al. 2016 (theirs over
                    GRUs). The two-layer classifier of Lin et al. is one layer here.

The first token of a document has nothing to attend to: r is 0. No size here is a published one.

Legend: B batch, T time, S time of what is attended to, M slots of the memory, H hidden width, K width of a part, D
width of hidden states (causal K, classification 2H), A attention width, R hops, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from jaxlm.models import common, heads
from jaxlm.nn import memory
from jaxlm.nn.alignment import (
    additive_scores,
    alignment_keys,
    alignment_specs,
    context,
    masked_softmax,
    pooling_specs,
    pooling_weights,
)
from jaxlm.nn.dropout import dropout
from jaxlm.nn.embedding import embed, padded, unembed
from jaxlm.nn.linear import linear, linear_specs
from jaxlm.nn.recurrence import borders, lstm, lstm_specs, lstm_state_specs
from jaxlm.nn.weight_record import record
from jaxlm.sharding import constrain
from jaxlm.spec import ArraySpec, Uniform, fold_name

Task = Literal["causal", "classification"]


@dataclasses.dataclass(frozen=True)
class Config:
    """Shape and behaviour of an LSTM with attention."""

    vocab_size: int = 10000
    """Number of token ids."""
    num_layers: int = 1
    """Number of LSTM layers."""
    embed_dim: int = 300
    """Width of the embeddings."""
    hidden_dim: int = 600
    """Width of each LSTM layer (of each direction, with task classification)."""
    parts: int = 1
    """With task causal, parts of an output: 1 for all purposes, 2 (key, value) or 3 (key, value, prediction)."""
    window: int | None = 5
    """With task causal, how many outputs before it a token attends to; None: all of its document."""
    attention_dim: int = 350
    """With task classification, width of the layer that weighs the tokens."""
    hops: int = 1
    """With task classification, how often the text is pooled, each time with weights of its own."""
    dropout: float = 0.2
    """Dropout rate while training: on embeddings, between layers, and on the hidden states that are given."""
    init_bound: float = 0.1
    """Initial embeddings, attention and heads are uniform within this bound."""
    recurrent_init_bound: float | None = None
    """Initial weights of the LSTM layers are uniform within this bound; None means 1 / sqrt(hidden_dim)."""
    task: Task = "causal"
    """What the model is for: causal reads forward and predicts tokens, classification reads in both directions."""
    num_labels: int = 2
    """Number of labels (with task classification)."""
    vocab_multiple: int = 1
    """Pad the token table to a multiple of this many rows, so that it divides over devices."""
    dtype: common.ComputeDtype = "float32"
    """Compute dtype of activations; parameters keep their own, and the recurrent state is float32."""

    def __post_init__(self) -> None:
        common.check_positive(
            self, "vocab_size", "num_layers", "embed_dim", "hidden_dim", "attention_dim", "hops", "num_labels",
            "vocab_multiple",
        )  # fmt: skip
        if self.window is not None:
            common.check_positive(self, "window")
        common.check_rates(self, "dropout")
        common.check_choices(self, parts=(1, 2, 3), task=get_args(Task), dtype=get_args(common.ComputeDtype))
        if self.hidden_dim % self.parts:
            raise ValueError(f"parts={self.parts} does not divide hidden_dim={self.hidden_dim}: change one of them")


def specs(cfg: Config) -> dict[str, Any]:
    """Every parameter of the model."""
    V, H, K = padded(cfg.vocab_size, cfg.vocab_multiple), cfg.hidden_dim, cfg.hidden_dim // cfg.parts
    uniform = Uniform(cfg.init_bound)
    recurrent = None if cfg.recurrent_init_bound is None else Uniform(cfg.recurrent_init_bound)
    tree: dict[str, Any] = {"token_embedding": ArraySpec((V, cfg.embed_dim), ("vocab", "embed"), uniform, decay=True)}
    directions = 1 if cfg.task == "causal" else 2
    inputs = cfg.embed_dim
    for index in range(cfg.num_layers):
        layer = lstm_specs(inputs, H, recurrent)
        tree[f"layer_{index}"] = layer if directions == 1 else {"forward": layer, "backward": layer}
        inputs = directions * H
    if cfg.task == "classification":
        tree["pooling"] = pooling_specs(inputs, cfg.attention_dim, cfg.hops, uniform)
        return tree | heads.head_specs(cfg.task, cfg.hops * inputs, cfg.num_labels, uniform)
    tree["alignment"] = alignment_specs("concat", K, K, K, uniform)
    tree["output"] = {
        "found": linear_specs((K, K), ("embed", "mlp"), uniform, bias=False),
        "state": linear_specs((K, K), ("embed", "mlp"), uniform),
    }
    weight = ArraySpec((V, K), ("vocab", "embed"), uniform, decay=True)
    tree["head"] = {"weight": weight, "bias": ArraySpec((V,), ("vocab",))}
    return tree


def state_specs(cfg: Config, batch: int, length: int) -> dict[str, Any]:
    """The state of each layer, the document of each row, and a memory of keys and values side by side.

    The memory rolls: it holds the last ``window`` outputs, or ``length`` if that is less or there is no window.

    Raises:
        TypeError: the model reads in both directions.
    """
    if cfg.task != "causal":
        raise TypeError(f"task={cfg.task!r} needs the whole sequence at once: only task='causal' carries a state")
    slots, K = length if cfg.window is None else min(length, cfg.window), cfg.hidden_dim // cfg.parts
    return {
        **{f"layer_{index}": lstm_state_specs(batch, cfg.hidden_dim) for index in range(cfg.num_layers)},
        "last_segment": ArraySpec((batch,), ("batch",), dtype=jnp.int32),
        "memory": memory.memory_specs(None, batch, slots, 2 * K, cfg.dtype),
    }


def apply(
    cfg: Config,
    params: dict[str, Any],
    tokens: jax.Array,
    *,
    state: Any = None,
    segment_ids: jax.Array | None = None,
    key: jax.Array | None = None,
) -> tuple[jax.Array, Any]:
    """Hidden states (dropped, when training), [B, T, D], and the new state (None without one).

    Args:
        tokens: [B, T] integer ids. An id outside the vocabulary gives NaN.
        state: from ``state_specs``; the tokens then continue what it has read.
        segment_ids: [B, T] int32, 0 padding, 1.. documents that do not see each other. Default: one document.
        key: random key for dropout; None is deterministic.
    """
    common.check_tokens(tokens, segment_ids, None, None)
    if state is not None and cfg.task != "causal":
        raise ValueError(f"task={cfg.task!r} needs the whole sequence at once and carries no state: leave state out")
    segments = common.segments_of(tokens, segment_ids)
    reset, keep, last_segment = borders(segments, None if state is None else state["last_segment"])
    back_reset = borders(segments, reverse=True)[0]
    new_state: dict[str, Any] = {"last_segment": last_segment}
    x = embed(params["token_embedding"], tokens, jnp.dtype(cfg.dtype))
    for index in range(cfg.num_layers):
        name = f"layer_{index}"
        x = constrain(x, ("batch", "seq", "activation_embed"))
        x, weights = dropout(x, cfg.dropout, fold_name(key, name)), params[name]
        if cfg.task == "causal":
            old = None if state is None else state[name]
            x, new_state[name] = lstm(weights, x, old, reset_BT=reset, keep_BT=keep)
        else:
            ahead, _ = lstm(weights["forward"], x, reset_BT=reset, keep_BT=keep)
            back, _ = lstm(weights["backward"], x, reset_BT=back_reset, keep_BT=keep, reverse=True)
            x = jnp.concatenate([ahead, back], axis=-1)
    x = constrain(x, ("batch", "seq", "activation_embed"))
    if cfg.task == "causal":
        x, new_state["memory"] = _attend(cfg, params, x, tokens, None if state is None else state["memory"], segments)
    x = constrain(dropout(x, cfg.dropout, fold_name(key, "output")), ("batch", "seq", "activation_embed"))
    return x, None if state is None else new_state


def _attend(
    cfg: Config, params: dict[str, Any], x_BTH: jax.Array, tokens_BT: jax.Array, old: Any, segments_BT: jax.Array
) -> tuple[jax.Array, Any]:
    """Outputs after their look at those before them, [B, T, K], and the new memory."""
    parts = jnp.split(x_BTH, cfg.parts, axis=-1)
    key_BTK, value_BTK, predict_BTK = parts[0], parts[min(1, cfg.parts - 1)], parts[-1]
    own = params["alignment"]
    query_BTK = linear(own["query"], key_BTK)
    both_BTX = both_BSX = jnp.concatenate([alignment_keys(own, key_BTK), value_BTK], axis=-1)
    place, new = memory.span(tokens_BT, old, segments_BT)
    mask = place.mask
    if old is not None:
        both_BSX = jnp.concatenate([old["hidden"], both_BTX], axis=1)
        new = {**new, "hidden": memory.append(old["hidden"], both_BTX, place.kept)}
    keys_BSK, values_BSK = jnp.split(both_BSX, 2, axis=-1)

    def look(one: Any) -> jax.Array:
        query_BK, position_B, segment_B = one
        distance_BS = position_B[:, None] - place.key_positions
        seen_BS = (mask.key_segments == segment_B[:, None]) & (distance_BS > 0)
        if cfg.window is not None:
            seen_BS &= distance_BS <= cfg.window
        return context(masked_softmax(additive_scores(query_BK, keys_BSK, own["score"]), seen_BS), values_BSK)

    by_time = jax.tree.map(lambda x_BT: jnp.swapaxes(x_BT, 0, 1), (query_BTK, place.query_positions, segments_BT))
    found_BTK = jnp.swapaxes(jax.lax.map(look, by_time), 0, 1)
    output = params["output"]
    return jnp.tanh(linear(output["found"], found_BTK) + linear(output["state"], predict_BTK)), new


def logits(cfg: Config, params: dict[str, Any], hidden: jax.Array) -> jax.Array:
    """Logits of the next token from hidden states, [B, T, V] (V padded to ``vocab_multiple``), or of the labels from
    ``summary``, [B, 1, labels]; float32."""
    if cfg.task == "classification":
        return heads.head_logits(cfg.task, params, hidden)
    scores = unembed(params["head"]["weight"], hidden, cfg.vocab_size)
    return constrain(scores + params["head"]["bias"].astype(jnp.float32)[None, None, :], ("batch", None, "vocab"))


def summary(
    cfg: Config,
    params: dict[str, Any],
    hidden: jax.Array,
    segment_ids: jax.Array | None = None,
    key: jax.Array | None = None,
) -> jax.Array:
    """What each hop finds in the real tokens of each row, side by side, [B, 1, R * 2H]: what the classifier reads."""
    weights_BRT = attention_weights(cfg, params, hidden, segment_ids)
    record(weights_BRT[:, :, None], "pool")
    pooled_BRD = jnp.einsum("BRT,BTD->BRD", weights_BRT.astype(hidden.dtype), hidden)
    return pooled_BRD.reshape(hidden.shape[0], 1, -1)


def attention_weights(
    cfg: Config, params: dict[str, Any], hidden: jax.Array, segment_ids: jax.Array | None = None
) -> jax.Array:
    """How much each hop attends to each token, [B, R, T] float32; rows sum to 1 over the real tokens.

    Raises:
        ValueError: the model does not pool.
    """
    if cfg.task != "classification":
        raise ValueError(f"task={cfg.task!r} pools nothing: take task='classification'")
    return pooling_weights(params["pooling"], hidden, None if segment_ids is None else segment_ids > 0)


def redundancy(weights_BRT: jax.Array) -> jax.Array:
    """What Lin et al. 2017 (eq. 8) add to the loss so that hops differ, ``|A A' - I|^2`` (Frobenius), [B] float32."""
    product_BRR = jnp.einsum("BRT,BQT->BRQ", weights_BRT, weights_BRT)
    return jnp.sum(jnp.square(product_BRR - jnp.eye(weights_BRT.shape[1])[None]), axis=(1, 2))


# Wide initial values: so small a model otherwise starts with too small gradients to learn anything in a few steps.
_TINY = Config(
    vocab_size=128, num_layers=2, embed_dim=24, hidden_dim=48, attention_dim=16, init_bound=0.5,
    recurrent_init_bound=0.5,
)  # fmt: skip

VARIANTS = {
    "attention-rnn-lm-tiny": dataclasses.replace(_TINY, window=None),
    "attention-rnn-classifier-tiny": dataclasses.replace(_TINY, hidden_dim=16, task="classification", hops=2),
}
