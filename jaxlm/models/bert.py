"""BERT (Devlin et al. 2019): a bidirectional transformer encoder with post-norm blocks and a tied masked-token head.

The code follows the published weights: erf-GELU, epsilon 1e-12, learned positions, a layer norm after the embeddings,
and token type 0 by default. The layers are as in Vaswani et al. 2017: ``x = norm(x + sublayer(x))``.

Shapes: B batch, T time, P predicted positions (T or fewer), D model width, H heads, K head width (D / H), F hidden
width of the MLP, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from jaxlm import spec
from jaxlm.models import common, heads
from jaxlm.nn.activation import Activation, activation
from jaxlm.nn.attention import Implementation, attention
from jaxlm.nn.attention.mask import Mask, document_mask
from jaxlm.nn.dropout import dropout
from jaxlm.nn.embedding import Unembedding, embed, widen_ids
from jaxlm.nn.linear import linear, linear_specs
from jaxlm.nn.norm import layer_norm, layer_norm_specs
from jaxlm.nn.segments import positions_in_segments
from jaxlm.sharding import constrain
from jaxlm.spec import ArraySpec, Normal, Params, fold_in_name

Task = Literal["masked", "classification", "token_classification", "span_qa", "none"]


@dataclasses.dataclass(frozen=True)
class Config(common.TransformerConfig):
    """Shape and behavior of a BERT. The defaults are the published base model, uncased."""

    first_position: ClassVar[int] = 0
    """Row of the position table for the first token of a document."""

    vocab_size: int = 30522
    """Number of token ids."""
    max_positions: int = 512
    """Maximum length of a sequence."""
    num_token_types: int = 2
    """Number of token types: 0 for the first sentence, 1 for the second."""
    num_layers: int = 12
    """Number of blocks."""
    num_heads: int = 12
    """Attention heads of each block; must divide embed_dim."""
    embed_dim: int = 768
    """Model width."""
    mlp_dim: int | None = None
    """Hidden width of the MLP; None means 4 * embed_dim."""
    activation: Activation = "gelu"
    """Nonlinearity of the MLP and of the masked-token head."""
    norm_epsilon: float = 1e-12
    """Added to the variance in layer norms."""
    init_stddev: float = 0.02
    """Standard deviation of initial weights."""
    hidden_dropout: float = 0.1
    """Dropout rate after the embeddings and on the output of each sublayer."""
    attention_dropout: float = 0.1
    """Dropout rate on attention probabilities."""
    classifier_dropout: float | None = None
    """Dropout rate on the input of the head for classification or token_classification; None means hidden_dropout."""
    task: Task = "masked"
    """Output head: masked, classification, token_classification (label of each token), span_qa (answer span), or
    none."""
    next_sentence: bool = False
    """Add a head that predicts whether the second sentence follows the first; only for task masked or none."""
    num_labels: int = 2
    """Number of labels if the task is classification or token_classification."""
    attention_implementation: Implementation | None = None
    """Name of the attention implementation; None selects one for the device and the shapes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        common.check_divides(self, "num_heads", "embed_dim")
        if self.next_sentence and self.task not in ("masked", "none"):
            raise ValueError(f"next_sentence=True needs task='masked' or task='none', got task={self.task!r}")


