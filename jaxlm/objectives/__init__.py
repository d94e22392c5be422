"""Training objectives.

In the module of each objective, the function ``batch`` makes a batch on the host, and ``loss`` computes the loss of a
batch. The module ``jaxlm.objectives.batch`` has the code that the objectives share.

    loss(model, params, batch, *, key=None, state=None) -> (total, weight, state)

``total`` is a sum over targets, and ``weight`` its divisor. So gradients that are accumulated over microbatches equal
the gradients of the whole batch, except for dropout, batch norms and losses of routers. A batch without targets gives
``total`` 0, ``weight`` 0 and a gradient of 0. Its mean loss is 0 / 0 = NaN, as with ``reduction="mean"`` in torch, and
the ``Trainer`` skips the step. ``state`` is the second output of ``Model.apply``: the model state for the next batch of
a stream, None without a state, or new running statistics (``resnet``). A loss that is a
``jaxlm.objectives.batch.LossWithTerms`` also has terms, such as the losses of routers, which are logged under their
names. The ``task`` of a config is the name of the objective that trains the model, or "none". T5 and ``attention_rnn``
with the task ``seq2seq`` can also be trained with ``span_corruption``.
"""

from __future__ import annotations

import importlib
from types import ModuleType


def objective(task: str) -> ModuleType:
    """The module of the objective for a task, such as ``causal``.

    Raises:
        ValueError: the task is "none", so the model has no head to train.
        ModuleNotFoundError: there is no objective with this name.
    """
    if task == "none":
        raise ValueError("a model with task='none' has no head, so nothing trains it: choose another task")
    return importlib.import_module(f"jaxlm.objectives.{task}")
