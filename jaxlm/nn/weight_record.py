"""Recording of attention weights, for plots and analysis. ``Model.attention_weights`` uses it.

Shapes: B batch, H heads, T queries, S keys.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Literal, NamedTuple

import jax

Kind = Literal["causal", "bidirectional", "source", "pool"]
"""The kind of attention.

``causal``: a query attends to no key whose order is higher than its own. The order is normally the position. In XLNet,
it may be a factorization order. ``bidirectional``: ``jaxlm.nn.attention`` without a causal mask. Examples are
self-attention of an encoder, cross-attention, and XLNet with any task except ``permutation``. ``source``: attention of
a recurrent decoder to its source. ``pool``: a classifier pools the tokens of a text with these weights; H is the number
of pooled vectors, T is 1.
"""


class RecordedWeights(NamedTuple):
    """The attention weights of one call of attention.

    Attributes:
        weights: [B, H, T, S] float32. The weights of each query sum to 1. There are two exceptions: the sum is 0 if the
            query may not attend to any key, and it may be below 1 in local attention (argument ``window`` of
            ``jaxlm.nn.alignment.align``).
        kind: the kind of attention.
    """

    weights: jax.Array
    kind: Kind


_RECORD: contextvars.ContextVar[list[RecordedWeights] | None] = contextvars.ContextVar(
    "recorded attention", default=None
)


def is_recording() -> bool:
    """Whether attention weights are being recorded.

    If so, ``jaxlm.nn.attention`` runs its reference implementation, because fused kernels do not store the weights.
    """
    return _RECORD.get() is not None


def record(weights_BHTS: jax.Array, kind: Kind) -> None:
    """Append the weights to the list of the enclosing :func:`record_weights`, if there is one."""
    recorded = _RECORD.get()
    if recorded is not None:
        recorded.append(RecordedWeights(weights_BHTS, kind))


@contextlib.contextmanager
def record_weights() -> Iterator[list[RecordedWeights]]:
    """A context manager whose ``as`` target is a list. Each call of attention in the context appends its weights to it.

    Under ``jax.jit``, the jitted function must enter the context in its body and return the weights. Layers must run in
    a Python loop without ``jax.checkpoint``, because weights recorded in ``lax.scan`` or ``jax.checkpoint`` would be
    leaked tracers.
    """
    recorded: list[RecordedWeights] = []
    token = _RECORD.set(recorded)
    try:
        yield recorded
    finally:
        _RECORD.reset(token)