def apply(
    cfg: Config,
    params: Params,
    tokens: jax.Array,
    *,
    state: None = None,
    segment_ids: jax.Array | None = None,
    positions: jax.Array | None = None,
    key: jax.Array | None = None,
    token_types: jax.Array | None = None,
) -> tuple[jax.Array, None]:
    """The hidden states of the last layer, [B, T, D], and None: an encoder has no state.

    For the task token_classification, these are the hidden states after dropout, the inputs of the head.

    Args:
        tokens: [B, T] integer ids. An id outside the vocabulary gives NaN, also for other tokens of the row.
        segment_ids: [B, T] int32, 0 for padding and n for document n. Documents do not interact. Default: one document.
        positions: [B, T] int32. Default: the position within the document. A position outside [0, max_positions) gives
            NaN, also for other tokens of the row.
        key: random key for dropout; None: no dropout.
        token_types: [B, T] integers, the index of each token's sentence in its document. Default: 0. An index outside
            [0, num_token_types) gives NaN, also for other tokens of the row. The sentences of a document attend to each
            other.

    Raises:
        ValueError: ``state`` is not None; the inputs are not integers of the same shape; or there are more tokens than
            ``max_positions``, and neither ``segment_ids`` nor ``positions`` is given.
    """
    if state is not None:
        raise ValueError("an encoder reads the whole sequence at once and carries no state: leave state=None")
    common.check_tokens(tokens, segment_ids, positions, cfg.max_positions)
    if token_types is not None:
        common.check_integers("token_types", token_types, tokens)
    x = _embed(cfg, params, tokens, segment_ids, positions, token_types, key)
    mask = document_mask(segment_ids)

    def block(x: jax.Array, layer: Any) -> tuple[jax.Array, None]:
        weights, _, layer_key = layer
        attended = _attention(cfg, weights["attention"], x, mask, layer_key)
        x = layer_norm(weights["attention_norm"], x + attended, cfg.norm_epsilon)
        x = constrain(x, ("batch", "seq", "activation_embed"))
        x = layer_norm(weights["mlp_norm"], x + _mlp(cfg, weights["mlp"], x, layer_key), cfg.norm_epsilon)
        return constrain(x, ("batch", "seq", "activation_embed")), None

    x, _ = common.run_layers(block, x, params["layers"], None, key, remat=cfg.remat, num_layers=cfg.num_layers)
    if cfg.task == "token_classification":  # the dropout before the head is here, because logits() gets no random key
        x = dropout(x, classifier_dropout(cfg), fold_in_name(key, "token_classifier"))
    return x, None


def _embed(
    cfg: Config,
    params: Params,
    tokens: jax.Array,
    segment_ids: jax.Array | None,
    positions: jax.Array | None,
    token_types: jax.Array | None,
    key: jax.Array | None,
) -> jax.Array:
    """The sum of token, position and token type embeddings after layer norm and dropout, [B, T, D]."""
    dtype, types = jnp.dtype(cfg.dtype), params["token_type_embedding"]
    if positions is None:
        positions = positions_in_segments(common.segment_ids_or_ones(tokens, segment_ids))
    if cfg.first_position:
        positions = widen_ids(positions)
        positions = jnp.where(positions < 0, positions, positions + cfg.first_position)  # a negative row gives NaN
    x = embed(params["token_embedding"], tokens, dtype, size=cfg.vocab_size)
    x = x + embed(params["position_embedding"], positions, dtype, rows="positions")
    if token_types is None:  # row 0 is broadcast, so that its gradient is a sum instead of a scatter
        x = x + constrain(jnp.asarray(types), (None, "activation_embed"))[None, :1].astype(dtype)
    else:
        x = x + embed(types, token_types, dtype, rows=None)
    x = layer_norm(params["embedding_norm"], x, cfg.norm_epsilon)
    x = dropout(x, cfg.hidden_dropout, fold_in_name(key, "embedding"))
    return constrain(x, ("batch", "seq", "activation_embed"))


def _attention(cfg: Config, weights: Params, x: jax.Array, mask: Mask, key: jax.Array | None) -> jax.Array:
    q, k, v = common.project_heads(weights, x, "query", "key", "value")
    x = attention(
        q, k, v, mask, dropout=cfg.attention_dropout, key=fold_in_name(key, "attention"),
        implementation=cfg.attention_implementation,
    )  # fmt: skip
    return dropout(
        linear(weights["output"], x, num_input_axes=2), cfg.hidden_dropout, fold_in_name(key, "attention_output")
    )


def _mlp(cfg: Config, weights: Params, x: jax.Array, key: jax.Array | None) -> jax.Array:
    x = activation(cfg.activation)(linear(weights["up"], x))
    x = linear(weights["down"], constrain(x, ("batch", "seq", "mlp")))
    return dropout(x, cfg.hidden_dropout, fold_in_name(key, "mlp_output"))


def logits(cfg: Config, params: Params, hidden: jax.Array) -> jax.Array | Unembedding:
    """The logits of the task's head: of tokens, as an ``Unembedding``, or of labels, float32.

    ``hidden`` is [B, P, D]. For task masked, pass only the hidden states of the masked positions in training. For the
    shapes of the logits of labels, see ``heads.head_logits``. For task classification, ``hidden`` is the output of
    :func:`pool`.

    Raises:
        ValueError: the task is none.
    """
    if cfg.task != "masked":
        return heads.head_logits(cfg.task, params, hidden)
    head = params["masked"]
    x = activation(cfg.activation)(linear(head["dense"], hidden))
    x = layer_norm(head["norm"], x, cfg.norm_epsilon)
    return Unembedding(params["token_embedding"], x, head["bias"], vocab_size=cfg.vocab_size)


