"""NT-ASGD (Merity et al. 2017, algorithm 1): SGD that averages its iterates once validation stops improving.

>>> optimizer = optax.chain(optax.clip_by_global_norm(0.25), optax.sgd(30.0), averaging())
>>> state = optimizer.init(params := {"w": jnp.ones(3)})
>>> losses = [5.0, 4.0, 3.0, 3.5, 3.4, 3.3, 3.2, 3.1]                # of each evaluation so far
>>> if should_start(losses):
...     state = start(state)
>>> evaluated = averaged(state)                                      # the parameters themselves before the start
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class AveragingState(NamedTuple):
    """``iterates`` many are in the mean; 0: averaging has not started, and the mean is the last one."""

    iterates: jax.Array
    mean: Any


def should_start(losses: Sequence[float], nonmono: int = 5) -> bool:
    """Whether the newest validation loss is worse than the best of those more than ``nonmono`` evaluations before it.

    Args:
        losses: of every evaluation so far, the newest last. A NaN counts as worse than any number.
        nonmono: n of the paper, the non-monotone interval.

    Raises:
        ValueError: ``nonmono`` is not positive.
    """
    if nonmono < 1:
        raise ValueError(f"nonmono={nonmono} must be at least 1")
    old = [math.inf if math.isnan(loss) else loss for loss in losses[: -nonmono - 1]]
    return bool(old) and not losses[-1] <= min(old)


def averaging() -> optax.GradientTransformation:
    """Passes updates on, and keeps the mean of the parameters from :func:`start` on. Stands last in a chain.

    The mean begins with the parameters at the start, as in the paper's algorithm 1. (``torch.optim.ASGD``, of the
    authors' code, begins with the second step after it.) It costs one copy of the parameters.
    """

    def init(params: Any) -> AveragingState:
        return AveragingState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, params))

    def update(updates: Any, state: AveragingState, params: Any = None) -> tuple[Any, AveragingState]:
        if params is None:
            raise ValueError("averaging needs the parameters: optimizer.update(gradients, state, params)")
        iterates = jnp.where(state.iterates > 0, state.iterates + 1, 0)
        weight = 1.0 / jnp.maximum(iterates, 1)

        def one(mean: jax.Array, new: jax.Array) -> jax.Array:
            return jnp.where(iterates > 0, mean + (new - mean) * weight.astype(mean.dtype), new)

        return updates, AveragingState(iterates, jax.tree.map(one, state.mean, optax.apply_updates(params, updates)))

    return optax.GradientTransformation(init, update)


def start(state: Any) -> Any:
    """The optimizer state with averaging started. If it has started before, nothing changes."""
    _find(state)
    return jax.tree.map(
        lambda node: node._replace(iterates=jnp.maximum(node.iterates, 1)) if _is_ours(node) else node,
        state,
        is_leaf=_is_ours,
    )


def averaged(state: Any) -> Any:
    """The mean of the parameters since the start, or the parameters as they are before it."""
    return _find(state).mean


def _is_ours(node: Any) -> bool:
    return isinstance(node, AveragingState)


def _find(state: Any) -> AveragingState:
    found = [node for node in jax.tree.leaves(state, is_leaf=_is_ours) if _is_ours(node)]
    if len(found) != 1:
        raise ValueError(f"the optimizer state has {len(found)} averages: put averaging() into its chain, once")
    return found[0]
