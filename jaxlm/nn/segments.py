"""Positions and segments. A position is the index of a token in its document; a segment id identifies the document.

In all modules, segment 0 (or a negative id) is padding, and segments 1, 2, ... are documents.

Shapes: B batch, T new tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxlm.spec import ArraySpec, State, require_arrays


def positions_in_segments(
    segment_ids_BT: jax.Array, last_segment_B: jax.Array | None = None, next_position_B: jax.Array | None = None
) -> jax.Array:
    """The position of each token in its document, [B, T] int32, starting at 0; padding gets 0 and is not counted.

    The last two arguments continue a document from an earlier call. If a row begins with tokens of segment
    ``last_segment_B``, their positions are ``next_position_B``, ``next_position_B + 1``, and so on. So the positions of
    a prompt depend neither on padding nor on the number of calls in which the model reads the prompt.

    Args:
        last_segment_B: the segment of each row's last real token in the earlier calls; None: no earlier call.
        next_position_B: the position of that token plus 1; None: 0.

    Example:
        >>> positions_in_segments(jnp.array([[0, 0, 1, 1, 1, 2]])).tolist()
        [[0, 0, 0, 1, 2, 0]]
        >>> positions_in_segments(jnp.array([[1, 1, 0, 1, 2, 2]])).tolist()
        [[0, 1, 0, 2, 0, 1]]
    """
    is_first_BT, keep_BT, _ = segment_boundaries(segment_ids_BT, last_segment_B, include_first=True)
    order_BT = jnp.cumsum(keep_BT, axis=1, dtype=jnp.int32) - 1  # at a real token: the number of earlier real tokens
    require_arrays(next_position_B=next_position_B)
    start_of_row = 0 if next_position_B is None else -next_position_B[:, None].astype(jnp.int32)
    start_BT = lax.cummax(jnp.where(is_first_BT, order_BT, start_of_row), axis=1)
    return jnp.where(keep_BT, order_BT - start_BT, 0)


def segment_boundaries(
    segment_ids_BT: jax.Array,
    last_segment_B: jax.Array | None = None,
    *,
    reverse: bool = False,
    include_first: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The masks ``(reset_BT, keep_BT)`` for recurrent layers and scans, and the last segment of each row, [B].

    ``reset_BT`` [B, T] is True at the first token of a document that follows another document. ``keep_BT`` [B, T] is
    True at real tokens, which are tokens that are not padding. The last segment is the segment of the real token that
    is read last. In a row without real tokens, it is the last segment of the previous call, or 0. A document continues
    after padding. It also continues in the next call if that call gets the last segment as ``last_segment_B``.

    Args:
        segment_ids_BT: 0 for padding, 1, 2, ... for documents.
        last_segment_B: the last segment of the previous call, or 0 for a row without earlier tokens. None: 0 for all
            rows.
        reverse: whether the masks are for a layer that reads from the last token to the first.
        include_first: whether ``reset_BT`` is also True at the first token of the first document of a row.

    Example:
        >>> reset, keep, last = segment_boundaries(jnp.array([[0, 1, 1, 2, 0, 2]]))
        >>> reset.astype(int).tolist(), keep.astype(int).tolist(), last.tolist()
        ([[0, 0, 0, 1, 0, 0]], [[0, 1, 1, 1, 0, 1]], [2])
    """
    require_arrays(segment_ids_BT=segment_ids_BT, last_segment_B=last_segment_B)
    if reverse:
        segment_ids_BT = jnp.flip(segment_ids_BT, axis=1)
    T = segment_ids_BT.shape[1]
    if last_segment_B is not None:
        check_state_rows(last_segment_B.shape[0], segment_ids_BT.shape[0])
    previous_B = jnp.zeros_like(segment_ids_BT[:, 0]) if last_segment_B is None else last_segment_B
    all_BT = jnp.concatenate([previous_B[:, None], segment_ids_BT], axis=1)  # [B, T + 1]
    index_BT = jnp.where(all_BT > 0, jnp.arange(T + 1, dtype=jnp.int32)[None, :], 0)
    last_real_BT = jnp.take_along_axis(all_BT, lax.cummax(index_BT, axis=1), axis=1)
    keep_BT = segment_ids_BT > 0
    reset_BT = keep_BT & (last_real_BT[:, :-1] != segment_ids_BT)
    if not include_first:
        reset_BT &= last_real_BT[:, :-1] > 0
    if reverse:
        reset_BT, keep_BT = jnp.flip(reset_BT, axis=1), jnp.flip(keep_BT, axis=1)
    return reset_BT, keep_BT, last_real_BT[:, -1]


