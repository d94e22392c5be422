"""Positions and segments. A position is the index of a token in its document; a segment id says which document it is.

In all of jaxlm, segment 0 is padding, and segments 1, 2, ... are documents. Shapes: B batch, T new tokens.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def positions_in_segments(
    segment_ids_BT: jax.Array, last_segment_B: jax.Array | None = None, next_position_B: jax.Array | None = None
) -> jax.Array:
    """The position of each token in its run of equal segment ids, [B, T] int32, starting at 0; padding gets 0.

    The last two arguments continue a document from an earlier call. Tokens of segment ``last_segment_B`` count from
    ``next_position_B`` on. So a prompt that is padded on either side, or read in several chunks, gets the positions
    that it would have without padding in a single call.

    Args:
        last_segment_B: the segment of each row's last token in the earlier call.
        next_position_B: the position that follows that token.

    Example:
        >>> positions_in_segments(jnp.array([[0, 0, 1, 1, 1, 2]])).tolist()
        [[0, 0, 0, 1, 2, 0]]
    """
    index_T = jnp.arange(segment_ids_BT.shape[1], dtype=jnp.int32)
    previous_BT = jnp.pad(segment_ids_BT[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    is_first_BT = segment_ids_BT != previous_BT
    start_BT = lax.cummax(jnp.where(is_first_BT, index_T[None, :], 0), axis=1)
    positions_BT = index_T[None, :] - start_BT
    if last_segment_B is not None and next_position_B is not None:
        continues_BT = segment_ids_BT == last_segment_B[:, None]
        positions_BT = positions_BT + jnp.where(continues_BT, next_position_B[:, None], 0)
    return jnp.where(segment_ids_BT > 0, positions_BT, 0)
