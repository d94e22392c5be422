"""Transformer-XL (Dai et al. 2019): a causal transformer with a memory of earlier segments and relative positions.

Every layer also attends to its own inputs of the tokens before, kept without gradient (``jaxlm.nn.memory``), so that
training on the next stretch of a text goes on where the last one ended. Follows the authors' PyTorch code and Hugging
Face's (which share one dropout rate for everything but attention), with a memory that starts empty and not as zeros.

Legend: B batch, T new tokens, M memory slots, S = M + T keys, D model width, H heads, K head width, F hidden width of
the MLP, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from jaxlm import spec
from jaxlm.models import common, files, heads
from jaxlm.nn import adaptive_softmax, memory
from jaxlm.nn.adaptive_softmax import Clusters
from jaxlm.nn.attention import attention
from jaxlm.nn.dropout import dropout
from jaxlm.nn.linear import linear, linear_specs
from jaxlm.nn.norm import layer_norm, layer_norm_specs
from jaxlm.nn.relative import distance_term, sinusoids
from jaxlm.nn.term import Term
from jaxlm.sharding import constrain
from jaxlm.spec import ArraySpec, Normal, fold_name


@dataclasses.dataclass(frozen=True)
class Config:
    """Shape and behaviour of a Transformer-XL. The defaults are the published model on WikiText-103."""

    vocab_size: int = 267735
    """Number of token ids, by descending frequency."""
    cutoffs: tuple[int, ...] = (20000, 40000, 200000)
    """First ids of the rarer clusters of the adaptive softmax; none means an ordinary softmax."""
    embedding_divisor: int = 4
    """How much narrower each cluster's token vectors are than those of the one before; 1 makes one table of all."""
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
    """Tokens of the memory that the model is meant for: what to make states of, and what same_length counts."""
    same_length: bool = True
    """Let every token see exactly the memory_length last tokens, itself included."""
    clamp_length: int | None = 1000
    """Longest distance that is told apart; None tells all."""
    pre_norm: bool = False
    """Normalise what a sublayer reads, and not what it and the residual give."""
    untie_relative: bool = True
    """Give each layer content and position biases (u and v in the paper) of its own."""
    norm_epsilon: float = 1e-5
    """Added to the variance in layer norms."""
    init_stddev: float = 0.02
    """Standard deviation of initial weights."""
    projection_init_stddev: float = 0.01
    """Standard deviation of the initial projections of token vectors."""
    tie_embeddings: bool = True
    """Share token vectors between input and softmax."""
    tie_projections: bool = True
    """Share the projections of token vectors between input and softmax, in all clusters but the first."""
    dropout: float = 0.1
    """Dropout rate on embeddings, relative positions, the MLP, what sublayers add and the output, while training."""
    attention_dropout: float = 0.0
    """Dropout rate on attention probabilities, while training."""
    dtype: common.ComputeDtype = "float32"
    """Compute dtype of activations; parameters keep their own."""
    remat: common.Remat = "dots"
    """What the backward pass recomputes: nothing, all but matmuls and attention (dots), or every block (full)."""
    scan_layers: bool = True
    """Loop over layers in one compiled body; False unrolls them."""
    task: Literal["causal", "classification", "none"] = "causal"
    """Head: next token (causal), one label for each row (classification), or none."""
    num_labels: int = 2
    """Labels of a classifier."""

    def __post_init__(self) -> None:
        common.check_positive(
            self, "vocab_size", "embedding_divisor", "num_layers", "num_heads", "head_dim", "embed_dim", "token_dim",
            "mlp_dim", "memory_length", "num_labels",
        )  # fmt: skip
        common.check_rates(self, "dropout", "attention_dropout")
        common.check_choices(
            self, dtype=get_args(common.ComputeDtype), remat=get_args(common.Remat),
            task=("causal", "classification", "none"),
        )  # fmt: skip
        if self.embed_dim % 2:
            raise ValueError(f"embed_dim={self.embed_dim} must be even: half of the relative positions are sines")
        if self.clamp_length is not None and self.clamp_length < 1:
            raise ValueError(
                f"clamp_length={self.clamp_length} must be at least 1, or None to tell all distances apart"
            )
        _clusters(self)


