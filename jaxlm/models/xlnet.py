"""XLNet (Yang et al. 2019): a transformer with relative positions that predicts tokens in any order, with two streams.

Only the task permutation has two streams. The input of the content stream is the token of each position. The input of
the query stream is one learned vector at all positions. The query stream does not attend to the token of its own
position, so that the head can predict this token from the query stream. Both streams share all weights, and only the
content stream (and the memory) provides keys and values. So a block processes the concatenated streams, but attention
runs separately for each stream. If the memory has the decoding layout (``jaxlm.nn.attention.memory``), attention runs
once, for the queries of both streams (``jaxlm.nn.attention.two_streams``).

The code follows that of Yang et al. The published ``VARIANTS`` have the tanh approximation of GELU, with which their
weights were trained. Hugging Face's ``config.json`` of these weights has the exact GELU, so a loaded model has it, too.

Shapes: B batch, T time, P positions of the query stream, Q = T + P queries (Q = T without a query stream), M memory
slots, S keys (M + T; if the memory has the decoding layout, the number of its slots), D model width, H heads,
K = D / H head width, F MLP hidden width, R distances, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxlm import spec
from jaxlm.models import common, heads
from jaxlm.nn import choices
from jaxlm.nn.activation import Activation, activation
from jaxlm.nn.attention import attention, memory
from jaxlm.nn.attention.distance_bias import sinusoids, type_bias
from jaxlm.nn.attention.two_streams import Stream, StreamKind, make_streams
from jaxlm.nn.dropout import dropout
from jaxlm.nn.embedding import Unembedding, embed, widen_ids
from jaxlm.nn.linear import add_bias, linear, linear_specs
from jaxlm.nn.norm import layer_norm, layer_norm_specs
from jaxlm.sharding import constrain
from jaxlm.spec import ArraySpec, Normal, Params, State, fold_in_name, require_arrays

Task = Literal["permutation", "classification", "token_classification", "span_qa", "none"]


@dataclasses.dataclass(frozen=True)
class Config(common.TransformerConfig):
    """Shape and behavior of an XLNet. The defaults are the published large model, but with the exact GELU."""

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
    """Distances are clipped to plus or minus this length; None means no limit."""
    reuse_length: int | None = None
    """A call with ``order`` adds only its first ``reuse_length`` tokens to the memory; None means all tokens."""
    task: Task = "permutation"
    """Output head: permutation (language model), classification, token_classification, span_qa or none."""
    num_labels: int = 2
    """Number of labels if the task is classification or token_classification."""
    dropout: float = 0.1
    """Dropout rate on embeddings, distance encodings, attention probabilities, MLPs, sublayer outputs and
    the output of the last layer."""
    pool_dropout: float | None = None
    """Dropout rate on the input of the classifier; None: the same as ``dropout``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        common.check_divides(self, "num_heads", "embed_dim")
        if self.embed_dim % 2:
            raise ValueError(f"embed_dim={self.embed_dim} must be even: distances are encoded as sines and cosines")


