"""LSTMs with self-attention: a language model (Daniluk et al. 2017) and a classifier (Lin et al. 2017).

    causal          "Frustratingly Short Attention Spans", section 2. Each output h[t] attends to the previous
                    ``window`` outputs of its document: a = softmax(w . tanh(W_Y k[s] + W_h k[t])), r = sum a v[s]. The
                    head reads tanh(W_r r + W_x p[t]). With ``parts=1``, key k, value v and prediction p are all h. With
                    ``parts=2`` (key-value attention), k and v are halves of h, and p is v. With ``parts=3``
                    (key-value-predict attention), k, v and p are thirds of h.
    classification  "A Structured Self-attentive Sentence Embedding". Bidirectional LSTMs, pooled by ``hops`` parallel
                    attentions without a query. One hop is the attention of Yang et al. 2016, who used GRUs. The
                    classification head here is one linear layer; Lin et al. use two layers.

The first token of a document has no previous output, so its r is 0. The default sizes are not those of the papers.

Shapes: B batch, T time, S key time, H hidden width, K width of a part, X = 2K (a key and a value), D width
of hidden states (causal K, classification 2H), A attention width, R hops, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxlm.models import common, heads, recurrent
from jaxlm.nn.alignment import (
    additive_scores,
    alignment_keys,
    alignment_specs,
    context,
    masked_softmax,
    pooling_specs,
    pooling_weights,
)
from jaxlm.nn.attention import memory
from jaxlm.nn.dropout import dropout
from jaxlm.nn.embedding import embed
from jaxlm.nn.linear import linear, linear_specs
from jaxlm.nn.recurrence import lstm, lstm_specs, lstm_state_specs
from jaxlm.nn.segments import segment_boundaries
from jaxlm.nn.weight_record import record
from jaxlm.sharding import constrain
from jaxlm.spec import ArraySpec, Params, State, Uniform, fold_in_name

Task = Literal["causal", "classification"]


@dataclasses.dataclass(frozen=True)
class Config(common.ModelConfig):
    """Shape and behavior of an LSTM with self-attention."""

    vocab_size: int = 10000
    """Number of token ids."""
    num_layers: int = 1
    """Number of LSTM layers."""
    embed_dim: int = 300
    """Width of the embeddings."""
    hidden_dim: int = 600
    """Width of each LSTM layer (of each direction if the task is classification)."""
    parts: Literal[1, 2, 3] = 1
    """For task causal, number of parts of an output: 1 (the whole output is key, value and prediction), 2 (key; value,
    which is also the prediction), or 3 (key, value, prediction)."""
    window: int | None = 5
    """For task causal, number of previous outputs that a token attends to; None means all outputs of its document."""
    attention_dim: int = 350
    """For task classification, hidden width of the pooling attention."""
    hops: int = 1
    """For task classification, number of pooling attentions, each with its own weights."""
    dropout: float = 0.2
    """Dropout rate on embeddings, between layers, and on the hidden states that ``apply`` returns."""
    init_bound: float = 0.1
    """Initial weights of embeddings, attention and heads are uniform in [-init_bound, init_bound]."""
    recurrent_init_bound: float | None = None
    """Bound of the uniform initial weights of the LSTM layers; None means 1 / sqrt(hidden_dim)."""
    task: Task = "causal"
    """Type of the model: causal (unidirectional, predicts tokens) or classification (bidirectional)."""
    num_labels: int = 2
    """Number of labels if the task is classification."""

    def __post_init__(self) -> None:
        super().__post_init__()
        common.check_divides(self, "parts", "hidden_dim")


def apply(
    cfg: Config,
    params: Params,
    tokens: jax.Array,
    *,
    state: State | None = None,
    segment_ids: jax.Array | None = None,
    key: jax.Array | None = None,
) -> tuple[jax.Array, State | None]:
    """The hidden states after dropout, [B, T, D], and the new state (None without a state).

    Args:
        tokens: [B, T] integer ids. An id outside the vocabulary gives NaN for all tokens of the row (causal) or of its
            document (classification).
        state: the state that the previous call returned, or the initial state (``state_specs``). No gradient flows
            through the memory to earlier calls.
        segment_ids: [B, T] int32, 0 for padding and n for document n. Documents do not interact. Default: one document.
        key: random key for dropout; None: no dropout.

    Raises:
        ValueError: the inputs are not integers of the same shape, or there is a state and the task is not causal.
    """
    common.check_tokens(tokens, segment_ids)
    if state is not None and cfg.task != "causal":
        raise ValueError(f"task={cfg.task!r} reads the whole sequence at once and carries no state: leave state=None")
    common.check_numbered_layers(params, state, cfg.num_layers)
    segments = common.segment_ids_or_ones(tokens, segment_ids)
    reset, keep, last_segment = segment_boundaries(segments, None if state is None else state["last_segment"])
    new_state: dict[str, Any] = {"last_segment": last_segment}
    x = embed(params["token_embedding"], tokens, jnp.dtype(cfg.dtype), size=cfg.vocab_size)
    for index in range(cfg.num_layers):
        name = f"layer_{index}"
        x = constrain(x, ("batch", "seq", "activation_embed"))
        x, weights = dropout(x, cfg.dropout, fold_in_name(key, name)), params[name]
        if cfg.task == "causal":
            layer_state = None if state is None else state[name]
            x, new_state[name] = lstm(weights, x, layer_state, reset_BT=reset, keep_BT=keep)
        else:
            x = recurrent.bidirectional(lstm, weights, x, segments)
    x = constrain(x, ("batch", "seq", "activation_embed"))
    if cfg.task == "causal":
        x, new_state["memory"] = _attend(cfg, params, x, tokens, None if state is None else state["memory"], segments)
    x = constrain(dropout(x, cfg.dropout, fold_in_name(key, "output")), ("batch", "seq", "activation_embed"))
    return x, None if state is None else new_state


def _attend(
    cfg: Config,
    params: Params,
    x_BTH: jax.Array,
    tokens_BT: jax.Array,
    old_memory: Any,
    segments_BT: jax.Array,
) -> tuple[jax.Array, Any]:
    """The inputs of the head, tanh(W_r r + W_x p), [B, T, K], and the new memory (None without ``old_memory``).

    The memory contains the projected keys and the values of previous outputs, concatenated.
    """
    parts = jnp.split(x_BTH, cfg.parts, axis=-1)
    key_BTK, value_BTK, prediction_BTK = parts[0], parts[min(1, cfg.parts - 1)], parts[-1]
    weights = params["alignment"]
    query_BTK = linear(weights["query"], key_BTK)
    kv_BTX = kv_BSX = jnp.concatenate([alignment_keys(weights, key_BTK), value_BTK], axis=-1)
    memory_context, new_memory = memory.make_context(tokens_BT, old_memory, segments_BT)
    if old_memory is not None:
        kv_BSX = jnp.concatenate([old_memory["hidden"], kv_BTX], axis=1)
        new_memory = {**new_memory, "hidden": memory.append(old_memory["hidden"], kv_BTX, memory_context)}
    keys_BSK, values_BSK = jnp.split(kv_BSX, 2, axis=-1)

    def attend_step(inputs: Any) -> jax.Array:
        query_BK, position_B, document_B = inputs
        distance_BS = position_B[:, None] - memory_context.key_positions
        visible_BS = (memory_context.mask.key_segments == document_B[:, None]) & (distance_BS > 0)
        if cfg.window is not None:
            visible_BS &= distance_BS <= cfg.window
        scores_BS = additive_scores(query_BK, keys_BSK, weights["score"])
        return context(masked_softmax(scores_BS, visible_BS), values_BSK)

    time_major = jax.tree.map(
        lambda x_BT: jnp.swapaxes(x_BT, 0, 1),
        (query_BTK, memory_context.query_positions, memory_context.mask.query_segments),
    )
    context_BTK = jnp.swapaxes(jax.lax.map(attend_step, time_major), 0, 1)
    output_weights = params["output"]  # "found" is W_r, and "state" is W_x
    projected_context_BTK = linear(output_weights["found"], context_BTK)
    return jnp.tanh(projected_context_BTK + linear(output_weights["state"], prediction_BTK)), new_memory


logits = heads.decoder_logits


def pool(
    cfg: Config,
    params: Params,
    hidden: jax.Array,
    segment_ids: jax.Array | None = None,
    key: jax.Array | None = None,
) -> jax.Array:
    """The pooled output, [B, 1, R * 2H]: the weighted means of a row's hidden states, one mean per hop, concatenated.

    ``key`` has no effect.

    Raises:
        ValueError: the task is not classification.
    """
    weights_BRT = attention_weights(cfg, params, hidden, segment_ids)
    record(weights_BRT[:, :, None], "pool")
    pooled_BRD = jnp.einsum("BRT,BTD->BRD", weights_BRT.astype(hidden.dtype), hidden)
    return heads.concatenate_features(pooled_BRD)


def attention_weights(
    cfg: Config, params: Params, hidden: jax.Array, segment_ids: jax.Array | None = None
) -> jax.Array:
    """The pooling weights of each hop for each token, [B, R, T] float32.

    The weights of a hop are 0 for padding and sum to 1. In a row without real tokens, all weights are 0.

    Raises:
        ValueError: the task is not classification.
    """
    if cfg.task != "classification":
        raise ValueError(f"task={cfg.task!r} has no pooling attention: use task='classification'")
    return pooling_weights(params["pooling"], hidden, None if segment_ids is None else segment_ids > 0)


def redundancy(weights_BRT: jax.Array) -> jax.Array:
    """The penalty ``|W W^T - I|^2`` (Frobenius norm) of each row, [B] float32 (Lin et al. 2017, eq. 8).

    W is ``weights_BRT`` of a row (A in the paper). If this penalty is added to the loss, the hops learn to attend to
    different tokens.
    """
    product_BRR = jnp.einsum("BRT,BQT->BRQ", weights_BRT, weights_BRT)
    return jnp.sum(jnp.square(product_BRR - jnp.eye(weights_BRT.shape[1])[None]), axis=(1, 2))


def specs(cfg: Config) -> dict[str, Any]:
    """The specs of all parameters."""
    H, K = cfg.hidden_dim, cfg.hidden_dim // cfg.parts
    uniform = Uniform(cfg.init_bound)
    recurrent_init = None if cfg.recurrent_init_bound is None else Uniform(cfg.recurrent_init_bound)
    tree: dict[str, Any] = {"token_embedding": heads.table_specs(cfg, cfg.embed_dim, uniform)}
    directions = 1 if cfg.task == "causal" else 2
    inputs = cfg.embed_dim
    for index in range(cfg.num_layers):
        layer = lstm_specs(inputs, H, recurrent_init)
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
    tree["head"] = {"weight": heads.table_specs(cfg, K, uniform), "bias": heads.vocab_bias_specs(cfg)}
    return tree


def state_specs(cfg: Config, batch: int, length: int) -> dict[str, Any]:
    """The specs of each layer's state, each row's last segment id, and a memory of keys and values.

    The memory has ``min(window, length)`` slots, or ``length`` slots without a window. A full memory drops its oldest
    entry. So without a window, a token attends to at most ``length`` previous outputs of earlier calls.

    Raises:
        TypeError: the task is not causal.
    """
    if cfg.task != "causal":
        raise TypeError(f"task={cfg.task!r} reads the whole sequence at once: only task='causal' carries a state")
    slots, K = length if cfg.window is None else min(length, cfg.window), cfg.hidden_dim // cfg.parts
    return {
        **{f"layer_{index}": lstm_state_specs(batch, cfg.hidden_dim) for index in range(cfg.num_layers)},
        "last_segment": ArraySpec((batch,), ("batch",), dtype=jnp.int32),
        "memory": memory.memory_specs(None, batch, slots, 2 * K, cfg.dtype),
    }


# With smaller initial values, the gradients of such a small model would be too small to learn in a few steps.
_TINY = Config(
    vocab_size=128, num_layers=2, embed_dim=24, hidden_dim=48, attention_dim=16, init_bound=0.5,
    recurrent_init_bound=0.5,
)  # fmt: skip

VARIANTS = {
    "attention-rnn-lm-tiny": dataclasses.replace(_TINY, window=None),
    "attention-rnn-classifier-tiny": dataclasses.replace(_TINY, hidden_dim=16, task="classification", hops=2),
}
