"""The selective state space model of Mamba-2, which is linear attention with one decay per head (SSD).

Dao & Gu 2024 ("Transformers are SSMs") show in section 5 that the state space model with a scalar decay equals the
masked attention ``(L * C B.T) (dt * x)`` with ``L[t, s] = exp(A * (dt_{s+1} + ... + dt_t))``: C is the query, B the key
and ``dt * x`` the value. Section 6 computes this attention in chunks with matmuls.
:func:`jaxlm.nn.scan.linear_attention` is this algorithm.

Shapes: B batch, T time, H heads, P width of a head, G groups of heads, N state size (d_state).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxlm.nn.scan.matrix_state import Implementation, linear_attention


def ssd(
    x_BTHP: jax.Array,
    dt_BTH: jax.Array,
    A_H: jax.Array,
    B_BTGN: jax.Array,
    C_BTGN: jax.Array,
    state_BHNP: jax.Array | None = None,
    *,
    reset_BT: jax.Array | None = None,
    keep_BT: jax.Array | None = None,
    negative_eigenvalues: bool = False,
    chunk: int | None = None,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The outputs ``y_t = C_t h_t`` with ``h_t = exp(A * dt_t) * h_{t-1} + dt_t * B_t x_t.T``, and the last state h.

    The output is [B, T, H, P] in the dtype of ``x``; the state is [B, H, N, P] float32. The skip connection ``D * x``
    is not included. Matmul inputs have the dtype of ``x``; everything else is float32.

    Args:
        dt_BTH: the step sizes, at least 0.
        A_H: the decay rate of each head, at most 0.
        B_BTGN, C_BTGN: input and output weights of the state, computed from the input. H / G consecutive heads share
            each group.
        state_BHNP: the state before the first step; None: zeros.
        negative_eigenvalues: the decay is ``2 * exp(A * dt_t) - 1``, which is in [-1, 1], instead of ``exp(A * dt_t)``
            (Grazzi et al. 2025).
        reset_BT, keep_BT, chunk, implementation: see ``linear_attention``.

    Raises:
        ValueError: shapes that do not match, or an error that ``linear_attention`` raises (see there).

    Example:
        >>> ones = jnp.ones((1, 3, 1, 1))
        >>> y, state = ssd(ones, ones[..., 0], jnp.log(jnp.array([0.5])), ones, ones)
        >>> y.ravel().tolist(), state.ravel().tolist()
        ([1.0, 1.5, 1.75], [1.75])
    """
    if x_BTHP.ndim != 4 or dt_BTH.shape != x_BTHP.shape[:3] or A_H.shape != x_BTHP.shape[2:3]:
        raise ValueError(
            f"x {list(x_BTHP.shape)} must be [batch, time, heads, width], dt {list(dt_BTH.shape)} [batch, time, heads] "
            f"and A {list(A_H.shape)} [heads]"
        )
    if B_BTGN.ndim != 4 or B_BTGN.shape != C_BTGN.shape or x_BTHP.shape[2] % B_BTGN.shape[2]:
        raise ValueError(
            f"B {list(B_BTGN.shape)} and C {list(C_BTGN.shape)} must both be [batch, time, groups, state size], and "
            f"the number of groups must divide the {x_BTHP.shape[2]} heads of x"
        )
    dt_BTH = dt_BTH.astype(jnp.float32)
    log_decay_BTH = A_H.astype(jnp.float32)[None, None] * dt_BTH
    if negative_eigenvalues:
        # Let s_t be the product of the signs of the decays up to step t. Then s_t h_t follows the same recurrence with
        # the absolute values of the decays, and with s_t dt_t x_t instead of dt_t x_t.
        log_decay_BTH, is_negative_BTH = _log_of_twice_minus_one(log_decay_BTH)
        if keep_BT is not None:
            is_negative_BTH &= keep_BT[:, :, None]
        sign_BTH = 1 - 2 * (jnp.cumsum(is_negative_BTH, axis=1) % 2)
        dt_BTH *= sign_BTH
    y_BTHP, state_BHNP = linear_attention(
        C_BTGN, B_BTGN, x_BTHP, log_decay_BTH, state_BHNP, scale_BTH=dt_BTH,
        reset_BT=reset_BT, keep_BT=keep_BT, chunk=chunk, implementation=implementation,
    )  # fmt: skip
    if negative_eigenvalues:
        y_BTHP = y_BTHP * sign_BTH[..., None].astype(y_BTHP.dtype)
        state_BHNP = state_BHNP * sign_BTH[:, -1, :, None, None].astype(jnp.float32)
    return y_BTHP, state_BHNP


def _log_of_twice_minus_one(log_decay: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``log(abs(2 * exp(log_decay) - 1))``, and whether ``2 * exp(log_decay) - 1`` is negative.

    The absolute value is clipped to at least the float32 epsilon, because the gradient of the logarithm is infinite at
    0.
    """
    minus_one = 2.0 * jnp.expm1(log_decay)  # the decay minus 1, exact for small steps
    is_negative, epsilon = minus_one < -1.0, jnp.finfo(jnp.float32).eps
    log_positive = jnp.log1p(jnp.where(is_negative, 0.0, jnp.maximum(minus_one, epsilon - 1.0)))
    log_negative = jnp.log(jnp.where(is_negative, jnp.maximum(-1.0 - minus_one, epsilon), 1.0))
    return jnp.where(is_negative, log_negative, log_positive), is_negative
