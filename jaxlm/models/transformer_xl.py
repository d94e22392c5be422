"""Transformer-XL (Dai et al. 2019): a causal transformer with a memory of earlier segments and relative positions.

The memory of a layer contains the inputs of this layer at earlier tokens (``jaxlm.nn.attention.memory``). The layer
also attends to the memory, but no gradient flows into the memory. To train on a long text, split it into segments, and
pass the memory that the call for one segment returns to the call for the next segment.

The code follows the PyTorch code of Dai et al. and of Hugging Face, which have one dropout rate for everything except
attention probabilities. The memory starts empty, as in the code of Dai et al. In Hugging Face's code, it starts with
zeros, and tokens attend to these zeros.

Shapes: B batch, T new tokens, M memory slots, S keys (M + T; in the decoding layout of the memory, all its slots), D
model width, H heads, K head width, F hidden width of the MLP, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxlm import spec
from jaxlm.models import common, heads
from jaxlm.nn import choices
from jaxlm.nn.attention import attention, memory
from jaxlm.nn.attention.bias import AttentionBias
from jaxlm.nn.attention.distance_bias import distance_bias, distance_bias_at_query_positions, sinusoids
from jaxlm.nn.dropout import dropout
from jaxlm.nn.linear import add_bias, linear, linear_specs
from jaxlm.nn.loss import adaptive_softmax
from jaxlm.nn.loss.adaptive_softmax import Clusters
from jaxlm.nn.norm import layer_norm, layer_norm_specs
from jaxlm.nn.token_layout import move_padding_last
from jaxlm.sharding import constrain, num_shards
from jaxlm.spec import ArraySpec, Normal, Params, State, fold_in_name


@dataclasses.dataclass(frozen=True)
class Config(common.TransformerConfig):
    """Shape and behavior of a Transformer-XL. The defaults are the published model on WikiText-103."""

    vocab_size: int = 267735
    """Number of token ids. The ids are sorted by descending frequency."""
    cutoffs: tuple[int, ...] = (20000, 40000, 200000)
    """First id of each cluster of the adaptive softmax after the first cluster; () means an ordinary softmax."""
    embedding_divisor: int = 4
    """Width of the token vectors of a cluster, divided by the width in the next cluster. With 1, all clusters share
    one table."""
    num_layers: int = 18
    """Number of blocks."""
    num_heads: int = 16
    """Attention heads of each block."""
    head_dim: int = 64
    """Width of each head."""
    embed_dim: int = 1024
    """Model width; even."""
    token_dim: int = 1024
    """Width of the token vectors of the first cluster; projected to embed_dim."""
    mlp_dim: int = 4096
    """Hidden width of the MLP."""
    memory_length: int = 1600
    """Number of tokens in the memory; pass it as ``length`` to ``state_specs``. With same_length, also the maximum
    number of tokens that a token attends to."""
    same_length: bool = True
    """Let every token attend to at most the last memory_length tokens, itself included."""
    clamp_length: int | None = 1000
    """All distances of at least this length have the same encoding; None: no limit."""
    pre_norm: bool = False
    """Normalize the input of each sublayer (pre-norm) instead of each residual sum (post-norm)."""
    untie_relative: bool = True
    """Whether each layer has its own content and position biases (u and v in the paper), or all layers share them."""
    norm_epsilon: float = 1e-5
    """Added to the variance in layer norms."""
    init_stddev: float = 0.02
    """Standard deviation of initial weights."""
    projection_init_stddev: float = 0.01
    """Standard deviation of the initial projections of token vectors."""
    tie_embeddings: bool = True
    """Use the token embeddings of the input as weights of the softmax."""
    tie_projections: bool = True
    """For all clusters except the first, use the projection of the input embeddings also in the softmax."""
    dropout: float = 0.1
    """Dropout rate on embeddings, encodings of distances, hidden layers of MLPs, outputs of sublayers, and the output
    of the last block."""
    attention_dropout: float = 0.0
    """Dropout rate on attention probabilities."""
    task: Literal["causal", "classification", "none"] = "causal"
    """Output head: next token (causal), label of the text (classification), or none."""
    num_labels: int = 2
    """Number of labels if the task is classification."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.embed_dim % 2:
            raise ValueError(
                f"embed_dim={self.embed_dim} must be even: distances are encoded as pairs of sine and cosine"
            )
        _clusters(self)