def apply(
    cfg: Config, params: Params, tokens: jax.Array, *, state: State | None = None,
    segment_ids: jax.Array | None = None, key: jax.Array | None = None, token_types: jax.Array | None = None,
    right_to_left: jax.Array | None = None, order: jax.Array | None = None, targets: jax.Array | None = None,
) -> tuple[jax.Array, State | None]:  # fmt: skip
    """The hidden states, and the new state (None without a state).

    For the task ``permutation``, the hidden states are the query stream. With an ``order``, the query stream has the
    shape [B, P, D] and is computed at the positions ``targets``. Without an order, the model is a left-to-right
    language model, and the query stream has the shape [B, T, D]: query t has the position after token t, and attends to
    token t and the tokens before it. For other tasks, the hidden states are the content stream, [B, T, D], in which
    every token attends to all tokens of its document.

    Args:
        tokens: [B, T] integer ids. An id outside the vocabulary gives NaN, also for other tokens of the row.
        state: memory of earlier tokens (``state_specs``). No gradient flows into it. The oldest tokens are dropped.
        segment_ids: [B, T] int32, 0 for padding and n for document n. Documents do not interact. Default: one document.
        key: random key for dropout; None: no dropout.
        token_types: [B, T] int32, such as 0 and 1 for the two sentences of a pair. The attention bias of two tokens
            depends on whether their types are equal. Default: no such bias. The result is then the same as with one
            type for all tokens, including the tokens in the memory.
        right_to_left: [B] bool, True for rows whose tokens are in reverse order; their distances are negated.
        order: [B, T] int32, the rank of each position in the factorization order (Yang et al. 2019, eq. 3). Several
            positions may have the same rank. The content stream attends to positions of the same or a lower rank. The
            query stream attends only to positions of a lower rank. Given together with ``targets``.
        targets: [B, P] int32, the positions to predict, at least one. A position outside the row gives NaN.

    Raises:
        ValueError: the inputs have wrong shapes or dtypes, only one of ``order`` and ``targets`` is given, or they are
            given for another task than permutation.
    """
    common.check_tokens(tokens, segment_ids)
    _check_inputs(cfg, tokens, token_types, right_to_left, order, targets)
    targets = None if targets is None else widen_ids(targets)
    dtype = jnp.dtype(cfg.dtype)
    T = tokens.shape[1]
    two_streams = cfg.task == "permutation"
    kind: StreamKind = "bidirectional" if not two_streams else "left_to_right" if order is None else "permuted"
    streams = make_streams(
        tokens, state, segment_ids, kind, token_types=token_types, right_to_left=right_to_left, order=order,
        targets=targets,
    )  # fmt: skip
    num_remembered = T if order is None or cfg.reuse_length is None else min(T, cfg.reuse_length)
    token_arrays = (tokens, segment_ids, jnp.zeros_like(tokens) if token_types is None else token_types)
    new_tokens, new_segments, new_types = jax.tree.map(lambda x: x[:, :num_remembered], token_arrays)
    memory_context, new_state = memory.make_context(new_tokens, state, new_segments)
    S = T if state is None else state["segment_ids"].shape[1] + (T if memory_context.slots is None else 0)
    lowest_distance = -S if right_to_left is not None else 0 if kind == "left_to_right" else 1 - T
    encoded_RD = _encode_distances(cfg, jnp.arange(S, lowest_distance - 1, -1), key)

    x = embed(params["token_embedding"], tokens, dtype, size=cfg.vocab_size)
    if two_streams:
        is_inside_BP = jnp.ones_like(tokens, bool) if targets is None else (targets >= 0) & (targets < T)
        query_BPD = jnp.where(is_inside_BP[..., None], params["mask_embedding"].astype(dtype)[None, None], jnp.nan)
        x = jnp.concatenate([x, query_BPD], axis=1)
    x = dropout(x, cfg.dropout, fold_in_name(key, "embedding"))
    axes = "batch", common.time_axis_name(x.shape[1], T), "activation_embed"
    x = constrain(x, axes)

    def block(x: jax.Array, layer: Any) -> tuple[jax.Array, Any]:
        weights, layer_memory, layer_key = layer
        inputs, new_inputs = memory.append_and_read(layer_memory, x[:, :T], memory_context)
        if layer_memory is not None and num_remembered < T:
            new_inputs = {"hidden": x[:, :num_remembered]}
        attended = _attention(cfg, weights["attention"], x, T, inputs, streams, encoded_RD, layer_key)
        x = layer_norm(weights["attention_norm"], x + attended, cfg.norm_epsilon)
        x = constrain(x, axes)
        x = layer_norm(weights["mlp_norm"], x + _mlp(cfg, weights["mlp"], x, T, layer_key), cfg.norm_epsilon)
        return constrain(x, axes), new_inputs

    memories = None if state is None else state["layers"]
    x, new_inputs = common.run_layers(
        block, x, params["layers"], memories, key, remat=cfg.remat, num_layers=cfg.num_layers
    )
    hidden = dropout(x[:, T:] if two_streams else x, cfg.dropout, fold_in_name(key, "output"))
    if state is None:
        return hidden, None
    return hidden, {
        **new_state,
        "layers": memory.append_layers(memories, new_inputs, memory_context),
        "token_types": memory.append(state["token_types"], new_types, memory_context),
    }


