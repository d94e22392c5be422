"""Recording of attention weights, for pictures and analysis: ``Model.attention_weights`` is built on it."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Literal, NamedTuple

import jax

Kind = Literal["causal", "bidirectional", "source", "pool"]
"""Queries see no later key, all keys (of their own text or of a source), the keys of a source, or pool a text."""


class Recorded(NamedTuple):
    """The attention weights of one call of attention.

    Attributes:
        weights: [B, H, T, S] float32; the weights of each query sum to 1.
        kind: of the attention.
    """

    weights: jax.Array
    kind: Kind


_RECORD: contextvars.ContextVar[list[Recorded] | None] = contextvars.ContextVar("recorded attention", default=None)


def is_recording() -> bool:
    """Whether attention has to compute its weights as an array."""
    return _RECORD.get() is not None


def record(weights_BHTS: jax.Array, kind: Kind) -> None:
    """Add the weights to the record, if there is one."""
    found = _RECORD.get()
    if found is not None:
        found.append(Recorded(weights_BHTS, kind))


@contextlib.contextmanager
def recorded_weights() -> Iterator[list[Recorded]]:
    """The list to which every call of attention inside the context adds its weights, in order.

    Inside ``jax.jit``, return the weights from the same traced function. Loops over layers must be Python loops: a
    ``lax.scan`` or ``jax.checkpoint`` would leak its tracers.
    """
    found: list[Recorded] = []
    token = _RECORD.set(found)
    try:
        yield found
    finally:
        _RECORD.reset(token)