def apply(
    cfg: Config,
    params: Params,
    tokens: jax.Array,
    *,
    state: State | None = None,
    segment_ids: jax.Array | None = None,
    key: jax.Array | None = None,
) -> tuple[jax.Array, State | None]:
    """The hidden states of the last layer after dropout, [B, T, D], and the new state (None without a state).

    Args:
        tokens: [B, T] integer ids. An id outside the vocabulary gives NaN, also for other tokens of the row.
        state: the memory of the tokens before ``tokens`` (``state_specs``). No gradient flows into the memory.
        segment_ids: [B, T] int32, 0 for padding and n for document n. Documents do not interact. Default: one document.
        key: random key for dropout; None: no dropout.
    """
    common.check_tokens(tokens, segment_ids)
    dtype = jnp.dtype(cfg.dtype)
    # Move the padding of the new tokens to the end of each row. In its usual layout, the memory has its empty slots and
    # its padding at its start. So the real tokens of the memory and the new real tokens are adjacent. Then the distance
    # of two tokens is the difference of their indices, and the bias needs no gather (``distance_bias``).
    tokens, layout = move_padding_last(tokens, segment_ids, None)
    memory_context, state = memory.make_context(
        tokens, state, layout.segment_ids, window=cfg.memory_length if cfg.same_length else None
    )

    x = adaptive_softmax.embed(_clusters(cfg), params, tokens, dtype) * jnp.asarray(embedding_multiplier(cfg), dtype)
    x = dropout(x, cfg.dropout, fold_in_name(key, "embedding"))
    x = constrain(x, ("batch", "seq", "activation_embed"))
    distance_S = jnp.arange(memory_context.key_positions.shape[1])[::-1]
    if cfg.clamp_length is not None:
        distance_S = jnp.minimum(distance_S, cfg.clamp_length)
    r_SD = dropout(sinusoids(distance_S, cfg.embed_dim).astype(dtype), cfg.dropout, fold_in_name(key, "relative"))

    def block(x: jax.Array, layer: Any) -> tuple[jax.Array, Any]:
        weights, layer_memory, layer_key = layer
        inputs, new_inputs = memory.append_and_read(layer_memory, x, memory_context)
        biases = params if not cfg.untie_relative else weights["attention"]
        x = _attention(cfg, weights, biases, x, inputs, r_SD, memory_context, layer_key)
        x = constrain(x, ("batch", "seq", "activation_embed"))
        return constrain(_mlp(cfg, weights, x, layer_key), ("batch", "seq", "activation_embed")), new_inputs

    memories = None if state is None else state["layers"]
    x, new_inputs = common.run_layers(
        block, x, params["layers"], memories, key, remat=cfg.remat, num_layers=cfg.num_layers
    )
    x = layout.restore(dropout(x, cfg.dropout, fold_in_name(key, "output")))
    return x, None if state is None else {
        **state,
        "layers": memory.append_layers(memories, new_inputs, memory_context),
    }


