"""The mLSTM cell (Beck et al. 2024, section 2.3): linear attention with an exponential input gate and a normalizer.

    m_t = max(log f_t + m_{t-1}, log i_t)                       stabilizer (eq. 15)
    f'_t = exp(log f_t + m_{t-1} - m_t)                         stabilized forget gate (eq. 17)
    i'_t = exp(log i_t - m_t)                                   stabilized input gate (eq. 16)
    C_t = f'_t C_{t-1} + i'_t k_t v_t.T                         cell state (eq. 19)
    n_t = f'_t n_{t-1} + i'_t k_t                               normalizer state (eq. 20)
    h_t = q_t @ C_t / (max(|q_t @ n_t|, exp(-m_t)) + epsilon)   output (eq. 21, before the output gate)

At the start of a document, C, n and m are 0. C is the transpose of the paper's C. Without the stabilizer, the states
would be ``exp(m) * C`` and ``exp(m) * n``. These can overflow, because the input gate has no upper bound. The
stabilizer divides the states by ``exp(m)``, and so also the numerator and the maximum in the output. The output stays
the same if ``epsilon`` is 0. The code of Beck et al. has ``epsilon``; the paper does not.

Shapes: B batch, T time, H heads, K width of queries and keys, V width of values (W = V + 1).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxlm import sharding
from jaxlm.devices import LANES
from jaxlm.nn import choices
from jaxlm.nn.scan.chunks import prepare, scan_steps
from jaxlm.nn.scan.head_blocks import unsupported_reason
from jaxlm.nn.scan.matrix_state import (
    Implementation,
    check_inputs,
    check_per_head,
    choose_implementation,
    linear_attention,
)
from jaxlm.nn.segments import Masks, check_state, reset_state, select_state
from jaxlm.nn.time_chunks import pad_axis
from jaxlm.spec import ArraySpec, State

STABILIZER_LIMITS = (-80.0, 40.0)
"""The output uses ``exp(-m)`` with m clipped to these limits.

Lower limit: ``exp(-m)`` overflows in float32 if m is below -88. If m is below -80, both the exact output and the output
with the limit are less than 1e-34 times ``q @ C``.

