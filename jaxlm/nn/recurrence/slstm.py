"""The sLSTM (Beck et al. 2024, section 2.2): an LSTM with an exponential input gate, a normalizer and several heads.

    z_t = tanh(z~_t),  o_t = sigmoid(o~_t),  log i_t = i~_t,  log f_t = log_sigmoid(f~_t)
    m_t = max(log f_t + m_{t-1}, log i_t)             stabilizer (eq. 15)
    i'_t = exp(log i_t - m_t)                         stabilized input gate (eq. 16)
    f'_t = exp(log f_t + m_{t-1} - m_t)               stabilized forget gate (eq. 17)
    c_t = f'_t c_{t-1} + i'_t z_t                     cell (eq. 8)
    n_t = f'_t n_{t-1} + i'_t                         normalizer (eq. 9)
    h_t = o_t c_t / n_t                               hidden state and output (eq. 10)

The pre-activation ``z~_t`` is the contribution of the input plus ``R_z h_{t-1}`` plus a bias. The other gates have
pre-activations of the same form. The matrices R are block diagonal: a head reads only its own hidden state. The forget
gate is a sigmoid, as in the code of Beck et al. (the paper also allows an exponential).

Before the first step of a document, h, c, n and m are 0. For this step, eq. 15 uses -inf instead of the previous m, so
that ``m_1 = log i_1``. As in the code of Beck et al., the first step is recognized by ``n_{t-1} = 0``, because n is at
least 1 after each step.

The implementation ``chunked`` runs the loop in chunks. Its forward pass saves the inputs and the state before each
chunk. For each chunk, the backward pass repeats the steps and computes their gradients in reverse order. Then it
computes the chunk's part of the gradient of R in one matmul.

Shapes: B batch, T time, G = 4 gates in the order i, f, z, o, H heads, P width of a head (for R: the input axis), Q the
same width as the output axis of R, C chunks, L steps of a chunk.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from jaxlm.nn import choices
from jaxlm.nn.custom_gradient import custom_vjp
from jaxlm.nn.segments import Masks, check_masks, check_state, complete_masks, keep_state, reset_state
from jaxlm.nn.time_chunks import pad_axis
from jaxlm.sharding import constrain
from jaxlm.spec import ZEROS, ArraySpec, Initializer, Params, State, require_arrays

Implementation = Literal["reference", "chunked"]

STATE_NAMES = ("hidden", "cell", "normalizer", "stabilizer")
"""The names of h, c, n and m."""


def slstm_specs(
    heads: int, width: int, init: Initializer = ZEROS, bias_init: Initializer = ZEROS
) -> dict[str, ArraySpec]:
    """Specs of ``weight_hidden`` [H, P, G, Q] (the matrices R) and of ``bias`` [H, G, Q].

    Args:
        width: P, the width of a head.
        init: initializer of ``weight_hidden``.
    """
    return {
        "weight_hidden": ArraySpec((heads, width, 4, width), ("heads", None, None, None), init, decay=True),
        "bias": ArraySpec((heads, 4, width), ("heads", None, None), bias_init),
    }


def slstm_state_specs(batch: int, heads: int, width: int) -> dict[str, ArraySpec]:
    """Specs of the state: ``hidden``, ``cell``, ``normalizer`` and ``stabilizer``, [B, H, P] float32 each."""
    return dict.fromkeys(STATE_NAMES, ArraySpec((batch, heads, width), ("batch", "heads", None)))


def slstm(
    params: Params,
    projected_BTHGP: jax.Array,
    state: State | None = None,
    *,
    reset_BT: jax.Array | None = None,
    keep_BT: jax.Array | None = None,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, State]:
    """The hidden state after each step, [B, T, H, P] in the dtype of ``projected_BTHGP``, and the last state.

    The state is float32. The matmul with R has inputs in the dtype of ``projected_BTHGP``. All other operations are
    float32.

    Args:
        params: see :func:`slstm_specs`.
        projected_BTHGP: the contribution of the inputs to the pre-activations of the gates i, f, z, o, without bias.
        state: the state before the first step; None: zeros.
        reset_BT: True where the state is set to zeros before the step (``jaxlm.nn.segments.segment_boundaries``).
            None: no resets.
        keep_BT: False where the step is padding; the output is then the unchanged hidden state. None: no padding.
        implementation: ``reference`` is a ``lax.scan`` over the steps; ``chunked``, the default, is the same loop with
            a custom gradient (see the module docstring).

    Raises:
        ValueError: shapes that do not match, an input without steps, a mask that is not boolean, or an unknown
            implementation.

    Example:
        >>> params = {"weight_hidden": jnp.zeros((1, 1, 4, 1)), "bias": jnp.zeros((1, 4, 1))}
        >>> out, state = slstm(params, jnp.ones((1, 3, 1, 4, 1)))
        >>> out.shape, sorted(state)
        ((1, 3, 1, 1), ['cell', 'hidden', 'normalizer', 'stabilizer'])
    """
    _check(params, projected_BTHGP, state, reset_BT, keep_BT)
    B, T = projected_BTHGP.shape[:2]
    choices.check_implementation("slstm", implementation, Implementation)
    # The time axis is not sharded, because the steps are sequential.
    projected_BTHGP = constrain(projected_BTHGP, ("batch", None, "heads", None, None))
    masks = complete_masks(reset_BT, keep_BT, (B, T))
    if masks is not None:  # a NaN input at padding would make the gradients NaN
        projected_BTHGP = jnp.where(masks[1][:, :, None, None, None], projected_BTHGP, 0)
    if state is None:
        state = dict.fromkeys(STATE_NAMES, jnp.zeros_like(projected_BTHGP[:, 0, :, 0], jnp.float32))
    state = {name: state[name].astype(jnp.float32) for name in STATE_NAMES}
    weight = params["weight_hidden"].astype(projected_BTHGP.dtype)
    time_major = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), (projected_BTHGP, masks))
    if implementation == "reference":
        step = functools.partial(_step, weight, params["bias"])
        last, hidden_TBHP = lax.scan(lambda state, inputs: _with_output(step(state, inputs)), state, time_major)
    else:
        L = min(T, choices.recurrence_chunk(B, T))
        hidden_TBHP, last = _chunked(L, weight, params["bias"], *time_major, state)
    return jnp.swapaxes(hidden_TBHP, 0, 1).astype(projected_BTHGP.dtype), last


def _check(params: Params, projected: jax.Array, state: Any, reset: Any, keep: Any) -> None:
    require_arrays(projected_BTHGP=projected)
    H, P = params["weight_hidden"].shape[:2]
    if projected.ndim != 5 or projected.shape[2:] != (H, 4, P) or not projected.shape[1]:
        raise ValueError(
            f"the input {list(projected.shape)} must be [batch, time, heads, gates, width], with at least one step and "
            f"with the heads, gates and width of the parameters, {[H, 4, P]}"
        )
    if state is not None:
        check_state(state, projected.shape[0], slstm_state_specs(1, H, P))
    check_masks(reset, keep, projected.shape[:2])


def _preactivations(weight: jax.Array, bias: jax.Array, projected: jax.Array, hidden: jax.Array) -> jax.Array:
    """The pre-activations of all gates, [B, H, G, P] float32."""
    product = jnp.einsum("BHP,HPGQ->BHGQ", hidden.astype(weight.dtype), weight, preferred_element_type=jnp.float32)
    return projected.astype(jnp.float32) + bias.astype(jnp.float32)[None] + product


def _advance(preactivation_BHGP: jax.Array, state: State) -> State:
    """The state after a step, from the pre-activations of the gates."""
    log_i, f, z, o = (preactivation_BHGP[:, :, gate] for gate in range(4))
    log_f_m = jax.nn.log_sigmoid(f) + jnp.where(state["normalizer"] == 0.0, -jnp.inf, state["stabilizer"])
    m = jnp.maximum(log_f_m, log_i)
    f, i = jnp.exp(log_f_m - m), jnp.exp(log_i - m)
    c = f * state["cell"] + i * jnp.tanh(z)
    n = f * state["normalizer"] + i
    return {"hidden": jax.nn.sigmoid(o) * c / n, "cell": c, "normalizer": n, "stabilizer": m}


def _step(weight: jax.Array, bias: jax.Array, state: State, inputs: Any) -> State:
    projected_BHGP, mask = inputs
    state = reset_state(mask, state)
    return keep_state(mask, _advance(_preactivations(weight, bias, projected_BHGP, state["hidden"]), state), state)


def _with_output(state: State) -> tuple[State, jax.Array]:
    return state, state["hidden"]


# ------------------------------------------------------------------------------------------------------ chunked


def _forward(L: int, weight: jax.Array, bias: jax.Array, projected_TBHGP: jax.Array, masks: Masks, state: State) -> Any:
    """``(hidden states [T, B, H, P] float32, last state)``, and the arrays for the backward pass."""
    T = projected_TBHGP.shape[0]

    def run_chunk(state: State, inputs: Any) -> Any:
        last, hidden_LBHP = lax.scan(
            lambda state, inputs: _with_output(_step(weight, bias, state, inputs)), state, inputs
        )
        return last, (hidden_LBHP, state)

    last, (hidden_CLBHP, states) = lax.scan(run_chunk, state, _chunks(L, projected_TBHGP, masks))
    hidden_TBHP = lax.collapse(hidden_CLBHP, 0, 2)[:T]
    return (hidden_TBHP, last), (weight, bias, projected_TBHGP, masks, states)


def _chunks(L: int, projected_TBHGP: jax.Array, masks: Masks) -> Any:
    """The inputs and masks of the chunks, [C, L, ...]. The last chunk is filled with padding steps."""
    if projected_TBHGP.shape[0] % L and masks is None:
        keep_TB = jnp.ones_like(projected_TBHGP[:, :, 0, 0, 0], bool)
        masks = (jnp.zeros_like(keep_TB), keep_TB)
    return jax.tree.map(functools.partial(_split, L), (projected_TBHGP, masks))


def _split(L: int, x: jax.Array) -> jax.Array:
    """``x`` [T, ...] in chunks, [C, L, ...]. The last chunk is filled with zeros."""
    num_chunks = -(-x.shape[0] // L)
    return pad_axis(x, 0, num_chunks * L - x.shape[0], axis=0).reshape(num_chunks, L, *x.shape[1:])


def _backward(L: int, saved: Any, cotangents: Any) -> Any:
    weight, bias, projected_TBHGP, masks, states = saved
    dhidden_TBHP, dlast = cotangents
    T, dtype = projected_TBHGP.shape[0], projected_TBHGP.dtype

    def step(dstate: State, inputs: Any) -> Any:
        """The gradient of the state before a step, and the gradient of the pre-activations of the step."""
        (projected_BHGP, mask), before, dhidden_BHP = inputs
        dstate = {**dstate, "hidden": dstate["hidden"] + dhidden_BHP}
        state = reset_state(mask, before)
        preactivation_BHGP = _preactivations(weight, bias, projected_BHGP, state["hidden"])

        def advance(preactivation_BHGP: jax.Array, state: State) -> State:
            return keep_state(mask, _advance(preactivation_BHGP, state), state)

        dpreactivation_BHGP, dbefore = jax.vjp(advance, preactivation_BHGP, state)[1](dstate)
        dhidden_through_R = jnp.einsum(
            "BHGQ,HPGQ->BHP", dpreactivation_BHGP.astype(weight.dtype), weight, preferred_element_type=jnp.float32
        )
        return reset_state(mask, {**dbefore, "hidden": dbefore["hidden"] + dhidden_through_R}), dpreactivation_BHGP

    def backward_chunk(carry: Any, inputs: Any) -> Any:
        dstate, dweight, dbias = carry
        (projected_LBHGP, chunk_masks), dhidden_LBHP, first = inputs
        _, before = lax.scan(
            lambda state, inputs: (_step(weight, bias, state, inputs), state), first, (projected_LBHGP, chunk_masks)
        )
        dstate, dpreactivation_LBHGP = lax.scan(
            step, dstate, ((projected_LBHGP, chunk_masks), before, dhidden_LBHP), reverse=True
        )
        hidden_LBHP = before["hidden"]
        if chunk_masks is not None:
            hidden_LBHP = jnp.where(chunk_masks[0][:, :, None, None], 0.0, hidden_LBHP)
        dweight += jnp.einsum(
            "LBHP,LBHGQ->HPGQ", hidden_LBHP.astype(dtype), dpreactivation_LBHGP.astype(dtype),
            preferred_element_type=jnp.float32,
        )  # fmt: skip
        return (dstate, dweight, dbias + jnp.sum(dpreactivation_LBHGP, axis=(0, 1))), dpreactivation_LBHGP.astype(dtype)

    zeros = jnp.zeros_like(weight, jnp.float32), jnp.zeros_like(bias, jnp.float32)
    inputs = (_chunks(L, projected_TBHGP, masks), _split(L, dhidden_TBHP), states)
    (dstate, dweight, dbias), dprojected_CLBHGP = lax.scan(backward_chunk, (dlast, *zeros), inputs, reverse=True)
    dprojected_TBHGP = lax.collapse(dprojected_CLBHGP, 0, 2)[:T]
    return dweight.astype(weight.dtype), dbias.astype(bias.dtype), dprojected_TBHGP, None, dstate


_chunked = custom_vjp.from_rules(_forward, _backward, nondiff_argnums=(0,))
