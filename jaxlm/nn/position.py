"""Positions and segments: integers that say where a token stands and to which document it belongs.

Convention everywhere: segment 0 is padding, 1, 2, ... are documents. Shapes: B batch, T new tokens.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def positions_in_segments(
    segment_ids_BT: jax.Array, last_segment_B: jax.Array | None = None, next_position_B: jax.Array | None = None
) -> jax.Array:
    """Position of each token within its run of equal segment ids, [B, T] int32, from 0; padding gets 0.

    With the last two arguments (the document that a row was in and how far), the first run of that same document goes
    on counting from ``next_position_B``: prompts padded on either side and later chunks get the positions that they
    would have alone and in one piece.

    Example:
        >>> positions_in_segments(jnp.array([[0, 0, 1, 1, 1, 2]])).tolist()
        [[0, 0, 0, 1, 2, 0]]
    """
    index_T = jnp.arange(segment_ids_BT.shape[1], dtype=jnp.int32)
    before_BT = jnp.pad(segment_ids_BT[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    first_BT = segment_ids_BT != before_BT
    start_BT = lax.cummax(jnp.where(first_BT, index_T[None, :], 0), axis=1)
    positions_BT = index_T[None, :] - start_BT
    if last_segment_B is not None and next_position_B is not None:
        goes_on = segment_ids_BT == last_segment_B[:, None]
        positions_BT = positions_BT + jnp.where(goes_on, next_position_B[:, None], 0)
    return jnp.where(segment_ids_BT > 0, positions_BT, 0)
