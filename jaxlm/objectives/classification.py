"""Classification: one label for each row, from the family's ``summary`` of it.

Shapes: B batch, T time, D' width of a summary.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.models import Model, common
from jaxlm.nn.loss import chunked_cross_entropy
from jaxlm.objectives.batch import Batch, hidden_states

IGNORED = -100
"""The label of what does not count, as in ``transformers`` and torch."""


def batch(
    tokens: np.ndarray,
    labels: np.ndarray,
    segment_ids: np.ndarray | None = None,
    *,
    num_labels: int,
    inputs: dict[str, Any] | None = None,
) -> Batch:
    """Tokens [B, T] and the label of each row [B]; rows labelled ``IGNORED`` do not count.

    Args:
        num_labels: labels are below it.
        inputs: further arrays for ``apply``, as ``token_types``.

    Raises:
        ValueError: shapes that do not agree, or a label out of range.
    """
    common.check_tokens(tokens, segment_ids, None, None)
    if labels.shape != tokens.shape[:1]:
        raise ValueError(f"labels {list(labels.shape)} must be one for each row of tokens {list(tokens.shape)}")
    targets, weights = counted(labels, num_labels)
    return Batch(tokens, targets, weights, segment_ids, dict(inputs or {}))


def counted(labels: np.ndarray, num_labels: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels as targets int32 and weights float32: 0 where ``IGNORED``, and there the target is 0.

    Raises:
        ValueError: a label that is neither ``IGNORED`` nor in [0, num_labels).
    """
    wrong = np.unique(labels[(labels != IGNORED) & ((labels < 0) | (labels >= num_labels))])
    if wrong.size:
        raise ValueError(f"label {wrong[0]} is not in [0, num_labels={num_labels}); {IGNORED} is what does not count")
    return np.where(labels == IGNORED, 0, labels).astype(np.int32), (labels != IGNORED).astype(np.float32)


def loss(
    model: Model, params: Any, batch: Batch, *, key: jax.Array | None = None, state: Any = None
) -> tuple[jax.Array, jax.Array, Any]:
    """Summed negative log-likelihood in nats of the rows' labels, the weight that it sums over, and what the model
    carries on."""
    hidden, state = hidden_states(model, params, batch, key, state)
    summary_B1D = model.summary(params, hidden, segment_ids=batch.segment_ids, key=key)
    total = chunked_cross_entropy(model.logits, params, summary_B1D, batch.targets[:, None], batch.weights[:, None])
    return total, jnp.sum(batch.weights), state
