"""NT-ASGD (Merity et al. 2017, algorithm 1): SGD that averages its iterates after validation stops improving.

The chain of ``make_optimizer(OptimizerConfig("nt_asgd", ...))`` includes :func:`averaging`. After each evaluation, the
training loop calls :func:`should_start_averaging`. When the result is True for the first time, the loop calls
:func:`start_averaging`. Evaluation and export use :func:`mean_params`, unless the trainer has ``ema_decay``. The
training steps use the current parameters, which are not averaged.

>>> optimizer = optax.chain(optax.clip_by_global_norm(0.25), optax.sgd(30.0), averaging())
>>> state = optimizer.init(params := {"w": jnp.ones(3)})
>>> losses = [5.0, 4.0, 3.0, 3.5, 3.4, 3.3, 3.2, 3.1]                # validation losses so far
>>> if should_start_averaging(losses):                               # False: 3.1 is below 4.0, the best old loss
...     state = start_averaging(state)
>>> evaluated = mean_params(state)                                   # before averaging: the current parameters
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxlm.config import check_min
from jaxlm.spec import Params


class AveragingState(NamedTuple):
    """The state of :func:`averaging`.

    Attributes:
        iterates: scalar int32, the number of iterates (values of the parameters) in the mean. Before averaging starts,
            0.
        mean: the mean of the last ``iterates`` values of the parameters. Before averaging starts, the current
            parameters.
    """

    iterates: jax.Array
    mean: Any


def should_start_averaging(losses: Sequence[float], nonmono: int = 5) -> bool:
    """Whether the validation loss has stopped improving.

    The result is True if the newest loss is worse than the best of the losses that are more than ``nonmono``
    evaluations old (``losses[: -nonmono - 1]``). It is False if there are no such losses.

    Args:
        losses: the validation losses of all evaluations so far, with the newest last. NaN is worse than any number.
        nonmono: the non-monotone interval, n in the paper.

    Raises:
        ValueError: ``nonmono`` is less than 1.
    """
    check_min(1, nonmono=nonmono)
    older = [math.inf if math.isnan(loss) else loss for loss in losses[: -nonmono - 1]]
    return bool(older) and not losses[-1] <= min(older)


def averaging() -> optax.GradientTransformation:
    """A transformation that returns updates unchanged and keeps the mean of the parameters in its state.

    It must be the last transformation of a chain, because it adds its updates to the parameters to get the new values.
    The mean includes the parameters at the time of :func:`start_averaging` and after each later update, as in the
    paper's algorithm 1. (The authors' code uses ``torch.optim.ASGD``, whose mean begins with the second step after the
    start.) The state needs as much memory as one copy of the parameters.
    """

    def init(params: Params) -> AveragingState:
        return AveragingState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, params))

    def update(updates: Any, state: AveragingState, params: Params | None = None) -> tuple[Any, AveragingState]:
        if params is None:
            raise ValueError("averaging needs the parameters: optimizer.update(gradients, state, params)")
        iterates = jnp.where(state.iterates > 0, state.iterates + 1, 0)
        weight = 1.0 / jnp.maximum(iterates, 1)

        def add(mean: jax.Array, new: jax.Array) -> jax.Array:
            return jnp.where(iterates > 0, mean + (new - mean) * weight.astype(mean.dtype), new)

        return updates, AveragingState(iterates, jax.tree.map(add, state.mean, optax.apply_updates(params, updates)))

    return optax.GradientTransformation(init, update)


def has_averaging(state: Any) -> bool:
    """Whether an optimizer state contains the state of :func:`averaging`."""
    return any(_is_averaging(node) for node in jax.tree.leaves(state, is_leaf=_is_averaging))


def has_started(state: Any) -> bool:
    """Whether averaging has started in an optimizer state. False if it has no state of :func:`averaging`.

    Raises:
        ValueError: the state has more than one state of :func:`averaging`.
    """
    return has_averaging(state) and int(_averaging_state(state).iterates) > 0


def start_averaging(state: Any) -> Any:
    """An optimizer state in which averaging has started. If it has already started, the result is equal to ``state``.

    Raises:
        ValueError: ``state`` does not contain exactly one state of :func:`averaging`.
    """
    _averaging_state(state)
    return _map_averaging(state, lambda node: node._replace(iterates=jnp.maximum(node.iterates, 1)))


def mean_params(state: Any, params: Params | None = None) -> Any:
    """The mean of the parameters since :func:`start_averaging`, or the current parameters if averaging has not started.

    Args:
        state: an optimizer state.
        params: the current parameters. The result has these values for parameters without a mean, which are masked in
            the state, for example inside ``optax.partition``. None: all parameters have a mean.

    Raises:
        ValueError: ``state`` does not contain exactly one state of :func:`averaging`.
    """
    mean = _averaging_state(state).mean
    if params is None:
        return mean
    return jax.tree.map(lambda x, current: current if _is_masked(x) else x, mean, params, is_leaf=_is_masked)


def map_mean(state: Any, change: Callable[[Any], Any]) -> Any:
    """``state`` with ``change(mean)`` as the mean of :func:`averaging`. A state without a mean is returned unchanged.

    Args:
        state: an optimizer state.
    """
    return _map_averaging(state, lambda node: node._replace(mean=change(node.mean)))


def _map_averaging(state: Any, change: Callable[[AveragingState], AveragingState]) -> Any:
    """``state`` with ``change`` applied to each state of :func:`averaging` in it."""
    return jax.tree.map(lambda node: change(node) if _is_averaging(node) else node, state, is_leaf=_is_averaging)


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def _is_averaging(node: Any) -> bool:
    return isinstance(node, AveragingState)


def _averaging_state(state: Any) -> AveragingState:
    states = [node for node in jax.tree.leaves(state, is_leaf=_is_averaging) if _is_averaging(node)]
    if len(states) != 1:
        raise ValueError(f"the optimizer state has {len(states)} averages: put averaging() into its chain exactly once")
    return states[0]
