"""GPT-2 (Radford et al. 2019): a causal transformer with pre-norm blocks, learned positions and a tied output head.

GPT-1 (Radford et al. 2018) is the same model with post-norm blocks, and therefore without a final norm. The field
``norm_position`` selects between the two.

As in the published models, the activation is tanh-GELU, epsilon is 1e-5, and the embeddings are not scaled. In GPT-2,
the projections into the residual stream have the initial standard deviation ``init_stddev / sqrt(2 * num_layers)``.

Shapes: B batch, T time, D model width, H heads, K head width (D / H), F hidden width of the MLP.
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
from jaxlm.nn.attention import Implementation, attention, cache
from jaxlm.nn.dropout import dropout
from jaxlm.nn.embedding import embed
from jaxlm.nn.linear import linear, linear_specs
from jaxlm.nn.norm import layer_norm, layer_norm_specs
from jaxlm.sharding import constrain
from jaxlm.spec import ArraySpec, Normal, Params, State, fold_in_name

NormPosition = Literal["before", "after"]


@dataclasses.dataclass(frozen=True)
class Config(common.TransformerConfig):
    """Shape and behavior of a GPT. The defaults are the published 124M model of GPT-2."""

    vocab_size: int = 50257
    """Number of token ids."""
    max_positions: int = 1024
    """Maximum length of a sequence: the number of rows of the learned position table."""
    num_layers: int = 12
    """Number of blocks."""
    num_heads: int = 12
    """Attention heads of each block; must divide embed_dim."""
    embed_dim: int = 768
    """Model width."""
    mlp_dim: int | None = None
    """Hidden width of the MLP; None means 4 * embed_dim."""
    activation: Activation = "gelu_tanh"
    """Nonlinearity of the MLP."""
    norm_position: NormPosition = "before"
    """Normalize the input of each sublayer (before: pre-norm, GPT-2) or each residual sum (after: post-norm, GPT-1)."""
    norm_epsilon: float = 1e-5
    """Added to the variance in layer norms."""
    init_stddev: float = 0.02
    """Standard deviation of initial weights."""
    tie_embeddings: bool = True
    """Use the token table as the output head."""
    task: heads.DecoderTask = "causal"
    """Output head: next token (causal), label of the text (classification), label of each token (token_classification),
    answer span (span_qa), or none."""
    num_labels: int = 2
    """Number of labels if the task is classification or token_classification."""
    embedding_dropout: float = 0.1
    """Dropout rate after the embeddings."""
    attention_dropout: float = 0.1
    """Dropout rate on attention probabilities."""
    residual_dropout: float = 0.1
    """Dropout rate on the output of each sublayer."""
    attention_implementation: Implementation | None = None
    """Name of the attention implementation; None selects one for the device and the shapes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        common.check_divides(self, "num_heads", "embed_dim")


def apply(
    cfg: Config, params: Params, tokens: jax.Array, *, state: State | None = None,
    segment_ids: jax.Array | None = None, positions: jax.Array | None = None, key: jax.Array | None = None,
) -> tuple[jax.Array, State | None]:  # fmt: skip
    """The hidden states after the last norm, [B, T, D], and the new state (None without a state).

    Args:
        tokens: [B, T] integer ids. An id outside the vocabulary gives NaN, also for other tokens of the row.
        state: key-value cache of the tokens before ``tokens`` (``state_specs``). A row whose tokens do not fit into the
            cache gives NaN.
        segment_ids: [B, T] int32, 0 for padding and n for document n. Documents do not interact. Default: one document.
        positions: [B, T] int32. Default: the position within the document. A position outside [0, max_positions) gives
            NaN, also for other tokens of the row.
        key: random key for dropout; None: no dropout.

    Raises:
        ValueError: the inputs are not integers of the same shape; T exceeds ``max_positions``, and neither segment ids
            nor positions are given; or T exceeds the number of slots in the state.
    """
    common.check_tokens(tokens, segment_ids, positions, cfg.max_positions)
    dtype = jnp.dtype(cfg.dtype)
    context, state = cache.make_context(tokens, state, segment_ids, positions)

    x = embed(params["token_embedding"], tokens, dtype, size=cfg.vocab_size)
    x = x + embed(params["position_embedding"], context.positions, dtype, rows="positions")
    x = dropout(x, cfg.embedding_dropout, fold_in_name(key, "embedding"))
    x = constrain(x, ("batch", "seq", "activation_embed"))

    def block(x: jax.Array, layer: Any) -> tuple[jax.Array, Any]:
        weights, kv, layer_key = layer
        normed = _norm(cfg, "before", weights["attention_norm"], x)
        attended, kv = _attention(cfg, weights["attention"], normed, kv, context, layer_key)
        x = _norm(cfg, "after", weights["attention_norm"], x + attended)
        x = constrain(x, ("batch", "seq", "activation_embed"))
        normed = _norm(cfg, "before", weights["mlp_norm"], x)
        x = _norm(cfg, "after", weights["mlp_norm"], x + _mlp(cfg, weights["mlp"], normed, layer_key))
        return constrain(x, ("batch", "seq", "activation_embed")), kv

    kv = None if state is None else state["layers"]
    x, kv = common.run_layers(
        block, x, params["layers"], kv, key, remat=cfg.remat, num_layers=cfg.num_layers,
        in_place=cache.updates_in_place(state, tokens.shape[1]),
    )  # fmt: skip
    if cfg.norm_position == "before":
        x = layer_norm(params["final_norm"], x, cfg.norm_epsilon)
    return common.decoder_outputs(x, kv, context, state)


