"""Relative attention terms of Transformer-XL (Dai et al. 2019, section 3.3) and XLNet: what a query adds by distance.

    score(query, key) = scale * ((q + u) . k  +  (q + v) . r[distance]),   distance = query position - key position

The first part is ordinary attention with ``q + u``; the second is made here and is ``attention``'s ``bias``. Rows of
``r`` stand for descending distances. Shapes: B batch, T query time, S key time, H heads, K head width, R distances,
D model.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def sinusoids(distance_R: jax.Array, width: int) -> jax.Array:
    """``[sin | cos]`` (concatenated, not interleaved) of each distance at ``width / 2`` frequencies, [R, D] float32.

    Raises:
        ValueError: an odd width.
    """
    if width % 2:
        raise ValueError(f"sinusoids come in pairs: width={width} must be even")
    frequency = 10000.0 ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    angle = distance_R.astype(jnp.float32)[:, None] * frequency[None, :]
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


def relative_term(
    q_BTHK: jax.Array, r_RHK: jax.Array, distance_BTS: jax.Array, longest: int, *, scale: float
) -> jax.Array:
    """``scale * q . r[distance]`` for any integer distances, [B, H, T, S] float32.

    Args:
        r_RHK: row i stands for distance ``longest - i``.
        distance_BTS: [1 or B, T, S]. Where it is beyond the rows of ``r`` the nearest row counts: such pairs (pads,
            other documents) are for the mask to hide.
    """
    row_BTS = jnp.clip(longest - distance_BTS, 0, r_RHK.shape[0] - 1)
    return jnp.take_along_axis(_scores(q_BTHK, r_RHK, scale), row_BTS[:, None], axis=-1, mode="clip")


def shifted_relative_term(q_BTHK: jax.Array, r_RHK: jax.Array, keys: int, *, scale: float) -> jax.Array:
    """:func:`relative_term` without a gather, where queries and ``keys`` end together: query T-1 is at key S-1.

    Reading T rows of R + 1 as rows of R shifts each row against the one before (Dai et al. 2019, appendix B).

    Args:
        r_RHK: row i stands for distance ``keys - 1 - i``. ``keys`` rows serve a causal mask (terms of later keys are
            then arbitrary, if finite), ``keys + T - 1`` rows every pair.

    Raises:
        ValueError: fewer rows than keys.
    """
    B, T, H, _ = q_BTHK.shape
    R = r_RHK.shape[0]
    if keys > R:
        raise ValueError(f"{R} relative rows do not reach over {keys} keys")
    padded = jnp.pad(_scores(q_BTHK, r_RHK, scale), ((0, 0), (0, 0), (0, 0), (1, 0)))
    return padded.reshape(B, H, T * (R + 1))[..., T:].reshape(B, H, T, R)[..., :keys]


def _scores(q_BTHK: jax.Array, r_RHK: jax.Array, scale: float) -> jax.Array:
    return jnp.einsum("BTHK,RHK->BHTR", q_BTHK, r_RHK, preferred_element_type=jnp.float32) * scale