def _clusters(cfg: Config) -> Clusters:
    return Clusters(cfg.vocab_size, cfg.cutoffs, cfg.token_dim, cfg.embed_dim, cfg.embedding_divisor)


def specs(cfg: Config) -> dict[str, Any]:
    """Every parameter of the model."""
    D, H, K, F = cfg.embed_dim, cfg.num_heads, cfg.head_dim, cfg.mlp_dim
    normal, projection = Normal(cfg.init_stddev), Normal(cfg.projection_init_stddev)
    bias = ArraySpec((H, K), ("heads", "kv"), normal)
    biases = {"content_bias": bias, "position_bias": bias}
    block = {
        "attention_norm": layer_norm_specs(D),
        "attention": {
            "qkv": linear_specs((D, 3, H, K), ("embed", None, "heads", "kv"), normal, bias=False),
            "relative": linear_specs((D, H, K), ("embed", "heads", "kv"), normal, bias=False),
            "output": linear_specs((H, K, D), ("heads", "kv", "embed"), normal, inputs=2, bias=False),
            **(biases if cfg.untie_relative else {}),
        },
        "mlp_norm": layer_norm_specs(D),
        "mlp": {
            "up": linear_specs((D, F), ("embed", "mlp"), normal),
            "down": linear_specs((F, D), ("mlp", "embed"), normal),
        },
    }
    tree = {
        **adaptive_softmax.input_specs(_clusters(cfg), normal, projection),
        "layers": spec.stack(cfg.num_layers, block),
        **({} if cfg.untie_relative else biases),
        **heads.head_specs(cfg.task, D, cfg.num_labels, normal, bias=False),
    }
    if cfg.task == "causal":
        tree["head"] = adaptive_softmax.head_specs(
            _clusters(cfg), normal, projection, tie_embeddings=cfg.tie_embeddings, tie_projections=cfg.tie_projections
        )
    return tree


def state_specs(cfg: Config, batch: int, length: int) -> dict[str, ArraySpec]:
    """A rolling memory of the last ``length`` tokens of ``batch`` rows: for training on streams, ``cfg.memory_length``.

    Older tokens are forgotten; with room for all of them, pieces give what one call gives.
    """
    return memory.memory_specs(cfg.num_layers, batch, length, cfg.embed_dim, jnp.dtype(cfg.dtype))


def apply(
    cfg: Config,
    params: dict[str, Any],
    tokens: jax.Array,
    *,
    state: Any = None,
    segment_ids: jax.Array | None = None,
    key: jax.Array | None = None,
) -> tuple[jax.Array, Any]:
    """Hidden states of the last layer, [B, T, D], and the new state (None without one).

    Args:
        tokens: [B, T] integer ids. An id outside the vocabulary gives NaN.
        state: from ``state_specs``; the tokens then continue what it holds. No gradient flows into it.
        segment_ids: [B, T] int32, 0 padding, 1.. documents that do not see each other. Default: one document.
        key: random key for dropout; None is deterministic.
    """
    common.check_tokens(tokens, segment_ids, None, None)
    dtype = jnp.dtype(cfg.dtype)
    order_BT = None
    if segment_ids is not None:
        # With all pads last (and first in the memory), distances are those of places, and a shift finds their terms.
        order_BT = jnp.argsort(segment_ids == 0, axis=1, stable=True)
        tokens, segment_ids = (jnp.take_along_axis(x, order_BT, axis=1) for x in (tokens, segment_ids))
    place, state = memory.span(tokens, state, segment_ids, window=cfg.memory_length if cfg.same_length else None)

    x = adaptive_softmax.embed(_clusters(cfg), params, tokens, dtype) * jnp.asarray(cfg.embed_dim**0.5, dtype)
    x = dropout(x, cfg.dropout, fold_name(key, "embedding"))
    x = constrain(x, ("batch", "seq", "activation_embed"))
    distance_S = jnp.arange(place.key_positions.shape[1])[::-1]
    if cfg.clamp_length is not None:
        distance_S = jnp.minimum(distance_S, cfg.clamp_length)
    r_SD = dropout(sinusoids(distance_S, cfg.embed_dim).astype(dtype), cfg.dropout, fold_name(key, "relative"))

    def block(x: jax.Array, layer: Any) -> tuple[jax.Array, Any]:
        weights, old, layer_key = layer
        context, new = x, None
        if old is not None:
            context = jnp.concatenate([jax.lax.stop_gradient(old["hidden"]), x], axis=1)
            new = {"hidden": x}
        biases = params if not cfg.untie_relative else weights["attention"]
        x = _attention(cfg, weights, biases, x, context, r_SD, place.mask, layer_key)
        x = constrain(x, ("batch", "seq", "activation_embed"))
        return constrain(_mlp(cfg, weights, x, layer_key), ("batch", "seq", "activation_embed")), new

    old = None if state is None else state["layers"]
    x, new = common.scan_layers(
        block, x, params["layers"], old, key, count=cfg.num_layers, remat=cfg.remat, unroll=not cfg.scan_layers
    )
    x = dropout(x, cfg.dropout, fold_name(key, "output"))
    if order_BT is not None:
        x = jnp.take_along_axis(x, jnp.argsort(order_BT, axis=1)[..., None], axis=1)
    return x, None if state is None else {**state, "layers": memory.append_layers(old, new, place.kept)}


