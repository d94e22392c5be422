"""Training objectives.

Each objective is a module. Its function ``batch`` makes a batch on the host, and its function ``loss`` computes the
loss of a batch. The module ``jaxlm.objectives.batch`` has the code that the objectives share.

    loss(model, params, batch, *, key=None, state=None) -> (total, weight, state)

``total`` is the weighted sum of the losses of the targets, and ``weight`` is the sum of the weights. The mean loss is
``total / weight``. The ``Trainer`` adds the gradients of the totals of all micro-batches and then divides by the sum of
their weights. So the result equals the gradient of the mean loss of the whole batch. It differs if the model has
dropout, batch norms or losses of routers, because these are computed for each micro-batch (with ``shard_map`` or
``pmap``: for each device).

A batch without targets gives ``total`` 0, ``weight`` 0 and a gradient of 0. Its mean loss is 0 / 0 = NaN, as with
``reduction="mean"`` in torch, and the ``Trainer`` skips the step.

``state`` is the second output of ``Model.apply``: the model state for the next batch of a stream, None without a state,
or new running statistics (``resnet``).

A :class:`~jaxlm.objectives.batch.LossWithTerms` is a loss that also returns terms, such as the losses of routers. The
``Trainer`` logs each term under its name.

The ``task`` of a config is the name of the objective that trains the model, or "none". T5 and ``attention_rnn`` with
the task ``seq2seq`` can also be trained with ``span_corruption``.
"""

from __future__ import annotations

import importlib
from types import ModuleType

OBJECTIVES = (
    "causal", "classification", "masked", "permutation", "seq2seq", "span_corruption", "span_qa",
    "token_classification",
)  # fmt: skip
"""The names of all objectives."""


def objective(task: str) -> ModuleType:
    """The module of the objective for a task, such as ``jaxlm.objectives.causal`` for "causal".

    Raises:
        ValueError: the task is "none", because a model with this task has no head to train; or there is no objective
            with this name.
    """
    if task == "none":
        raise ValueError("a model with task='none' has no head, so it has no objective: choose another task")
    if task not in OBJECTIVES:
        raise ValueError(f"there is no objective for task={task!r}: choose from {', '.join(OBJECTIVES)}")
    return importlib.import_module(f"jaxlm.objectives.{task}")
