"""Token classification: one label per token, as in part-of-speech tagging or named entity recognition.

If a word has several tokens, the published recipe (Devlin et al. 2019, section 5.3) labels its first token and
ignores its other tokens.

Shapes: B batch, T time.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxlm.models import common
from jaxlm.objectives.batch import Batch, token_loss
from jaxlm.objectives.classification import IGNORED_LABEL, targets_and_weights
from jaxlm.spec import require_arrays

__all__ = ["IGNORED_LABEL", "batch", "loss"]

loss = token_loss


def batch(
    tokens: np.ndarray,
    labels: np.ndarray,
    segment_ids: np.ndarray | None = None,
    *,
    num_labels: int,
    inputs: dict[str, Any] | None = None,
) -> Batch:
    """A batch of tokens [B, T] and their labels [B, T]. Padding and tokens with ``IGNORED_LABEL`` have weight 0.

    Args:
        num_labels: number of labels. Labels are in [0, num_labels).
        inputs: further keyword arguments of ``apply``, such as ``token_types``.

    Raises:
        ValueError: the shapes do not match, tokens or labels are not integers, or the label of a token that is not
            padding is out of range.
        TypeError: an argument is not an array.
    """
    common.check_tokens(tokens, segment_ids, None, None)
    require_arrays(labels=labels)
    if labels.shape != tokens.shape:
        raise ValueError(f"labels {list(labels.shape)} must have the shape of tokens {list(tokens.shape)}")
    targets, weights = targets_and_weights(labels, num_labels, segment_ids)
    return Batch(tokens, targets, weights, segment_ids, dict(inputs or {}))
