"""What to train for: one file each, with the data side (``batch``, on the host) and the loss side (``loss``).

    loss(model, params, batch, *, key=None, state=None) -> (total, weight, state)

A sum and what to divide it by, so that gradients accumulated over parts of a batch equal those of the whole; and what
the model carries to the next batch of a stream (None where it carries nothing). The ``task`` of a config is the name of
the objective that trains it.
"""

from __future__ import annotations

import importlib
from types import ModuleType


def objective(task: str) -> ModuleType:
    """The objective of a task, ``causal`` for example.

    Raises:
        ValueError: nothing trains a model with this task: it has no head.
    """
    if task == "none":
        raise ValueError("a model with task='none' has no head, so nothing trains it: choose another task")
    return importlib.import_module(f"jaxlm.objectives.{task}")
