"""The selective state space model of Mamba-2, which is linear attention with one decay per head (SSD).

Dao & Gu 2024 ("Transformers are SSMs") show in section 5 that the state space model with a scalar decay equals the
masked attention ``(L * C B.T) (dt * x)``. C is the query, B is the key, and ``dt * x`` is the value. The mask is
``L[t, s] = exp(A * (dt_{s+1} + ... + dt_t))`` for s <= t, and 0 for s > t. Section 6 computes this attention in chunks
with matmuls. :func:`jaxlm.nn.scan.linear_attention` implements this algorithm.

Shapes: B batch, T time, H heads, P width of a head, G groups of heads, N state size (d_state).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.nn import choices
from jaxlm.nn.scan.chunks import prepare
from jaxlm.nn.scan.matrix_state import (
    Implementation,
    Rule,
    choose_implementation,
    decay_chunk,
    decay_step,
    linear_attention,
    run_rule,
)
from jaxlm.nn.segments import check_masks
from jaxlm.spec import require_arrays


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
    implementation: Implementation | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The outputs ``y_t = C_t h_t`` with ``h_t = exp(A * dt_t) * h_{t-1} + dt_t * B_t x_t.T``, and the last state h.

    The output is [B, T, H, P] in the dtype of ``x``; the state is [B, H, N, P] float32. The skip connection ``D * x``
    is not included. Matmul inputs have the dtype of ``x`` (``reference``: float32); everything else is float32.

    Args:
        dt_BTH: the step sizes, at least 0.
        A_H: the decay rate of each head, at most 0.
        B_BTGN, C_BTGN: the vectors B_t, which write ``x_t`` to the state, and C_t, which read the output from the
            state. H / G consecutive heads share the vectors of a group.
        state_BHNP: the state before the first step; None: zeros.
        negative_eigenvalues: whether the decay is ``2 * exp(A * dt_t) - 1``, which is in [-1, 1], instead of
            ``exp(A * dt_t)`` (Grazzi et al. 2025). ``pallas`` does not support such decays.
        reset_BT, keep_BT, implementation: see ``linear_attention``.

    Raises:
        ValueError: shapes that do not match, or arguments that ``linear_attention`` rejects.

    Example:
        >>> ones = jnp.ones((1, 3, 1, 1))
        >>> y, state = ssd(ones, ones[..., 0], jnp.log(jnp.array([0.5])), ones, ones)
        >>> y.ravel().tolist(), state.ravel().tolist()
        ([1.0, 1.5, 1.75], [1.75])
    """
    _check_inputs(x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, state_BHNP)
    check_masks(reset_BT, keep_BT, x_BTHP.shape[:2])
    dt_BTH = dt_BTH.astype(jnp.float32)
    log_decay_BTH = A_H.astype(jnp.float32)[None, None] * dt_BTH
    if not negative_eigenvalues:
        return linear_attention(
            C_BTGN, B_BTGN, x_BTHP, log_decay_BTH, state_BHNP, scale_BTH=dt_BTH,
            reset_BT=reset_BT, keep_BT=keep_BT, implementation=implementation,
        )  # fmt: skip
    # A negative decay has no logarithm, so ``linear_attention`` cannot be used.
    T, default_chunk = x_BTHP.shape[1], choices.linear_attention_chunk()
    unsupported = "does not support negative eigenvalues"
    implementation = choose_implementation("ssd", implementation, T, default_chunk, unsupported)
    # Padding must have the decay 1. ``prepare`` sets all inputs to 0 at padding, so this input is the decay minus 1.
    decay_minus_one_BTH1 = 2.0 * jnp.expm1(log_decay_BTH)[..., None]
    if reset_BT is not None:
        decay_minus_one_BTH1 = jnp.where(reset_BT[:, :, None, None], -1.0, decay_minus_one_BTH1)
    arrays = C_BTGN, B_BTGN, x_BTHP, decay_minus_one_BTH1, dt_BTH[..., None]
    inputs, state_BHNP, reset_BT = prepare(arrays, state_BHNP, reset_BT, keep_BT)
    step, run_chunk = (functools.partial(function, lambda gate: 1.0 + gate) for function in (decay_step, decay_chunk))
    return run_rule(Rule(step, run_chunk), implementation, inputs, state_BHNP, reset_BT)


def _check_inputs(x: jax.Array, dt: jax.Array, A: jax.Array, B: jax.Array, C: jax.Array, state: Any) -> None:
    require_arrays(x=x, dt=dt, A=A, B=B, C=C, state=state)
    if x.ndim != 4 or not x.shape[1] or dt.shape != x.shape[:3] or A.shape != x.shape[2:3]:
        raise ValueError(
            f"x {list(x.shape)} must be [batch, time, heads, width], with at least one step, dt {list(dt.shape)} must "
            f"be [batch, time, heads], and A {list(A.shape)} must be [heads]"
        )
    if B.ndim != 4 or B.shape != C.shape or B.shape[:2] != x.shape[:2] or not B.shape[2] or x.shape[2] % B.shape[2]:
        raise ValueError(
            f"B {list(B.shape)} and C {list(C.shape)} must both be [batch, time, groups, state size] with the batch "
            f"and time of x {list(x.shape)}, and the number of groups must divide the {x.shape[2]} heads of x"
        )
    state_shape = (x.shape[0], x.shape[2], B.shape[3], x.shape[3])
    if state is not None and state.shape != state_shape:
        raise ValueError(f"state {list(state.shape)} must be [batch, heads, state size, width], {list(state_shape)}")