def _attention(
    cfg: Config, weights: dict[str, Any], biases: dict[str, Any], x: jax.Array, context: jax.Array, r_SD: jax.Array,
    mask: Any, key: jax.Array | None,
) -> jax.Array:  # fmt: skip
    """``x`` and what it reads in ``context`` [B, S, D], of which it is the end."""
    own, norm, T = weights["attention"], weights["attention_norm"], x.shape[1]
    if cfg.pre_norm:
        context = layer_norm(norm, context, cfg.norm_epsilon)
    qkv = own["qkv"]["weight"]
    q = constrain(linear({"weight": qkv[:, 0]}, context[:, -T:]), ("batch", "seq", "heads", "kv"))
    content, position = (q + biases[name].astype(q.dtype)[None, None] for name in ("content_bias", "position_bias"))
    scale = cfg.head_dim**-0.5
    S = context.shape[1]

    def term(table: jax.Array, q: jax.Array) -> Term:
        return distance_term(table, S - 1, T, S, ahead=S - T, q_BTHK=q, scale=scale)

    if S > T and memory.is_met_directly(q, context, dropout=cfg.attention_dropout, key=key):
        distances = term(r_SD[:, None], memory.absorbed(own["relative"]["weight"], position))
        met = memory.absorbed(qkv[:, 1], content)
        mixed = memory.projected(qkv[:, 2], memory.attend(met, context, mask, scale=scale, terms=[distances]))
    else:
        kv = constrain(linear({"weight": qkv[:, 1:]}, context), ("batch", "seq", None, "heads", "kv"))
        mixed = attention(
            content, kv[:, :, 0], kv[:, :, 1], mask, scale=scale, bias=term(linear(own["relative"], r_SD), position),
            dropout=cfg.attention_dropout, key=fold_name(key, "attention"),
        )  # fmt: skip
    out = dropout(linear(own["output"], mixed, inputs=2), cfg.dropout, fold_name(key, "attention_output"))
    return x + out if cfg.pre_norm else layer_norm(norm, x + out, cfg.norm_epsilon)


def _mlp(cfg: Config, weights: dict[str, Any], x: jax.Array, key: jax.Array | None) -> jax.Array:
    own, norm = weights["mlp"], weights["mlp_norm"]
    hidden = jax.nn.relu(linear(own["up"], layer_norm(norm, x, cfg.norm_epsilon) if cfg.pre_norm else x))
    hidden = dropout(constrain(hidden, ("batch", "seq", "mlp")), cfg.dropout, fold_name(key, "mlp"))
    out = dropout(linear(own["down"], hidden), cfg.dropout, fold_name(key, "mlp_output"))
    return x + out if cfg.pre_norm else layer_norm(norm, x + out, cfg.norm_epsilon)