def pool(
    cfg: Config,
    params: Params,
    hidden: jax.Array,
    segment_ids: jax.Array | None = None,
    key: jax.Array | None = None,
) -> jax.Array:
    """The pooled output [B, 1, D]: ``tanh(dense(h))``, where h is the hidden state of each row's first token, [CLS].

    A row with several documents gives the pooled output of the first document. For task classification with a ``key``,
    dropout is applied to the result.

    Raises:
        ValueError: the model has no pooler.
    """
    if "pooler" not in params:
        raise ValueError(
            f"a model with task={cfg.task!r} has no pooler: use task 'classification' or 'none', or next_sentence=True"
        )
    pooled = jnp.tanh(linear(params["pooler"], heads.first_token_hidden(hidden, segment_ids)))
    if cfg.task == "classification":
        pooled = dropout(pooled, classifier_dropout(cfg), fold_in_name(key, "classifier"))
    return pooled


def next_sentence_logits(
    cfg: Config, params: Params, hidden: jax.Array, segment_ids: jax.Array | None = None
) -> jax.Array:
    """The next-sentence logits, [B, 2] float32. Index 0: the second sentence follows the first. Index 1: it does not.

    Raises:
        ValueError: the model has no next-sentence head.
    """
    if not cfg.next_sentence:
        raise ValueError("the model has no next-sentence head: use next_sentence=True")
    pooled = pool(cfg, params, hidden, segment_ids)
    return linear(params["next_sentence"], pooled)[:, 0].astype(jnp.float32)


def classifier_dropout(cfg: Config) -> float:
    """The dropout rate on the input of the head for classification or token_classification."""
    return cfg.hidden_dropout if cfg.classifier_dropout is None else cfg.classifier_dropout


def mlp_dim(cfg: Config) -> int:
    """The hidden width of the MLP."""
    return 4 * cfg.embed_dim if cfg.mlp_dim is None else cfg.mlp_dim


def specs(cfg: Config) -> dict[str, Any]:
    """The specs of all parameters.

    As in Hugging Face, only models with the task classification or none, or with ``next_sentence``, have a pooler.
    """
    D, H, K, F = cfg.embed_dim, cfg.num_heads, cfg.embed_dim // cfg.num_heads, mlp_dim(cfg)
    normal = Normal(cfg.init_stddev)
    block = {
        "attention": {
            **{name: linear_specs((D, H, K), ("embed", "heads", "kv"), normal) for name in ("query", "key", "value")},
            "output": linear_specs((H, K, D), ("heads", "kv", "embed"), normal, num_input_axes=2),
        },
        "attention_norm": layer_norm_specs(D),
        "mlp": common.mlp_specs(D, F, normal),
        "mlp_norm": layer_norm_specs(D),
    }
    tree = {
        "token_embedding": heads.table_specs(cfg, D, normal),
        "position_embedding": ArraySpec(
            (cfg.max_positions + cfg.first_position, D), ("positions", "embed"), normal, decay=True
        ),
        "token_type_embedding": ArraySpec((cfg.num_token_types, D), (None, "embed"), normal, decay=True),
        "embedding_norm": layer_norm_specs(D),
        "layers": spec.layers([block] * cfg.num_layers, stacked=cfg.scan_layers),
        **heads.head_specs(cfg.task, D, cfg.num_labels, normal),
    }
    if cfg.task == "masked":
        tree["masked"] = {
            "dense": linear_specs((D, D), ("embed", None), normal),
            "norm": layer_norm_specs(D),
            "bias": heads.vocab_bias_specs(cfg),
        }
    if cfg.task in ("classification", "none") or cfg.next_sentence:
        tree["pooler"] = linear_specs((D, D), ("embed", None), normal)
    if cfg.next_sentence:
        tree["next_sentence"] = linear_specs((D, 2), ("embed", None), normal)
    return tree


VARIANTS = {
    "bert-base-uncased": Config(),
    "bert-base-cased": Config(vocab_size=28996),
    "bert-large-uncased": Config(num_layers=24, num_heads=16, embed_dim=1024),
    "all-minilm-l6-v2": Config(num_layers=6, embed_dim=384, task="none"),
    "bert-tiny": Config(vocab_size=128, max_positions=64, num_layers=2, num_heads=4, embed_dim=32),
}