def _attention(
    cfg: Config, weights: Params, biases: dict[str, Any], x: jax.Array, inputs: jax.Array, r_SD: jax.Array,
    memory_context: memory.MemoryContext, key: jax.Array | None,
) -> jax.Array:  # fmt: skip
    """The output of the attention sublayer, [B, T, D].

    Keys and values come from ``inputs`` [B, S, D], the inputs of the layer in the memory and at the new tokens.
    """
    attention_weights, norm, T, S = weights["attention"], weights["attention_norm"], x.shape[1], inputs.shape[1]
    normed = x
    if cfg.pre_norm:
        inputs = layer_norm(norm, inputs, cfg.norm_epsilon)
        # Only in the decoding layout, the new tokens are not the last inputs.
        normed = inputs[:, -T:] if memory_context.slots is None else layer_norm(norm, x, cfg.norm_epsilon)
    qkv = attention_weights["qkv"]["weight"]
    q = constrain(linear({"weight": qkv[:, 0]}, normed), ("batch", "seq", "heads", "kv"))
    content_q, position_q = (add_bias(q, biases[name]) for name in ("content_bias", "position_bias"))
    scale = cfg.head_dim**-0.5

    def bias(table: jax.Array, q: jax.Array) -> AttentionBias:
        if memory_context.slots is not None:
            return distance_bias_at_query_positions(table, S - 1, memory_context.slots, S, q_BTHK=q, scale=scale)
        return distance_bias(table, S - 1, T, S, query_offset=S - T, q_BTHK=q, scale=scale)

    if S > T and choices.absorbed_attention(q, inputs, dropout=cfg.attention_dropout, key=key):
        relative_bias = bias(r_SD[:, None], memory.absorb_weight(attention_weights["relative"]["weight"], position_q))
        attended = memory.attend_to_inputs(
            memory.absorb_weight(qkv[:, 1], content_q), inputs, memory_context.mask, scale=scale,
            biases=[relative_bias], in_decoding_layout=memory_context.slots is not None,
        )  # fmt: skip
        out = memory.project_heads(qkv[:, 2], attended)
    else:
        axes = "batch", common.time_axis_name(S, T), None, "heads", "kv"
        kv = constrain(linear({"weight": qkv[:, 1:]}, inputs), axes)
        out = attention(
            content_q, kv[:, :, 0], kv[:, :, 1], memory_context.mask, scale=scale,
            bias=bias(linear(attention_weights["relative"], r_SD), position_q),
            dropout=cfg.attention_dropout, key=fold_in_name(key, "attention"),
        )  # fmt: skip
    out = linear(attention_weights["output"], out, num_input_axes=2)
    out = dropout(out, cfg.dropout, fold_in_name(key, "attention_output"))
    return x + out if cfg.pre_norm else layer_norm(norm, x + out, cfg.norm_epsilon)


def _mlp(cfg: Config, weights: Params, x: jax.Array, key: jax.Array | None) -> jax.Array:
    """The output of the MLP sublayer, [B, T, D]."""
    mlp, norm = weights["mlp"], weights["mlp_norm"]
    hidden = jax.nn.relu(linear(mlp["up"], layer_norm(norm, x, cfg.norm_epsilon) if cfg.pre_norm else x))
    hidden = dropout(constrain(hidden, ("batch", "seq", "mlp")), cfg.dropout, fold_in_name(key, "mlp"))
    out = dropout(linear(mlp["down"], hidden), cfg.dropout, fold_in_name(key, "mlp_output"))
    return x + out if cfg.pre_norm else layer_norm(norm, x + out, cfg.norm_epsilon)


def logits(cfg: Config, params: Params, hidden: jax.Array) -> jax.Array:
    """The outputs of the task's head, float32: log-probabilities of the next token [B, T, V], or label logits.

    The log-probabilities are normalized, and V is ``vocab_size``, without padding. For label logits, see
    ``heads.head_logits``; ``hidden`` is then the output of :func:`pool`.

    Raises:
        ValueError: the task is none, so there is no head.
    """
    if cfg.task != "causal":
        return heads.head_logits(cfg.task, params, hidden)
    # The result has no vocabulary padding, so its last axis may not be divisible by the number of shards.
    vocab_axis = "vocab" if cfg.vocab_size % num_shards(("vocab",)) == 0 else None
    return constrain(adaptive_softmax.log_probabilities(_clusters(cfg), params, hidden), ("batch", None, vocab_axis))