def logits(cfg: Config, params: dict[str, Any], hidden: jax.Array) -> jax.Array:
    """Causal: log-probabilities of the next token, normalised, [B, T, V]; classification: [B, T, num_labels]. float32.

    Raises:
        ValueError: the model has no head.
    """
    if cfg.task != "causal":
        return heads.head_logits(cfg.task, params, hidden)
    return constrain(adaptive_softmax.log_probabilities(_clusters(cfg), params, hidden), ("batch", None, "vocab"))


def cross_entropy(
    cfg: Config, params: dict[str, Any], hidden: jax.Array, targets: jax.Array, weights: jax.Array
) -> jax.Array:
    """``sum(weights * -log p(target))``, which asks each cluster of the vocabulary for its own words alone."""
    return adaptive_softmax.cross_entropy(_clusters(cfg), params, hidden, targets, weights)


def summary(
    cfg: Config,
    params: dict[str, Any],
    hidden: jax.Array,
    segment_ids: jax.Array | None = None,
    key: jax.Array | None = None,
) -> jax.Array:
    """What the classifier reads: the hidden state of each row's last token, [B, 1, D]."""
    return heads.last_real(hidden, segment_ids)


VARIANTS = {
    "transfo-xl-wt103": Config(),
    # The base model of the paper (table 1), as in the authors' PyTorch script.
    "transformer-xl-base": Config(
        embedding_divisor=1, num_layers=16, num_heads=10, head_dim=41, embed_dim=410, token_dim=410, mlp_dim=2100,
        memory_length=150, same_length=False, clamp_length=None, untie_relative=False,
    ),
    "transformer-xl-tiny": Config(
        vocab_size=64, cutoffs=(56, 60), embedding_divisor=1, num_layers=2, num_heads=4, head_dim=8, embed_dim=32,
        token_dim=32, mlp_dim=64, memory_length=16, same_length=False, clamp_length=None,
    ),
}  # fmt: skip


def _read_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    cutoffs, clamp = config.get("cutoffs", []), config.get("clamp_len", 0)
    if not isinstance(cutoffs, list) or any(type(cutoff) is not int for cutoff in cutoffs):
        raise ValueError(f"cutoffs={cutoffs!r} must be a list of whole numbers")
    if type(clamp) is not int:
        raise ValueError(f"clamp_len={clamp!r} must be a whole number")
    if "cutoffs" in config:
        fields["cutoffs"] = tuple(cutoffs)
    if "clamp_len" in config:
        fields["clamp_length"] = clamp if clamp > 0 else None
    tied = config.get("tie_projs") or [False, config.get("proj_share_all_but_first", True)]
    if config.get("tie_projs") and "cutoffs" in config and len(tied) != 1 + len(cutoffs):
        raise ValueError(f"tie_projs={tied} must have one entry more than cutoffs={cutoffs}")
    if tied[0] or len(set(tied[1:])) > 1:
        raise ValueError(f"tie_projs={tied} is not supported: the first must be false and the others equal")
    fields["tie_projections"] = all(tied[1:])
    return fields


def _write_fields(cfg: Config) -> dict[str, Any]:
    return {
        "cutoffs": list(cfg.cutoffs),
        "clamp_len": -1 if cfg.clamp_length is None else cfg.clamp_length,
        "proj_share_all_but_first": cfg.tie_projections,
        "tie_projs": [False] + [cfg.tie_projections] * len(cfg.cutoffs),
    }


_CLUSTERS = range(1, 9)
_PROJECTIONS = [
    *("token_projection", "head/projection"),
    *(f"{where}tails/cluster_{i}/projection" for where in ("", "head/") for i in _CLUSTERS),
]

