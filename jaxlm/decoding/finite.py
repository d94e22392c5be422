"""The check that logits are finite. A flag for each row is computed inside ``jit``, and the host looks at it once.

Only when a flag says that a row is not finite are the parameters searched. Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from jaxlm import spec
from jaxlm.models import Model

NAMED = 3
"""Parameters, and rows, that a message names; it counts the others."""


class NotFiniteError(ValueError):
    """Logits that are NaN or infinite, so that nothing can be predicted from them.

    Attributes:
        rows: the numbers of the rows, prompts or texts.
        cause: the parameters that are not finite, or what else may be the cause.
    """

    def __init__(self, what: str, rows: Sequence[int], cause: str) -> None:
        more = "" if len(rows) <= NAMED else f" and {len(rows) - NAMED} more"
        super().__init__(f"the logits of {what} {', '.join(map(str, rows[:NAMED]))}{more} are not finite: {cause}")
        self.rows, self.cause = list(rows), cause


def rows_finite(logits_BV: jax.Array) -> jax.Array:
    """Whether all logits of each row are finite, bool [B]."""
    return jnp.all(jnp.isfinite(logits_BV), axis=-1)


def check_finite(model: Model, params: Any, finite_B: jax.Array, state: Any = None) -> None:
    """Raise :class:`NotFiniteError` if a flag of :func:`rows_finite` is False. While tracing there is no check.

    Args:
        state: the model state that the caller was given; it is searched when all parameters are finite.
    """
    if isinstance(finite_B, jax.core.Tracer):
        return
    if not (finite_B.is_fully_addressable or finite_B.is_fully_replicated):
        finite_B = multihost_utils.process_allgather(finite_B, tiled=True)
    rows = np.flatnonzero(~np.asarray(finite_B)).tolist()
    if rows:
        raise NotFiniteError("row", rows, _cause(model, params, state))


@contextlib.contextmanager
def named_rows(what: str, numbers: Sequence[int] | np.ndarray) -> Iterator[None]:
    """Row n of a batch is called ``what`` ``numbers[n]`` in the message of a :class:`NotFiniteError`."""
    try:
        yield
    except NotFiniteError as error:
        rows = sorted({int(numbers[row]) for row in error.rows})
        raise NotFiniteError(what, rows, error.cause) from None


def _cause(model: Model, params: Any, state: Any) -> str:
    """Which arrays are not finite, and what to do."""
    found, largest = _not_finite(params)
    if found:
        return f"{_listed(found, 'parameter')}. Load the weights again, or take an older checkpoint"
    if state is not None and (found := _not_finite(state)[0]):
        return f"all parameters are finite, but {_listed(found, 'state array')}"
    dtype = getattr(model.config, "dtype", "float32")
    fix = "" if dtype == "float32" else f"compute in float32 instead of dtype={dtype!r}, or "
    return (
        f"all parameters are finite, so a number overflows in between. The largest parameter is {largest}: {fix}check "
        "whether these are the weights of this model"
    )


def _listed(found: Sequence[str], what: str) -> str:
    more = "" if len(found) <= NAMED else f", and {len(found) - NAMED} more"
    subject = f"1 {what} is" if len(found) == 1 else f"{len(found)} {what}s are"
    return f"{subject} not finite: {', '.join(found[:NAMED])}{more}"


def _not_finite(tree: Any) -> tuple[list[str], str]:
    """Name and count of each array with numbers that are not finite, and the array with the largest finite number."""
    arrays = {name: x for name, x in spec.flatten(tree).items() if jnp.issubdtype(x.dtype, jnp.floating)}
    counts, tops = jax.device_get(_statistics(arrays))
    found = [f"{name} ({counts[name]} of {x.size} values)" for name, x in arrays.items() if counts[name]]
    top = max(tops, key=lambda name: tops[name])
    return found, f"{tops[top]:.3g} in {top}"


@jax.jit
def _statistics(arrays: dict[str, jax.Array]) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """The number of values that are not finite, and the largest absolute finite value, of each array."""
    finite = jax.tree.map(jnp.isfinite, arrays)
    tops = jax.tree.map(
        lambda x, ok: jnp.max(jnp.where(ok, jnp.abs(x.astype(jnp.float32)), 0.0), initial=0.0), arrays, finite
    )
    return jax.tree.map(lambda ok: jnp.sum(~ok), finite), tops
