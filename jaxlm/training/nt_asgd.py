"""NT-ASGD (Merity et al. 2017, algorithm 1): SGD that averages its iterates after validation stops improving.

The chain of ``make_optimizer(OptimizerConfig("nt_asgd", ...))`` includes :func:`averaging`. After each evaluation, the
training loop calls :func:`should_start_averaging`. When the result is True for the first time, it calls
:func:`start_averaging`. The loop evaluates and exports :func:`mean_params`. The training steps continue from the
parameters that are not averaged.

>>> optimizer = optax.chain(optax.clip_by_global_norm(0.25), optax.sgd(30.0), averaging())
>>> state = optimizer.init(params := {"w": jnp.ones(3)})
>>> losses = [5.0, 4.0, 3.0, 3.5, 3.4, 3.3, 3.2, 3.1]                # validation losses so far
>>> if should_start_averaging(losses):
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
    """The state of :func:`averaging`: ``mean`` is the mean of the last ``iterates`` values of the parameters.

    Before averaging starts, ``iterates`` is 0 and ``mean`` has the current parameters."""

    iterates: jax.Array
    mean: Any


def should_start_averaging(losses: Sequence[float], nonmono: int = 5) -> bool:
    """Whether the newest validation loss is worse than the best of all losses that are more than ``nonmono``
    evaluations old. False if there is no such loss.

    Args:
        losses: the losses of all evaluations so far, with the newest last. NaN is worse than any number.
        nonmono: the non-monotone interval, n in the paper.

    Raises:
        ValueError: ``nonmono`` is not positive.
    """
    check_min(1, nonmono=nonmono)
    older = [math.inf if math.isnan(loss) else loss for loss in losses[: -nonmono - 1]]
    return bool(older) and not losses[-1] <= min(older)


def averaging() -> optax.GradientTransformation:
    """A transformation that returns updates unchanged and keeps the mean of the parameters. It must be last in a chain.

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
    """Whether averaging has started in an optimizer state; False if the state has no :func:`averaging`."""
    return has_averaging(state) and int(_averaging_state(state).iterates) > 0


def start_averaging(state: Any) -> Any:
    """The optimizer state with averaging started; the same state if averaging has already started.

    Raises:
        ValueError: the state has no :func:`averaging`, or more than one.
    """
    _averaging_state(state)
    return _map_averaging(state, lambda node: node._replace(iterates=jnp.maximum(node.iterates, 1)))


def mean_params(state: Any) -> Any:
    """The mean of the parameters since :func:`start_averaging`, or the current parameters if averaging has not started.

    Raises:
        ValueError: the state has no :func:`averaging`, or more than one.
    """
    return _averaging_state(state).mean


def map_mean(state: Any, change: Callable[[Any], Any]) -> Any:
    """An optimizer state whose mean is ``change(mean)``. A state without :func:`averaging` is unchanged."""
    return _map_averaging(state, lambda node: node._replace(mean=change(node.mean)))


def _map_averaging(state: Any, change: Callable[[AveragingState], AveragingState]) -> Any:
    """An optimizer state with ``change`` of each state of :func:`averaging`."""
    return jax.tree.map(lambda node: change(node) if _is_averaging(node) else node, state, is_leaf=_is_averaging)


def _is_averaging(node: Any) -> bool:
    return isinstance(node, AveragingState)


def _averaging_state(state: Any) -> AveragingState:
    states = [node for node in jax.tree.leaves(state, is_leaf=_is_averaging) if _is_averaging(node)]
    if len(states) != 1:
        raise ValueError(f"the optimizer state has {len(states)} averages: put averaging() into its chain exactly once")
    return states[0]
