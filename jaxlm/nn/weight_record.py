"""Recording of attention weights, for plots and analysis; used by ``Model.attention_weights``."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Literal, NamedTuple

import jax

Kind = Literal["causal", "bidirectional", "source", "pool"]
"""``causal``: queries attend to no later key. ``bidirectional``: queries attend to all keys, of their own text or of a
source. ``source``: weights of a recurrent decoder over its source. ``pool``: weights that pool the tokens of a text."""


class RecordedWeights(NamedTuple):
    """The attention weights of one call of attention.

    Attributes:
        weights: [B, H, T, S] float32. The weights of each query sum to 1, to 0 if the query may not attend to any key,
            and to less than 1 in local attention (argument ``window`` of ``jaxlm.nn.alignment.align``).
        kind: the kind of attention.
    """

    weights: jax.Array
    kind: Kind


_RECORD: contextvars.ContextVar[list[RecordedWeights] | None] = contextvars.ContextVar(
    "recorded attention", default=None
)


def is_recording() -> bool:
    """Whether attention weights are being recorded, so that attention must compute them as an array."""
    return _RECORD.get() is not None


def record(weights_BHTS: jax.Array, kind: Kind) -> None:
    """Append the weights to the list of the enclosing :func:`recorded_weights`, if there is one."""
    recorded = _RECORD.get()
    if recorded is not None:
        recorded.append(RecordedWeights(weights_BHTS, kind))


@contextlib.contextmanager
def recorded_weights() -> Iterator[list[RecordedWeights]]:
    """A context manager that gives a list. Each call of attention in the context appends its weights to the list.

    A function under ``jax.jit`` must enter the context and return the weights itself. Loops over layers must be Python
    loops: weights recorded in ``lax.scan`` or ``jax.checkpoint`` would be leaked tracers.
    """
    recorded: list[RecordedWeights] = []
    token = _RECORD.set(recorded)
    try:
        yield recorded
    finally:
        _RECORD.reset(token)