HUGGING_FACE = (
    files.Format(
        architectures={
            "TransfoXLLMHeadModel": {"task": "causal"},
            "TransfoXLModel": {"task": "none"},
            "TransfoXLForSequenceClassification": {"task": "classification"},
        },
        model_type="transfo-xl",
        prefix="transformer.",
        fields={
            "vocab_size": "vocab_size",
            "embedding_divisor": "div_val",
            "num_layers": "n_layer",
            "num_heads": "n_head",
            "head_dim": "d_head",
            "embed_dim": "d_model",
            "token_dim": "d_embed",
            "mlp_dim": "d_inner",
            "memory_length": "mem_len",
            "same_length": "same_length",
            "pre_norm": "pre_lnorm",
            "untie_relative": "untie_r",
            "norm_epsilon": "layer_norm_epsilon",
            "init_stddev": "init_std",
            "projection_init_stddev": "proj_init_std",
            "tie_embeddings": "tie_word_embeddings",
            "dropout": "dropout",
            "attention_dropout": "dropatt",
        },
        read_fields=_read_fields,
        write_fields=_write_fields,
        required={"attn_type": 0, "adaptive": True, "sample_softmax": -1},
        aliases={
            "n_token": "vocab_size",
            "hidden_size": "d_model",
            "num_attention_heads": "n_head",
            "num_hidden_layers": "n_layer",
        },
        token_ids={"eos_token_id": 0},
        tensors={
            "token_embedding": "word_emb.emb_layers.0.weight",
            "token_projection": "word_emb.emb_projs.0",
            **{f"tails/cluster_{i}/embedding": f"word_emb.emb_layers.{i}.weight" for i in _CLUSTERS},
            **{f"tails/cluster_{i}/projection": f"word_emb.emb_projs.{i}" for i in _CLUSTERS},
            "content_bias": "r_w_bias",
            "position_bias": "r_r_bias",
            "layers/attention/content_bias": "layers.{layer}.dec_attn.r_w_bias",
            "layers/attention/position_bias": "layers.{layer}.dec_attn.r_r_bias",
            "layers/attention/qkv/weight": "layers.{layer}.dec_attn.qkv_net.weight",
            "layers/attention/relative/weight": "layers.{layer}.dec_attn.r_net.weight",
            "layers/attention/output/weight": "layers.{layer}.dec_attn.o_net.weight",
            "layers/attention_norm/scale": "layers.{layer}.dec_attn.layer_norm.weight",
            "layers/attention_norm/bias": "layers.{layer}.dec_attn.layer_norm.bias",
            "layers/mlp/up/weight": "layers.{layer}.pos_ff.CoreNet.0.weight",
            "layers/mlp/up/bias": "layers.{layer}.pos_ff.CoreNet.0.bias",
            "layers/mlp/down/weight": "layers.{layer}.pos_ff.CoreNet.3.weight",
            "layers/mlp/down/bias": "layers.{layer}.pos_ff.CoreNet.3.bias",
            "layers/mlp_norm/scale": "layers.{layer}.pos_ff.layer_norm.weight",
            "layers/mlp_norm/bias": "layers.{layer}.pos_ff.layer_norm.bias",
        },
        head={
            "head/bias": "crit.out_layers.0.bias",
            "head/embedding": "crit.out_layers.0.weight",
            "head/projection": "crit.out_projs.0",
            "head/cluster_weight": "crit.cluster_weight",
            "head/cluster_bias": "crit.cluster_bias",
            **{f"head/tails/cluster_{i}/bias": f"crit.out_layers.{i}.bias" for i in _CLUSTERS},
            **{f"head/tails/cluster_{i}/embedding": f"crit.out_layers.{i}.weight" for i in _CLUSTERS},
            **{f"head/tails/cluster_{i}/projection": f"crit.out_projs.{i}" for i in _CLUSTERS},
            "classifier/weight": "score.weight",
        },
        copies={  # when tied
            "crit.out_layers.0.weight": "token_embedding",
            **{f"crit.out_layers.{i}.weight": f"tails/cluster_{i}/embedding" for i in _CLUSTERS},
            **{f"crit.out_projs.{i}": f"tails/cluster_{i}/projection" for i in _CLUSTERS},
        },
        layouts={
            "layers/attention/qkv/weight": ((1, 2, 3), (0,)),
            "layers/attention/relative/weight": ((1, 2), (0,)),
            "layers/attention/output/weight": ((2,), (0, 1)),
            "layers/mlp/up/weight": files.TRANSPOSED,
            "layers/mlp/down/weight": files.TRANSPOSED,
            "classifier/weight": files.TRANSPOSED,
            **dict.fromkeys(_PROJECTIONS, files.TRANSPOSED),
        },
        ignored=(r"pos_emb\.inv_freq",),
    ),
)
