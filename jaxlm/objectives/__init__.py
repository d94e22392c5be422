"""Training objectives, one module each: ``batch`` makes a batch on the host, ``loss`` computes its loss.

    loss(model, params, batch, *, key=None, state=None) -> (total, weight, state)

The loss is a sum (``total``) and its divisor (``weight``), so that gradients accumulated over parts of a batch equal
the gradients of the whole batch. A batch without a target, such as one without rows, gives 0 and 0 and a gradient of 0.
Its mean is 0 / 0 = NaN, as with ``reduction="mean"`` in torch, and the ``Trainer`` skips the step. ``state`` is the
model state for the next batch of a stream; None if the model has no state. The ``task`` of a config is the name of the
objective that trains it.
"""

from __future__ import annotations

import importlib
from types import ModuleType


def objective(task: str) -> ModuleType:
    """The module of a task's objective, such as ``causal``.

    Raises:
        ValueError: task none, which has no head to train.
    """
    if task == "none":
        raise ValueError("a model with task='none' has no head, so nothing trains it: choose another task")
    return importlib.import_module(f"jaxlm.objectives.{task}")
