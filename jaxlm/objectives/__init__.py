"""Training objectives. In each module, ``batch`` makes a batch on the host, and ``loss`` computes the loss of a batch.

    loss(model, params, batch, *, key=None, state=None) -> (total, weight, state)

``total`` is a sum over targets, and ``weight`` its divisor. So gradients that are accumulated over microbatches equal
the gradients of the whole batch. A batch without targets gives ``total`` 0, ``weight`` 0 and a gradient of 0. Its mean
loss is 0 / 0 = NaN, as with ``reduction="mean"`` in torch, and the ``Trainer`` skips the step. ``state`` is the model
state for the next batch of a stream, or None if the model has no state. A loss that is a
``jaxlm.objectives.batch.LossWithTerms`` also has terms, such as the losses of routers, which are logged under their
names. The ``task`` of a config is the name of the objective that trains the model.
"""

from __future__ import annotations

import importlib
from types import ModuleType


def objective(task: str) -> ModuleType:
    """The module of the objective for a task, such as ``causal``.

    Raises:
        ValueError: the task is "none", so the model has no head to train.
    """
    if task == "none":
        raise ValueError("a model with task='none' has no head, so nothing trains it: choose another task")
    return importlib.import_module(f"jaxlm.objectives.{task}")