Upper limit: it changes the output only if ``|q @ n|`` is less than 1e-17. Without this limit, ``exp(-m)`` is 0 in
float32 if m is large. The output of a query of zeros would then be 0 / 0 if ``epsilon`` is 0. With the limit, it is 0.
"""

MIN_STABILIZER = float(jnp.finfo(jnp.float32).min)
"""Lower bound of m. Without it, m would be -inf at a step whose gates are both 0, and ``log i - m`` would be NaN."""


def mlstm_state_specs(batch: int, heads: int, key_width: int, value_width: int) -> dict[str, ArraySpec]:
    """Specs of the state: ``cell`` C [B, H, K, V], ``normalizer`` n [B, H, K] and ``stabilizer`` m [B, H], float32."""
    return {
        "cell": ArraySpec((batch, heads, key_width, value_width), ("batch", "heads", None, None)),
        "normalizer": ArraySpec((batch, heads, key_width), ("batch", "heads", None)),
        "stabilizer": ArraySpec((batch, heads), ("batch", "heads")),
    }


def mlstm(
    query_BTHK: jax.Array,
    key_BTHK: jax.Array,
    value_BTHV: jax.Array,
    log_input_BTH: jax.Array,
    log_forget_BTH: jax.Array,
    state: State | None = None,
    *,
    reset_BT: jax.Array | None = None,
    keep_BT: jax.Array | None = None,
    epsilon: float = 1e-6,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The output h_t of each step (equations: see the module), and the last state (:func:`mlstm_state_specs`).

    The output is [B, T, H, V] in the dtype of the values; the state is float32. The function does not scale queries or
    keys; the paper divides keys by sqrt(K). In ``chunked`` and ``pallas``, the inputs of matmuls and the results
    ``q_t @ C_t`` and ``q_t @ n_t`` have the dtype of the values (float32 for float16 values). Everything else is
    float32.

    Args:
        log_input_BTH: the logarithm of the input gate. The gate is exponential, so this is its pre-activation.
        log_forget_BTH: the logarithm of the forget gate. For a sigmoid gate, this is ``log_sigmoid`` of the
            pre-activation; for an exponential gate, the pre-activation itself.
        state: the state before the first step; None: zeros.
        reset_BT: True where the state is set to zeros before the step (``jaxlm.nn.segments.segment_boundaries``), even
            if it is NaN; see ``linear_attention`` for non-finite inputs. None: no resets.
        keep_BT: False where the step is padding. There, the output is zeros and the state does not change (in
            ``chunked`` and ``pallas`` it may change by rounding errors). None: no padding.
        epsilon: added to the divisor of the output.
        implementation: ``reference`` is a loop over steps. ``chunked`` first computes all stabilizers. Then
            :func:`jaxlm.nn.scan.linear_attention` computes C and n in chunks. It saves one state per chunk for the
            backward pass. ``jaxlm.nn.scan.Chunked(32)`` sets the number of steps per chunk to 32. ``pallas`` uses the
            TPU kernel of ``linear_attention`` instead. None selects the fastest known implementation.

    Raises:
        ValueError: shapes that do not match, a state that lacks an array, a mask that is not boolean, an unknown
            implementation, or ``pallas`` on another platform or with arguments that it does not support.

    Example:
        >>> ones, gate = jnp.ones((1, 3, 1, 1)), jnp.zeros((1, 3, 1))
        >>> values = jnp.array([4.0, 8.0, 6.0]).reshape(1, 3, 1, 1)
        >>> out, state = mlstm(ones, ones, values, gate, gate, epsilon=0.0)  # means of the values up to each step
        >>> out.ravel().tolist(), state["normalizer"].ravel().tolist()
        ([4.0, 6.0, 6.0], [3.0])
    """
    check_inputs(query_BTHK, key_BTHK, value_BTHV, None, reset_BT, keep_BT)
    check_per_head(query_BTHK, log_input=log_input_BTH, log_forget=log_forget_BTH)
    (B, T, H, K), V = query_BTHK.shape, value_BTHV.shape[-1]
    if state is not None:
        check_state(state, B, mlstm_state_specs(1, H, K, V))
    normalizers = jax.ShapeDtypeStruct((*value_BTHV.shape[:3], LANES), value_BTHV.dtype)
    unsupported = unsupported_reason(query_BTHK, value_BTHV) or unsupported_reason(query_BTHK, normalizers)
    default_chunk = choices.linear_attention_chunk()
    implementation = choose_implementation("mlstm", implementation, T, default_chunk, unsupported)
    inputs = (query_BTHK, key_BTHK, value_BTHV)
    (q, k, v), cell, reset_BT = prepare(inputs, None if state is None else state["cell"], reset_BT, keep_BT)
    log_input_BTH, log_forget_BTH = (
        sharding.constrain(x.astype(jnp.float32), ("batch", None, "heads")) for x in (log_input_BTH, log_forget_BTH)
    )
    if keep_BT is not None:  # at padding, an input gate of 0 and a forget gate of 1 keep the state
        log_input_BTH = jnp.where(keep_BT[:, :, None], log_input_BTH, -jnp.inf)
        log_forget_BTH = jnp.where(keep_BT[:, :, None], log_forget_BTH, 0.0)
    if state is None:
        state = {"normalizer": jnp.zeros_like(cell[..., 0]), "stabilizer": jnp.zeros_like(cell[..., 0, 0])}
    state = {"cell": cell, **{name: state[name].astype(jnp.float32) for name in ("normalizer", "stabilizer")}}
    if implementation == "reference":
        step = functools.partial(_step, epsilon)
        return scan_steps(step, (q, k, v, log_input_BTH, log_forget_BTH), state, reset_BT)
    return _by_linear_attention(q, k, v, log_input_BTH, log_forget_BTH, state, reset_BT, epsilon, implementation)


def _step(
    epsilon: float, state: dict[str, jax.Array], mask: Masks, q: jax.Array, k: jax.Array, v: jax.Array,
    log_i: jax.Array, log_f: jax.Array,
) -> tuple[dict[str, jax.Array], jax.Array]:  # fmt: skip
    """The state after a step, and its output."""
    q, k, v32 = (x.astype(jnp.float32) for x in (q, k, v))
    state = reset_state(mask, state)
    C, n, m = state["cell"], state["normalizer"], state["stabilizer"]
    new_m = jnp.maximum(jnp.maximum(log_f + m, log_i), MIN_STABILIZER)
    f, i = jnp.exp(log_f + m - new_m)[..., None], jnp.exp(log_i - new_m)[..., None]
    new_n = f * n + i * k
    new_C = f[..., None] * C + (i * k)[..., None] * v32[:, :, None, :]
    out = _output(jnp.einsum("BHK,BHKV->BHV", q, new_C), jnp.sum(q * new_n, axis=-1), new_m, epsilon)
    return {"cell": new_C, "normalizer": new_n, "stabilizer": new_m}, out.astype(v.dtype)


