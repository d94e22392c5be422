"""Next-token prediction: each token is predicted from the tokens before it.

Shapes: B batch, T time.
"""

from __future__ import annotations

import numpy as np

from jaxlm.objectives.batch import Batch, token_loss

loss = token_loss


def batch(tokens: np.ndarray, segment_ids: np.ndarray | None = None, reset: np.ndarray | None = None) -> Batch:
    """The first T tokens of windows [B, T + 1] as inputs, the last T as targets.

    A target that is padding, or the first token of a document, has weight 0.
    """
    if tokens.ndim != 2 or tokens.shape[1] < 2:
        raise ValueError(f"a window must be [batch, at least 2 tokens], got {list(tokens.shape)}")
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    if segment_ids is None:
        return Batch(inputs, targets, np.ones(targets.shape, np.float32), reset=reset)
    before, after = segment_ids[:, :-1], segment_ids[:, 1:]
    return Batch(inputs, targets, ((before == after) & (after > 0)).astype(np.float32), before, reset=reset)