def _attention(
    cfg: Config, weights: Params, x_BQD: jax.Array, T: int, inputs_BSD: jax.Array, streams: tuple[Stream, ...],
    encoded_RD: jax.Array, key: jax.Array | None,
) -> jax.Array:  # fmt: skip
    """The output of attention for the concatenated streams ``x``, [B, Q, D].

    Args:
        inputs_BSD: the inputs of this layer in the memory and at the new tokens.
        encoded_RD: the encodings of the distances, from distance S down to the lowest distance that occurs.
    """
    q = constrain(linear(weights["query"], x_BQD), ("batch", common.time_axis_name(x_BQD.shape[1], T), "heads", "kv"))
    scale, S = q.shape[-1] ** -0.5, inputs_BSD.shape[1]
    use_absorbed = S > T and choices.absorbed_attention(q, inputs_BSD, dropout=cfg.dropout, key=key)
    queries = (q,) if len(streams) == 1 else (q[:, :T], q[:, T:])
    if use_absorbed:
        distance_table = encoded_RD[:, None]
    else:
        axes = "batch", common.time_axis_name(S, T), "heads", "kv"
        k, v = (constrain(linear(weights[name], inputs_BSD), axes) for name in ("key", "value"))
        distance_table = linear(weights["relative"], encoded_RD)

    def absorb(name: str, q_BTHK: jax.Array) -> jax.Array:
        """The queries multiplied by the weight ``name`` (``absorb_weight``) if ``use_absorbed``, else the queries."""
        return memory.absorb_weight(weights[name]["weight"], q_BTHK) if use_absorbed else q_BTHK

    outputs = []
    for q_BTHK, stream, name in zip(queries, streams, ("content", "query")):
        content_q, position_q = (add_bias(q_BTHK, weights[bias]) for bias in ("content_bias", "position_bias"))
        biases = [stream.position_bias(distance_table, S, absorb("relative", position_q), scale)]
        if stream.token_types is not None:
            types_2HK = weights["type_embedding"].astype(q.dtype)
            type_q = add_bias(q_BTHK, weights["type_bias"])
            biases.append(type_bias(type_q, types_2HK, *stream.token_types, scale=scale))
        content_q = absorb("key", content_q)
        if use_absorbed:
            # S > T, so there is a memory. With a memory, there is a single ``Stream`` only in the decoding layout.
            options = {"scale": scale, "biases": biases, "in_decoding_layout": len(streams) == 1}
            outputs.append(memory.attend_to_inputs(content_q, inputs_BSD, stream.mask, **options))
        else:
            options = {"scale": scale, "dropout": cfg.dropout, "key": fold_in_name(key, f"{name}_attention")}
            outputs.append(attention(content_q, k, v, stream.mask, bias=biases, **options))
    values = jnp.concatenate(outputs, axis=1)
    if use_absorbed:
        values = memory.project_heads(weights["value"]["weight"], values)
    out = linear(weights["output"], values, num_input_axes=2)
    return dropout(out, cfg.dropout, fold_in_name(key, "output"))


def _mlp(cfg: Config, weights: Params, x: jax.Array, T: int, key: jax.Array | None) -> jax.Array:
    hidden = activation(cfg.activation)(linear(weights["up"], x))
    hidden = constrain(hidden, ("batch", common.time_axis_name(x.shape[1], T), "mlp"))
    hidden = dropout(hidden, cfg.dropout, fold_in_name(key, "mlp_hidden"))
    return dropout(linear(weights["down"], hidden), cfg.dropout, fold_in_name(key, "mlp_output"))


def logits(cfg: Config, params: Params, hidden: jax.Array) -> jax.Array | Unembedding:
    """The logits of the task's head: token logits as an ``Unembedding``, or label logits as a float32 array.

    For the shapes of label logits, see ``heads.head_logits``. For classification,
    ``hidden`` comes from :func:`pool`.

    Raises:
        ValueError: the task is "none".
    """
    if cfg.task != "permutation":
        return heads.head_logits(cfg.task, params, hidden)
    return Unembedding(params["token_embedding"], hidden, params["output_bias"], vocab_size=cfg.vocab_size)


def pool(
    cfg: Config, params: Params, hidden: jax.Array, segment_ids: jax.Array | None = None, key: jax.Array | None = None
) -> jax.Array:
    """The input of the classifier, [B, 1, D]: a tanh layer on the hidden state of each row's last real token.

    Raises:
        ValueError: the task is not classification.
    """
    heads.require_pooled_output(cfg.task, params, "pool")
    last = jnp.tanh(linear(params["pool"], heads.last_token_hidden(hidden, segment_ids)))
    return dropout(last, pool_dropout(cfg), fold_in_name(key, "pool"))


def pool_dropout(cfg: Config) -> float:
    """The dropout rate on the input of the classifier."""
    return cfg.dropout if cfg.pool_dropout is None else cfg.pool_dropout


def _encode_distances(cfg: Config, distance_R: jax.Array, key: jax.Array | None) -> jax.Array:
    """The encodings of the distances after dropout, [R, D] in the compute dtype."""
    if cfg.clamp_length is not None:
        distance_R = jnp.clip(distance_R, -cfg.clamp_length, cfg.clamp_length)
    # The authors' code draws a dropout mask for each row; here all rows share one mask.
    encoded_RD = dropout(sinusoids(distance_R, cfg.embed_dim), cfg.dropout, fold_in_name(key, "distance"))
    return encoded_RD.astype(cfg.dtype)


