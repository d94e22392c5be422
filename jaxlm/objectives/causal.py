"""Next-token prediction: each token is predicted from the tokens before it in its document.

Shapes: B batch, T time.
"""

from __future__ import annotations

import numpy as np

from jaxlm.models import Model, common
from jaxlm.objectives.batch import Batch, Loss, token_loss, token_loss_with_load_balance
from jaxlm.spec import require_arrays

loss = token_loss
loss_with_load_balance = token_loss_with_load_balance

_TRAINING_LOSS_WITH_EXPERTS = loss_with_load_balance(0.01)  # the coefficient of Fedus et al. 2022
_EVALUATION_LOSS_WITH_EXPERTS = loss_with_load_balance(0.0)


def training_loss(model: Model) -> Loss:
    """The loss for training a model: ``loss``, or ``loss_with_load_balance(0.01)`` if the model has experts."""
    return _TRAINING_LOSS_WITH_EXPERTS if model.has_experts else loss


def evaluation_loss(model: Model) -> Loss:
    """The loss for evaluating a model: the negative log-likelihood of ``loss``.

    If the model has experts, the losses of the routers are reported as terms but do not count in the total.
    """
    return _EVALUATION_LOSS_WITH_EXPERTS if model.has_experts else loss


def batch(tokens: np.ndarray, segment_ids: np.ndarray | None = None, reset: np.ndarray | None = None) -> Batch:
    """A batch from windows [B, T + 1]: the first T tokens are the inputs, and the last T tokens are the targets.

    A target has weight 1 if it and the token directly before it belong to the same document. Otherwise it has weight 0.
    So padding, the first token of a document and a token directly after padding have weight 0. Without ``segment_ids``,
    all weights are 1.

    Args:
        segment_ids: [B, T + 1], 0 for padding and n for document n.
        reset: as in :class:`~jaxlm.objectives.batch.Batch`.

    Raises:
        ValueError: ``tokens`` or ``segment_ids`` are not integers of shape [B, T + 1], or T is 0.
        TypeError: an argument is not an array.
    """
    common.check_tokens(tokens, segment_ids, None, None)
    require_arrays(reset=reset)
    if tokens.shape[1] < 2:
        raise ValueError(f"tokens {list(tokens.shape)} must have at least two tokens per row")
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    if segment_ids is None:
        return Batch(inputs, targets, np.ones(targets.shape, np.float32), reset=reset)
    current, following = segment_ids[:, :-1], segment_ids[:, 1:]
    return Batch(inputs, targets, ((current == following) & (following > 0)).astype(np.float32), current, reset=reset)