def _output(numerator: jax.Array, normalizer: jax.Array, m: jax.Array, epsilon: float) -> jax.Array:
    """``numerator [..., V] / (max(|normalizer|, exp(-m)) + epsilon)``, with normalizer and m [...]."""
    lower_bound = jnp.exp(-jnp.clip(m, *STABILIZER_LIMITS))
    return numerator / (jnp.maximum(jnp.abs(normalizer), lower_bound) + epsilon)[..., None]


# ------------------------------------------------------------------------------------------------------ chunked


def _by_linear_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, log_i: jax.Array, log_f: jax.Array, state: dict[str, jax.Array],
    reset_BT: jax.Array | None, epsilon: float, implementation: Implementation,
) -> Any:  # fmt: skip
    if reset_BT is not None:
        # If the stabilizer were NaN or inf, all gates would be NaN, also after a reset. If the cell and the normalizer
        # are NaN instead, only the results before the reset are NaN.
        undefined = {name: jnp.full_like(state[name], jnp.nan) for name in ("cell", "normalizer")}
        undefined["stabilizer"] = jnp.zeros_like(state["stabilizer"])
        state = select_state(state["stabilizer"] < jnp.inf, state, undefined)
    m_BTH = _stabilizers(log_i, log_f, state["stabilizer"], reset_BT)
    before_BTH = jnp.concatenate([state["stabilizer"][:, None], m_BTH[:, :-1]], axis=1)
    # At a reset, ``linear_attention`` does not use the decay.
    log_scale_BTH, log_decay_BTH = log_i - m_BTH, log_f + before_BTH - m_BTH
    # In float16, the numerator and the normalizer could overflow before the division.
    dtype = jnp.float32 if v.dtype == jnp.float16 else v.dtype

    def run(value_BTHV: jax.Array, state_BHKV: jax.Array) -> tuple[jax.Array, jax.Array]:
        return linear_attention(
            q.astype(dtype), k.astype(dtype), value_BTHV.astype(dtype), log_decay_BTH, state_BHKV,
            scale_BTH=jnp.exp(log_scale_BTH), reset_BT=reset_BT, implementation=implementation,
        )  # fmt: skip

    # The values get a channel of ones. The column of the state for this channel is n.
    V, ones = v.shape[-1], jnp.ones_like(v[..., :1])
    cell, normalizer = state["cell"], state["normalizer"][..., None]
    if implementation == "pallas":  # a second call computes n: appending a column to v would copy v
        out, cell = run(v, cell)
        q_times_n, normalizer = run(*(pad_axis(x, 0, LANES - 1, axis=-1) for x in (ones, normalizer)))
    else:
        joined, state_BHKW = run(*(jnp.concatenate(pair, axis=-1) for pair in ((v, ones), (cell, normalizer))))
        out, q_times_n = joined[..., :V], joined[..., V:]
        cell, normalizer = state_BHKW[..., :V], state_BHKW[..., V:]
    out_BTHV = _output(out.astype(jnp.float32), q_times_n[..., 0].astype(jnp.float32), m_BTH, epsilon)
    return out_BTHV.astype(v.dtype), {"cell": cell, "normalizer": normalizer[..., 0], "stabilizer": m_BTH[:, -1]}


def _stabilizers(log_i_BTH: jax.Array, log_f_BTH: jax.Array, m_BH: jax.Array, reset_BT: Any) -> jax.Array:
    """The stabilizer m of each step, [B, T, H].

    A step maps m to ``max(a + m, b)``, with a = log f and b = log i. The composition of two such maps has this form
    too, so an associative scan can combine them. The stabilizers could also be computed from differences of cumulative
    sums of log f. The scan is more accurate, because the rounding errors of these sums grow with the number of steps.
    """
    a_BTH, b_BTH = log_f_BTH, log_i_BTH
    if reset_BT is not None:
        reset_BT1 = reset_BT[:, :, None]
        b_BTH = jnp.where(reset_BT1, jnp.maximum(log_f_BTH, log_i_BTH), b_BTH)  # a reset sets m to 0 before the step
        a_BTH = jnp.where(reset_BT1, -jnp.inf, a_BTH)

    def combine(earlier: Any, later: Any) -> Any:
        is_reset = later[0] == -jnp.inf  # then the earlier steps have no effect, even if they are NaN
        a, b = earlier[0] + later[0], jnp.maximum(later[0] + earlier[1], later[1])
        return jnp.where(is_reset, -jnp.inf, a), jnp.where(is_reset, later[1], b)

    a_BTH, b_BTH = lax.associative_scan(combine, (a_BTH, b_BTH), axis=1)
    return jnp.maximum(jnp.maximum(a_BTH + m_BH[:, None], b_BTH), MIN_STABILIZER)