def _attention(
    cfg: Config, weights: Params, x: jax.Array, kv: Any, context: cache.CacheContext, key: jax.Array | None
) -> tuple[jax.Array, Any]:
    q, k, v = _project_qkv(weights["qkv"], x)
    kv, (k, v) = cache.append_and_read(kv, (k, v), context)
    x = attention(
        q, k, v, context.mask, dropout=cfg.attention_dropout, key=fold_in_name(key, "attention"),
        implementation=cfg.attention_implementation,
    )  # fmt: skip
    x = linear(weights["output"], x, num_input_axes=2)
    return dropout(x, cfg.residual_dropout, fold_in_name(key, "attention_output")), kv


def _mlp(cfg: Config, weights: Params, x: jax.Array, key: jax.Array | None) -> jax.Array:
    x = activation(cfg.activation)(linear(weights["up"], x))
    x = linear(weights["down"], constrain(x, ("batch", "seq", "mlp")))
    return dropout(x, cfg.residual_dropout, fold_in_name(key, "mlp_output"))


def _norm(cfg: Config, position: NormPosition, weights: Params, x: jax.Array) -> jax.Array:
    """The layer norm of ``x`` if ``position`` is the ``norm_position`` of the config, else ``x``."""
    return layer_norm(weights, x, cfg.norm_epsilon) if cfg.norm_position == position else x


def _project_qkv(weights: Params, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries, keys and values, each [B, T, H, K]."""
    if choices.fused_qkv():
        qkv = constrain(linear(weights, x), ("batch", "seq", None, "heads", "kv"))
        return qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
    projections = ({name: w[..., index, :, :] for name, w in weights.items()} for index in range(3))
    q, k, v = (constrain(linear(projection, x), ("batch", "seq", "heads", "kv")) for projection in projections)
    return q, k, v


logits = heads.decoder_logits
pool = heads.pool_last_token
rollback = cache.rollback


def specs(cfg: Config) -> dict[str, Any]:
    """The specs of all parameters."""
    D, H, K = cfg.embed_dim, cfg.num_heads, cfg.embed_dim // cfg.num_heads
    F, normal = 4 * D if cfg.mlp_dim is None else cfg.mlp_dim, Normal(cfg.init_stddev)
    pre_norm = cfg.norm_position == "before"
    residual_init = Normal(cfg.init_stddev / (2 * cfg.num_layers) ** 0.5) if pre_norm else normal
    block = {
        "attention_norm": layer_norm_specs(D),
        "attention": {
            "qkv": linear_specs((D, 3, H, K), ("embed", None, "heads", "kv"), normal),
            "output": linear_specs((H, K, D), ("heads", "kv", "embed"), residual_init, num_input_axes=2),
        },
        "mlp_norm": layer_norm_specs(D),
        "mlp": common.mlp_specs(D, F, normal, residual_init),
    }
    return {
        "token_embedding": heads.table_specs(cfg, D, normal),
        "position_embedding": ArraySpec((cfg.max_positions, D), ("positions", "embed"), normal, decay=True),
        "layers": spec.layers([block] * cfg.num_layers, stacked=cfg.scan_layers),
        **({"final_norm": layer_norm_specs(D)} if pre_norm else {}),
        **heads.decoder_head_specs(cfg, D, normal),
    }


def state_specs(cfg: Config, batch: int, length: int) -> dict[str, ArraySpec]:
    """The specs of the key-value cache of ``batch`` rows of at most ``length`` tokens each, padding included."""
    shape = cfg.num_layers, batch, length, cfg.num_heads, cfg.embed_dim // cfg.num_heads
    return cache.cache_specs(*shape, jnp.dtype(cfg.dtype), stacked=cfg.scan_layers)


_TINY = Config(vocab_size=128, max_positions=64, num_layers=2, num_heads=4, embed_dim=32)
VARIANTS = {
    "gpt2": Config(),
    "gpt2-medium": Config(num_layers=24, num_heads=16, embed_dim=1024),
    "gpt2-large": Config(num_layers=36, num_heads=20, embed_dim=1280),
    "gpt2-xl": Config(num_layers=48, num_heads=25, embed_dim=1600),
    "openai-gpt": Config(vocab_size=40478, max_positions=512, norm_position="after"),
    "gpt2-tiny": _TINY,
    "openai-gpt-tiny": dataclasses.replace(_TINY, norm_position="after"),
}
