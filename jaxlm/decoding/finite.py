"""The check that logits are finite. Code inside ``jit`` computes one flag per row, and the host reads the flags.

If the logits of a row are not finite, the check searches the parameters for values that are not finite. If all
parameters are finite, it searches the model state. The error names what it found.
Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import processes, spec
from jaxlm.models import Model
from jaxlm.spec import Params, State

MAX_NAMES_IN_MESSAGE = 3
"""Maximum number of arrays, and of rows, that an error message names. The message counts the others."""


class NotFiniteError(ValueError):
    """The error for logits that are NaN or infinite. Such logits give no predictions.

    Attributes:
        what: what ``rows`` counts, for example "row", "prompt" or "text".
        rows: the indices of the rows, prompts or texts with such logits.
        cause: text that names the parameters or state arrays that are not finite, or another possible cause.
    """

    def __init__(self, what: str, rows: Sequence[int], cause: str) -> None:
        more = "" if len(rows) <= MAX_NAMES_IN_MESSAGE else f" and {len(rows) - MAX_NAMES_IN_MESSAGE} more"
        super().__init__(
            f"the logits of {what} {', '.join(map(str, rows[:MAX_NAMES_IN_MESSAGE]))}{more} are not finite: {cause}"
        )
        self.what, self.rows, self.cause = what, list(rows), cause

    def __reduce__(self) -> tuple[Any, ...]:
        """The class and its arguments. By default, unpickling would pass only the message to ``__init__``."""
        return type(self), (self.what, self.rows, self.cause)


def rows_finite(logits: jax.Array) -> jax.Array:
    """Whether all logits of each row are finite: bool [...], from logits [..., V]."""
    return jnp.all(jnp.isfinite(logits), axis=-1)


def check_finite(
    model: Model, params: Params, finite_B: jax.Array, state: State | None = None, *, is_initial: bool = True
) -> None:
    """Raise :class:`NotFiniteError` if a flag in ``finite_B`` is False. During tracing the flags are not checked.

    Args:
        finite_B: flags of :func:`rows_finite`.
        state: the model state, which the error may name as the cause.
        is_initial: True: the model has not changed the state yet. False: the model has changed it, so an overflow may
            also be the cause.
    """
    if isinstance(finite_B, jax.core.Tracer):
        return
    rows = np.flatnonzero(~processes.gather_to_host(finite_B)).tolist()
    if rows:
        raise NotFiniteError("row", rows, _cause(model, params, state, is_initial))


@contextlib.contextmanager
def rename_rows_in_errors(what: str, numbers: Sequence[int] | np.ndarray) -> Iterator[None]:
    """Context manager that changes "row n" to "``what`` ``numbers[n]``" in the message of a :class:`NotFiniteError`."""
    try:
        yield
    except NotFiniteError as error:
        rows = sorted({int(numbers[row]) for row in error.rows})
        raise NotFiniteError(what, rows, error.cause) from None


def _cause(model: Model, params: Params, state: State | None, is_initial: bool) -> str:
    """Text for an error message: the arrays that are not finite, or another possible cause, and the fix."""
    found, largest = _describe_values(params)
    if found:
        return f"{_not_finite_text(found, 'parameter')}. Load the weights again, or take an older checkpoint"
    cause = "so probably an activation overflows"
    if state is not None and (found := _describe_values(state)[0]):
        cause = f"but {_not_finite_text(found, 'state array')}"
        if is_initial:
            return f"all parameters are finite, {cause}. Make a new state"
        cause += ". Either the initial state was not finite (make a new state), or an activation overflows"
    dtype = getattr(model.config, "dtype", "float32")
    fix = "" if dtype == "float32" else f"compute in float32 instead of dtype={dtype!r}, or "
    return (
        f"all parameters are finite, {cause}. The largest parameter is {largest}: {fix}check that these are the "
        "weights of this model"
    )


def _not_finite_text(found: Sequence[str], what: str) -> str:
    """Text with the number of arrays that are not finite and the first of their names."""
    more = "" if len(found) <= MAX_NAMES_IN_MESSAGE else f", and {len(found) - MAX_NAMES_IN_MESSAGE} more"
    subject = f"1 {what} is" if len(found) == 1 else f"{len(found)} {what}s are"
    return f"{subject} not finite: {', '.join(found[:MAX_NAMES_IN_MESSAGE])}{more}"


def _describe_values(tree: Any) -> tuple[list[str], str]:
    """One text for each array with values that are not finite, and one text for the largest absolute finite value."""
    arrays = {name: x for name, x in spec.flatten(tree).items() if jnp.issubdtype(x.dtype, jnp.floating)}
    counts, maxima = jax.device_get(_counts_and_maxima(arrays))
    found = [f"{name} ({counts[name]} of {x.size} values)" for name, x in arrays.items() if counts[name]]
    largest = max(maxima, key=lambda name: maxima[name], default=None)  # None: no array has floating-point numbers
    return found, "" if largest is None else f"{maxima[largest]:.3g} in {largest}"


@jax.jit
def _counts_and_maxima(arrays: dict[str, jax.Array]) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """The number of values that are not finite and the largest absolute finite value, for each array."""
    finite = jax.tree.map(jnp.isfinite, arrays)
    maxima = jax.tree.map(
        lambda x, ok: jnp.max(jnp.where(ok, jnp.abs(x.astype(jnp.float32)), 0.0), initial=0.0), arrays, finite
    )
    return jax.tree.map(lambda ok: jnp.sum(~ok), finite), maxima
