"""Code that several families share: output heads for labels, the next-token head of decoders, and pooling functions.

The config field ``task`` selects the head of a model. A task is the name of an objective in ``jaxlm.objectives``, or
"none" for a model without a head. The other heads that predict tokens are in the modules of their families. The heads
for labels are linear layers, which compute logits:

    classification        ``classifier``: the label of each row, from the pooled output (``pool``) [B, 1, D]
    token_classification  ``token_classifier``: the label of each token
    span_qa               ``span``: two logits of each token, for the first and for the last token of an answer

Shapes: B batch, T time, D width of hidden states.
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxlm.nn.embedding import Unembedding, round_up
from jaxlm.nn.linear import linear, linear_specs
from jaxlm.sharding import row_sharding
from jaxlm.spec import ArraySpec, Initializer, Params

DecoderTask = Literal["causal", "classification", "token_classification", "span_qa", "none"]
"""The tasks of a decoder with the heads of :func:`decoder_logits`."""
LABEL_HEADS = {"classification": "classifier", "token_classification": "token_classifier", "span_qa": "span"}
"""The name of the head for labels in the parameters, by task."""
LABEL_HEAD_PARAMETERS = tuple(f"{head}/{name}" for head in LABEL_HEADS.values() for name in ("weight", "bias"))
"""The paths of the parameters of all heads for labels."""


def head_logits(task: str, params: Params, hidden: jax.Array) -> jax.Array:
    """The logits of the head for labels, float32: [B, T, num_labels], or [B, T, 2] for span_qa.

    For classification, T is 1, because ``hidden`` is the pooled output.

    Raises:
        ValueError: the task has no head for labels.
    """
    if task not in LABEL_HEADS:
        raise ValueError(
            f"a model with task={task!r} has no head for labels: choose a task from {', '.join(LABEL_HEADS)}"
        )
    return linear(params[LABEL_HEADS[task]], hidden).astype(jnp.float32)


def require_pooled_output(task: str, params: Params, name: str) -> None:
    """Raise ``ValueError`` if ``params`` do not contain ``name``, a layer that only task classification has."""
    if name not in params:
        raise ValueError(f"a model with task={task!r} has no pooled output: set task='classification'")


def decoder_logits(cfg: Any, params: Params, hidden: jax.Array) -> jax.Array | Unembedding:
    """The logits of a decoder's head: of the next token, as an ``Unembedding``, or of labels, float32.

    The head for tokens is ``params["head"]``: a table, or a dict with ``weight`` (a table) and ``bias``. If the config
    has ``tie_embeddings=True``, the table is ``params["token_embedding"]`` instead. If the config has a field
    ``logits_soft_cap``, it bounds these logits (``jaxlm.nn.embedding.unembed``). For labels, see :func:`head_logits`.
    For task classification, ``hidden`` is the output of the family's ``pool``.

    Raises:
        ValueError: the task has no head.
    """
    if cfg.task != "causal":
        return head_logits(cfg.task, params, hidden)
    is_tied, soft_cap = getattr(cfg, "tie_embeddings", False), getattr(cfg, "logits_soft_cap", None)
    head = params.get("head", {}) if is_tied else params["head"]
    head = head if isinstance(head, dict) else {"weight": head}
    table = params["token_embedding"] if is_tied else head["weight"]
    return Unembedding(table, hidden, head.get("bias"), vocab_size=cfg.vocab_size, soft_cap=soft_cap)


def table_specs(cfg: Any, width: int, init: Initializer) -> ArraySpec:
    """The spec of a token embedding or of the weights of a head for tokens, [V, width]; V is padded."""
    return ArraySpec((round_up(cfg.vocab_size, cfg.vocab_multiple), width), ("vocab", "embed"), init, decay=True)


def vocab_bias_specs(cfg: Any) -> ArraySpec:
    """The spec of the bias of a head for tokens, [V]; V is padded."""
    return ArraySpec((round_up(cfg.vocab_size, cfg.vocab_multiple),), ("vocab",))


def decoder_specs(
    cfg: Any, layers: Any, norm: dict[str, ArraySpec], init: Initializer, head_init: Initializer | None = None
) -> dict[str, Any]:
    """The specs of a decoder: ``token_embedding``, ``layers``, ``final_norm``, and the head of :func:`decoder_logits`.

    Args:
        layers: the specs of all layers (``jaxlm.spec.layers``).
        norm: the specs of the final norm.
        init: the initializer of the token embedding.
        head_init: the initializer of the head; None: ``init``.
    """
    return {
        "token_embedding": table_specs(cfg, cfg.embed_dim, init),
        "layers": layers,
        "final_norm": norm,
        **decoder_head_specs(cfg, cfg.embed_dim, init if head_init is None else head_init),
    }


def decoder_head_specs(cfg: Any, width: int, init: Initializer) -> dict[str, Any]:
    """The specs of the head of :func:`decoder_logits`; ``{}`` if the head is the token embedding, or if there is none.

    The head for task classification has no bias.
    """
    if cfg.task == "causal":
        return {} if getattr(cfg, "tie_embeddings", False) else {"head": table_specs(cfg, width, init)}
    num_labels = getattr(cfg, "num_labels", 0)
    return head_specs(cfg.task, width, num_labels, init, bias=cfg.task != "classification")


def head_specs(
    task: str, width: int, num_labels: int, init: Initializer, *, bias: bool = True
) -> dict[str, dict[str, ArraySpec]]:
    """The specs of the head for labels, such as ``{"classifier": {"weight", "bias"}}``; ``{}`` if there is none."""
    if task not in LABEL_HEADS:
        return {}
    outputs = 2 if task == "span_qa" else num_labels
    return {LABEL_HEADS[task]: linear_specs((width, outputs), ("embed", None), init, bias=bias)}


def concatenate_features(x_BTD: jax.Array) -> jax.Array:
    """The features of all positions of a row as one vector, [B, 1, T * D]."""
    B, T, D = x_BTD.shape
    return jax.lax.reshape(x_BTD, (B, 1, T * D), out_sharding=row_sharding(x_BTD))


def first_token_hidden(hidden_BTD: jax.Array, segment_ids_BT: jax.Array | None) -> jax.Array:
    """The hidden state of each row's first token that is not padding, [B, 1, D]; of position 0 if all are padding."""
    if segment_ids_BT is None:
        return hidden_BTD[:, :1]
    index_B = jnp.argmax(segment_ids_BT > 0, axis=1)
    return jnp.take_along_axis(hidden_BTD, index_B[:, None, None], axis=1)


def last_token_hidden(hidden_BTD: jax.Array, segment_ids_BT: jax.Array | None) -> jax.Array:
    """The hidden state of each row's last token that is not padding, [B, 1, D]; of position 0 if all are padding."""
    if segment_ids_BT is None:
        return hidden_BTD[:, -1:]
    index_B = jnp.max(jnp.where(segment_ids_BT > 0, jnp.arange(hidden_BTD.shape[1])[None, :], 0), axis=1)
    return jnp.take_along_axis(hidden_BTD, index_B[:, None, None], axis=1)


def pool_last_token(
    cfg: Any,
    params: Params,
    hidden: jax.Array,
    segment_ids: jax.Array | None = None,
    key: jax.Array | None = None,
) -> jax.Array:
    """The pooled output of a decoder: the hidden state of each row's last token that is not padding, [B, 1, D]."""
    return last_token_hidden(hidden, segment_ids)