def document_numbers(segment_ids_BT: jax.Array) -> jax.Array:
    """The number of each token's document in its row, [B, T] int32: 1, 2, ... for documents, 0 for padding.

    As in :func:`segment_boundaries`, a change of the segment id starts a document, even if the id occurred before.

    Example:
        >>> document_numbers(jnp.array([[3, 3, 0, 3, 1, 3]])).tolist()
        [[1, 1, 0, 1, 2, 3]]
    """
    reset_BT, keep_BT, _ = segment_boundaries(segment_ids_BT)
    return jnp.where(keep_BT, 1 + jnp.cumsum(reset_BT, axis=1, dtype=jnp.int32), 0)


def check_masks(
    reset_BT: jax.Array | None, keep_BT: jax.Array | None, shape: Sequence[int], what: str = "input"
) -> None:
    """Check that each mask is None or a boolean array of the ``shape`` [B, T].

    Raises:
        ValueError: a mask has another shape or dtype. For a wrong shape, the message contains ``what``, the name of the
            array whose first two axes have the sizes B and T.
        TypeError: a mask is not an array.
    """
    require_arrays(reset_BT=reset_BT, keep_BT=keep_BT)
    for name, mask in (("reset_BT", reset_BT), ("keep_BT", keep_BT)):
        if mask is not None and mask.shape != tuple(shape):
            raise ValueError(f"{name} {list(mask.shape)} must be [batch, time] of the {what}, {list(shape)}")
        if mask is not None and mask.dtype != bool:
            raise ValueError(f"{name} has dtype {mask.dtype}: pass a boolean array, such as segment_ids > 0")


def check_state_rows(rows: int, batch: int) -> None:
    """Raise ``ValueError`` if the number of rows of a state is not that of the tokens, ``batch``."""
    if rows != batch:
        raise ValueError(
            f"the state has {rows} rows, but the tokens have {batch} rows: make a state with {batch} rows (for a "
            f"model, model.init_state({batch}, length))"
        )


def check_state(state: State, batch: int, specs: Mapping[str, ArraySpec]) -> None:
    """Check that the state has an array of the right shape for each spec.

    Args:
        batch: the size of the first axis of each array, which may be 0.
        specs: the specs for a batch of 1, because an ``ArraySpec`` cannot have an axis of size 0.

    Raises:
        ValueError: an array is missing or has another shape.
        TypeError: an entry is not an array.
    """
    for name, leaf in specs.items():
        shape = (batch, *leaf.shape[1:])
        require_arrays(**{name: state.get(name)})
        if name not in state or state[name].shape != shape:
            got = list(state[name].shape) if name in state else "missing"
            raise ValueError(f"{name!r} of the state is {got}: it must be {list(shape)}")


Masks = tuple[jax.Array, jax.Array] | None
"""The masks ``(reset, keep)`` of all steps or of one step; None: no resets and no padding."""


def select_state(condition: jax.Array, x: Any, y: Any) -> Any:
    """``jnp.where(condition, x, y)`` for trees of arrays.

    The shape of each array begins with the shape of ``condition``, for example [B] or [B, T].
    """

    def select(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.where(jnp.expand_dims(condition, range(condition.ndim, x.ndim)), x, y)

    return jax.tree.map(select, x, y)


def reset_state(masks: Masks, state: Any) -> Any:
    """The state before a step, with zeros where ``reset`` is True.

    Args:
        masks: ``(reset, keep)`` of the step, with shapes as in :func:`select_state`. None: the state is unchanged.
    """
    return state if masks is None else select_state(masks[0], jax.tree.map(jnp.zeros_like, state), state)


def keep_state(masks: Masks, new: Any, old: Any) -> Any:
    """The state ``new`` where ``keep`` is True, and the state ``old`` elsewhere.

    Args:
        masks: ``(reset, keep)`` of the step, with shapes as in :func:`select_state`. None: ``new`` everywhere.
    """
    return new if masks is None else select_state(masks[1], new, old)


def complete_masks(reset_BT: jax.Array | None, keep_BT: jax.Array | None, shape: Sequence[int]) -> Masks:
    """Both masks ``(reset_BT, keep_BT)``, with no resets at padding; None if both arguments are None.

    A missing ``reset_BT`` is False everywhere, and a missing ``keep_BT`` is True everywhere.
    """
    if reset_BT is None and keep_BT is None:
        return None
    keep_BT = jnp.ones(shape, bool) if keep_BT is None else keep_BT
    return jnp.zeros_like(keep_BT) if reset_BT is None else reset_BT & keep_BT, keep_BT