def cross_entropy(cfg: Config, params: Params, hidden: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
    """``sum(weights * -log p(target))``, a float32 scalar; see ``adaptive_softmax.cross_entropy``."""
    return adaptive_softmax.cross_entropy(_clusters(cfg), params, hidden, targets, weights)


pool = heads.pool_last_token


def _clusters(cfg: Config) -> Clusters:
    return Clusters(
        cfg.vocab_size, cfg.cutoffs, cfg.token_dim, cfg.embed_dim, cfg.embedding_divisor, cfg.vocab_multiple
    )


def embedding_multiplier(cfg: Config) -> float:
    """The factor by which token embeddings are multiplied before the first layer."""
    return cfg.embed_dim**0.5


def specs(cfg: Config) -> dict[str, Any]:
    """The specs of all parameters."""
    D, H, K, F = cfg.embed_dim, cfg.num_heads, cfg.head_dim, cfg.mlp_dim
    normal, projection = Normal(cfg.init_stddev), Normal(cfg.projection_init_stddev)
    bias = ArraySpec((H, K), ("heads", "kv"), normal)
    biases = {"content_bias": bias, "position_bias": bias}
    block = {
        "attention_norm": layer_norm_specs(D),
        "attention": {
            "qkv": linear_specs((D, 3, H, K), ("embed", None, "heads", "kv"), normal, bias=False),
            "relative": linear_specs((D, H, K), ("embed", "heads", "kv"), normal, bias=False),
            "output": linear_specs((H, K, D), ("heads", "kv", "embed"), normal, num_input_axes=2, bias=False),
            **(biases if cfg.untie_relative else {}),
        },
        "mlp_norm": layer_norm_specs(D),
        "mlp": common.mlp_specs(D, F, normal),
    }
    tree = {
        **adaptive_softmax.input_specs(_clusters(cfg), normal, projection),
        "layers": spec.layers([block] * cfg.num_layers, stacked=cfg.scan_layers),
        **({} if cfg.untie_relative else biases),
        **heads.head_specs(cfg.task, D, cfg.num_labels, normal, bias=False),
    }
    if cfg.task == "causal":
        tree["head"] = adaptive_softmax.head_specs(
            _clusters(cfg), normal, projection, tie_embeddings=cfg.tie_embeddings, tie_projections=cfg.tie_projections
        )
    return tree


def state_specs(cfg: Config, batch: int, length: int) -> dict[str, ArraySpec]:
    """The specs of a memory for the last ``length`` tokens of each of ``batch`` rows. The memory drops older tokens.

    To train on consecutive segments, pass ``cfg.memory_length``. If the memory is long enough for all tokens, several
    calls give the same results as one call. With ``same_length``, ``cfg.memory_length`` slots are always enough, so the
    memory has ``min(length, memory_length)`` slots.
    """
    slots = min(length, cfg.memory_length) if cfg.same_length else length
    return memory.memory_specs(
        cfg.num_layers, batch, slots, cfg.embed_dim, jnp.dtype(cfg.dtype), stacked=cfg.scan_layers
    )


HAS_MEMORY_STATE = True


def carried_state_length(cfg: Config) -> int:
    """The ``length`` that training passes to :func:`state_specs`: the number of tokens in the memory."""
    return cfg.memory_length


VARIANTS = {
    "transfo-xl-wt103": Config(),
    # The base model of the paper (table 1), with the settings of the authors' PyTorch script.
    "transformer-xl-base": Config(
        embedding_divisor=1, num_layers=16, num_heads=10, head_dim=41, embed_dim=410, token_dim=410, mlp_dim=2100,
        memory_length=150, same_length=False, clamp_length=None, untie_relative=False,
    ),
    "transformer-xl-tiny": Config(
        vocab_size=64, cutoffs=(56, 60), embedding_divisor=1, num_layers=2, num_heads=4, head_dim=8, embed_dim=32,
        token_dim=32, mlp_dim=64, memory_length=16, same_length=False, clamp_length=None,
    ),
}  # fmt: skip