def _check_inputs(cfg: Config, tokens: Any, token_types: Any, right_to_left: Any, order: Any, targets: Any) -> None:
    B = tokens.shape[0]
    for name, x in (("token_types", token_types), ("order", order)):
        if x is not None:
            common.check_integers(name, x, tokens)
    require_arrays(right_to_left=right_to_left, targets=targets)
    if right_to_left is not None and right_to_left.shape != (B,):
        raise ValueError(f"right_to_left {list(right_to_left.shape)} must have shape [{B}], one entry for each row")
    if (order is None) != (targets is None):
        raise ValueError(
            "order and targets must be given together, got only one of them: order is the prediction order, and "
            "targets are the positions to predict"
        )
    if targets is None:
        return
    if cfg.task != "permutation":
        raise ValueError(f"task={cfg.task!r} predicts no tokens: order and targets are for task='permutation'")
    if not jnp.issubdtype(targets.dtype, jnp.integer):
        raise ValueError(f"targets must be integers, got {targets.dtype}")
    if targets.ndim != 2 or targets.shape[0] != B or not targets.shape[1]:
        raise ValueError(
            f"targets {list(targets.shape)} must have shape [{B}, positions] for tokens {list(tokens.shape)}, with at "
            "least one position"
        )


def specs(cfg: Config) -> dict[str, Any]:
    """The specs of all parameters."""
    D, H, K, F = cfg.embed_dim, cfg.num_heads, cfg.embed_dim // cfg.num_heads, cfg.mlp_dim
    normal = Normal(cfg.init_stddev)
    projection = linear_specs((D, H, K), ("embed", "heads", "kv"), normal, bias=False)
    query_bias = ArraySpec((H, K), ("heads", "kv"), normal)
    block = {
        "attention": {
            "query": projection,
            "key": projection,
            "value": projection,
            "relative": projection,
            "output": linear_specs((H, K, D), ("heads", "kv", "embed"), normal, num_input_axes=2, bias=False),
            # Added to the queries for their products with keys, distance encodings and type_embedding, respectively.
            "content_bias": query_bias,
            "position_bias": query_bias,
            "type_bias": query_bias,
            "type_embedding": ArraySpec((2, H, K), (None, "heads", "kv"), normal, decay=True),
        },
        "attention_norm": layer_norm_specs(D),
        "mlp": common.mlp_specs(D, F, normal),
        "mlp_norm": layer_norm_specs(D),
    }
    tree = {
        "token_embedding": heads.table_specs(cfg, D, normal),
        "mask_embedding": ArraySpec((D,), ("embed",), normal),
        "layers": spec.layers([block] * cfg.num_layers, stacked=cfg.scan_layers),
        **heads.head_specs(cfg.task, D, cfg.num_labels, normal),
    }
    if cfg.task == "permutation":
        tree["output_bias"] = heads.vocab_bias_specs(cfg)
    if cfg.task == "classification":
        tree["pool"] = linear_specs((D, D), ("embed", None), normal)
    return tree


def state_specs(cfg: Config, batch: int, length: int) -> dict[str, ArraySpec]:
    """The specs of a memory for the last ``length`` tokens of each of ``batch`` rows.

    The memory contains the inputs of all blocks, segment ids and token types.

    Raises:
        TypeError: the task is not permutation.
    """
    if cfg.task != "permutation":
        raise TypeError(
            f"task={cfg.task!r} reads whole texts and carries no state: only task='permutation' has a state"
        )
    shape = cfg.num_layers, batch, length, cfg.embed_dim
    token_types = ArraySpec((batch, length), ("batch", None), dtype=jnp.int32)
    return {**memory.memory_specs(*shape, jnp.dtype(cfg.dtype), stacked=cfg.scan_layers), "token_types": token_types}


HAS_MEMORY_STATE = True

VARIANTS = {
    "xlnet-base-cased": Config(num_layers=12, num_heads=12, embed_dim=768, mlp_dim=3072, activation="gelu_tanh"),
    "xlnet-large-cased": Config(activation="gelu_tanh"),
    # With init_stddev=0.02, a model of this width would learn slowly.
    "xlnet-tiny": Config(vocab_size=128, num_layers=2, num_heads=4, embed_dim=32, mlp_dim=64, init_stddev=0.1),
}
