"""The elementwise linear recurrence ``h = decay * h + input``.

RG-LRU (De et al. 2024, eq. 4), minGRU (Feng et al. 2024), QRNN (Bradbury et al. 2017) and SRU (Lei et al. 2018) use
this recurrence. They differ in how they compute the decay and the input.

For each channel of a step, the recurrence has two floating-point operations and three memory accesses, so memory
bandwidth limits its speed. There are four implementations:

- ``reference`` is a ``lax.scan`` with the gradient of autodiff.
- ``sequential`` loops over time and overwrites the input with the state in the same buffer. It allocates no new memory
  if the input is not used afterwards.
- ``chunked`` loops over chunks of time. ``lax.associative_scan`` computes the L steps of a chunk with about 2 * log2(L)
  sequential operations. This is faster on accelerators, because there the number of sequential operations matters more
  than their size.
- ``pallas`` is a TPU kernel (``jaxlm.nn.scan.pallas``) that reads and writes each array once.

The last three have a custom gradient, which is the same recurrence in reverse order (Martin & Cundy 2018, section 2.2).
Their backward pass needs only the decays, the states and the masks.

Shapes: B batch, T time, D channels, L steps of a chunk, N chunks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from jaxlm import sharding
from jaxlm.nn import choices
from jaxlm.nn.custom_gradient import custom_vjp
from jaxlm.nn.scan import pallas
from jaxlm.nn.segments import Masks, check_masks, complete_masks
from jaxlm.spec import require_arrays

Implementation = Literal["reference", "sequential", "chunked", "pallas"]

CHUNK = 256
"""Number of steps of a chunk of ``chunked``."""


def linear_scan(
    decay_BTD: jax.Array,
    input_BTD: jax.Array,
    state_BD: jax.Array | None = None,
    *,
    reset_BT: jax.Array | None = None,
    keep_BT: jax.Array | None = None,
    reverse: bool = False,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The state after each step, [B, T, D] in the dtype of the input, and the last state, [B, D] float32.

    The state is computed in float32 for all dtypes.

    Args:
        decay_BTD: the factor of the state in each channel, usually in [0, 1]. ``chunked`` and ``pallas`` multiply
            decays with each other, so products of decays above 1 may overflow there.
        state_BD: the state before the first step; None: zeros.
        reset_BT: True where the state is set to zeros before the step (``jaxlm.nn.segments.segment_boundaries``). The
            state before the step may be NaN. ``pallas`` differs within a tile of 8 or 16 steps: a non-finite input
            before a reset can make the results after the reset NaN. A NaN state before the tile has no effect on a
            step if the product of the decays from the start of the tile to this step is 0, even without a reset. None:
            no resets.
        keep_BT: False where the step is padding; the output is then the unchanged state. None: no padding.
        reverse: whether the recurrence goes from the last step to the first. Output t still belongs to input t, and the
            returned last state is the state at step 0.
        implementation: ``reference``, ``sequential``, ``chunked`` or ``pallas`` (see the module). None selects the
            fastest known: ``sequential`` on a CPU, ``pallas`` on a TPU if it supports the arguments, and ``chunked`` in
            all other cases. All except ``pallas`` support second derivatives. Forward mode alone (``jax.jvp`` without
            ``jax.grad``) needs ``reference``.

    Raises:
        ValueError: shapes that do not match, an input without steps or with a dtype that is not floating-point, a mask
            that is not boolean, an unknown implementation, or ``pallas`` on another platform than a TPU, for another
            dtype than float32 and bfloat16, or for an empty batch.

    Example:
        >>> states, last = linear_scan(jnp.full((1, 3, 1), 0.5), jnp.ones((1, 3, 1)))
        >>> states[0, :, 0].tolist(), last.tolist()
        ([1.0, 1.5, 1.75], [[1.75]])
    """
    require_arrays(decay_BTD=decay_BTD, input_BTD=input_BTD, state_BD=state_BD)
    if input_BTD.ndim != 3 or decay_BTD.shape != input_BTD.shape or not input_BTD.shape[1]:
        raise ValueError(
            f"decay {list(decay_BTD.shape)} and input {list(input_BTD.shape)} must both be [batch, time, channels], "
            "with at least one step"
        )
    if not jnp.issubdtype(input_BTD.dtype, jnp.floating):
        raise ValueError(f"the input has dtype {input_BTD.dtype}: it must be a floating-point dtype")
    B, T, D = input_BTD.shape
    if state_BD is not None and state_BD.shape != (B, D):
        raise ValueError(f"state_BD {list(state_BD.shape)} must be [batch, channels] of the input, {[B, D]}")
    check_masks(reset_BT, keep_BT, (B, T))
    masks = complete_masks(reset_BT, keep_BT, (B, T))
    unsupported = pallas.unsupported_reason(decay_BTD, input_BTD)
    choices.check_implementation("linear_scan", implementation, Implementation, {"pallas": unsupported})
    implementation = implementation or choices.linear_scan(unsupported)
    # The time axis is not sharded, because the steps are sequential.
    decay_BTD, input_BTD = (sharding.constrain(x, ("batch", None, "mlp")) for x in (decay_BTD, input_BTD))
    state_BD = jnp.zeros_like(input_BTD[:, 0], jnp.float32) if state_BD is None else state_BD.astype(jnp.float32)
    if implementation == "reference":
        return _reference(decay_BTD, input_BTD, state_BD, masks, reverse)
    return _scan(implementation, reverse, decay_BTD, input_BTD, state_BD, masks)


def _step(state_BD: jax.Array, decay_BD: jax.Array, input_BD: jax.Array, mask: Masks) -> jax.Array:
    """The state after one step of all rows, [B, D] float32. Inputs at padding are ignored, even if they are NaN."""
    decay_BD, input_BD = decay_BD.astype(jnp.float32), input_BD.astype(jnp.float32)
    if mask is not None:
        reset_B1, keep_B1 = mask
        decay_BD, input_BD = jnp.where(keep_B1, decay_BD, 1.0), jnp.where(keep_B1, input_BD, 0.0)
        state_BD = jnp.where(reset_B1, 0.0, state_BD)
    return decay_BD * state_BD + input_BD


def _reference(
    decay_BTD: jax.Array, input_BTD: jax.Array, state_BD: jax.Array, masks: Masks, reverse: bool
) -> tuple[jax.Array, jax.Array]:
    def step(state_BD: jax.Array, inputs: Any) -> Any:
        decay_BD, input_BD, mask = inputs
        state_BD = _step(state_BD, decay_BD, input_BD, mask)
        return state_BD, state_BD.astype(input_BTD.dtype)

    masks_TB1 = jax.tree.map(lambda mask: mask.T[:, :, None], masks)
    steps = (jnp.swapaxes(decay_BTD, 0, 1), jnp.swapaxes(input_BTD, 0, 1), masks_TB1)
    last_BD, hidden_TBD = lax.scan(step, state_BD, steps, reverse=reverse)
    return jnp.swapaxes(hidden_TBD, 0, 1), last_BD


# ---------------------------------------------------------------------------------------------- custom gradient


def _forward(
    implementation: str, reverse: bool, decay_BTD: jax.Array, input_BTD: jax.Array, state_BD: jax.Array, masks: Masks
) -> Any:
    if implementation == "sequential":
        hidden_BTD, last_BD = _sequential(decay_BTD, input_BTD, state_BD, masks, reverse)
    else:
        masked_input_BTD = input_BTD if masks is None else jnp.where(masks[1][:, :, None], input_BTD, 0.0)
        arguments = _masked_decay(decay_BTD, masks), masked_input_BTD, state_BD, reverse
        if implementation == "pallas":
            hidden_BTD, last_BD = pallas.scan(*arguments)
        else:
            hidden_BTD, last_BD = _chunked(*arguments, None if masks is None else masks[0])
    return (hidden_BTD, last_BD), (decay_BTD, hidden_BTD, state_BD, masks)


def _backward(implementation: str, reverse: bool, saved: Any, cotangents: Any) -> tuple[Any, ...]:
    """The gradients of the decay, the input and the state before the first step.

    Let h[t] be the state after step t, and dhidden[t] the gradient of the output h[t]. The total gradient of h[t] is
    ``g[t] = dhidden[t] + decay[t + 1] * g[t + 1]``. The gradient of input[t] is g[t], and the gradient of decay[t] is
    ``g[t] * h[t - 1]``.
    """
    (decay_BTD, hidden_BTD, state_BD, masks), (dhidden_BTD, dlast_BD) = saved, cotangents
    if implementation == "sequential":
        ddecay_BTD, dinput_BTD, dstate_BD = _sequential_backward(
            decay_BTD, hidden_BTD, state_BD, masks, dhidden_BTD, dlast_BD, reverse
        )
    else:
        run = pallas.backward if implementation == "pallas" else _chunked_backward
        ddecay_BTD, dinput_BTD, dstate_BD = run(
            _masked_decay(decay_BTD, masks), hidden_BTD, state_BD, dhidden_BTD, dlast_BD, reverse
        )
        if masks is not None:
            ddecay_BTD = jnp.where((masks[1] & ~masks[0])[:, :, None], ddecay_BTD, 0.0)
    if masks is not None:
        dinput_BTD = jnp.where(masks[1][:, :, None], dinput_BTD, 0.0)
    return ddecay_BTD, dinput_BTD, dstate_BD, None


_scan = custom_vjp.from_rules(_forward, _backward, nondiff_argnums=(0, 1))


# --------------------------------------------------------------------------------------------------- sequential


def _sequential(
    decay_BTD: jax.Array, input_BTD: jax.Array, state_BD: jax.Array, masks: Masks, reverse: bool
) -> tuple[jax.Array, jax.Array]:
    time_of = _step_to_time(input_BTD, reverse)

    def step(states: Any, i: Any, buffers: Any) -> Any:
        decay_BD, input_BD = _read(decay_BTD, time_of(i)), _read(buffers[0], time_of(i))
        return (_step(states[0], decay_BD, input_BD, _masks_at(masks, time_of(i))),)

    (hidden_BTD,), (last_BD,) = _overwrite((input_BTD,), step((state_BD,), 0, (input_BTD,)), step, time_of)
    return hidden_BTD, last_BD


def _sequential_backward(
    decay_BTD: jax.Array,
    hidden_BTD: jax.Array,
    state_BD: jax.Array,
    masks: Masks,
    dhidden_BTD: jax.Array,
    dlast_BD: jax.Array,
    reverse: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradients of the decay, the input and the state before the first step, computed in place.

    The gradient of the input overwrites the gradient of the states, and the gradient of the decay overwrites the
    states. Loop iteration i belongs to the i-th step in the order of the backward pass.
    """
    end = hidden_BTD.shape[1] - 1
    time_of = _step_to_time(hidden_BTD, not reverse)

    def gradient_before(gradient_BD: jax.Array, i: Any) -> jax.Array:
        """The gradient of the state that step i reads, from the gradient of the state that step i computes."""
        decayed_BD = _read(decay_BTD, time_of(i)).astype(jnp.float32) * gradient_BD
        mask = _masks_at(masks, time_of(i))
        return decayed_BD if mask is None else jnp.where(mask[1], jnp.where(mask[0], 0.0, decayed_BD), gradient_BD)

    def gradients_at(next_gradient_BD: jax.Array, i: Any, buffers: Any) -> Any:
        gradient_BD = _read(buffers[0], time_of(i)).astype(jnp.float32) + next_gradient_BD
        before_BD = jnp.where(
            i == end, state_BD, _read(buffers[1], time_of(jnp.minimum(i + 1, end))).astype(jnp.float32)
        )
        ddecay_BD, mask = gradient_BD * before_BD, _masks_at(masks, time_of(i))
        return gradient_BD, ddecay_BD if mask is None else jnp.where(mask[1] & ~mask[0], ddecay_BD, 0.0)

    def step(gradients: Any, i: Any, buffers: Any) -> Any:
        return gradients_at(gradient_before(gradients[0], i - 1), i, buffers)

    buffers = (dhidden_BTD, hidden_BTD.astype(decay_BTD.dtype))
    (dinput_BTD, ddecay_BTD), (gradient_BD, _) = _overwrite(buffers, gradients_at(dlast_BD, 0, buffers), step, time_of)
    return ddecay_BTD, dinput_BTD, gradient_before(gradient_BD, end)


def _step_to_time(x_BTD: jax.Array, reverse: bool) -> Callable[[Any], jax.Array]:
    """A function from loop iteration i to its time step, uint32. (For signed indices, JAX would add a sign check.)"""
    last = x_BTD.shape[1] - 1
    return lambda i: jnp.asarray(last - i if reverse else i).astype(jnp.uint32)


def _overwrite(
    buffers: tuple[jax.Array, ...], values: Any, step: Callable[..., Any], time_of: Callable[[Any], jax.Array]
) -> tuple[Any, Any]:
    """The buffers [B, T, D], overwritten with the values [B, D] of each step, and the values of the last step.

    Each iteration first writes the values of its step and then reads the new buffer for the next step. So the old
    buffer is never read after a write, and XLA does not copy it. If an iteration read the buffer before it wrote, XLA
    would copy the buffer in some fusions. With one copy per iteration, the cost of the scan would be quadratic in T.

    Args:
        values: the values of step 0.
        step: ``step(values of step i - 1, i, buffers)`` returns the values of step i. In this call, the buffers contain
            new values for the steps before i, and old values from step i on.
    """

    def write(buffers: Any, values: Any, i: Any) -> Any:
        return tuple(_write(buffer, value, time_of(i)) for buffer, value in zip(buffers, values, strict=True))

    def iteration(i: jax.Array, carry: Any) -> Any:
        values, buffers = carry
        buffers = write(buffers, values, i)
        return step(values, i + 1, buffers), buffers

    end = buffers[0].shape[1] - 1
    values, buffers = lax.fori_loop(0, end, iteration, (values, buffers))
    return write(buffers, values, end), values


def _read(x_BTD: jax.Array, time: jax.Array) -> jax.Array:
    zero = jnp.zeros_like(time)
    return lax.dynamic_slice(x_BTD, (zero, time, zero), (x_BTD.shape[0], 1, x_BTD.shape[2]))[:, 0]


def _write(x_BTD: jax.Array, value_BD: jax.Array, time: jax.Array) -> jax.Array:
    zero = jnp.zeros_like(time)
    return lax.dynamic_update_slice(x_BTD, value_BD[:, None].astype(x_BTD.dtype), (zero, time, zero))


def _masks_at(masks: Masks, time: jax.Array) -> Any:
    zero = jnp.zeros_like(time)
    return jax.tree.map(lambda mask: lax.dynamic_slice(mask, (zero, time), (mask.shape[0], 1)), masks)


# ------------------------------------------------------------------------------------------------------ chunked


def _masked_decay(decay_BTD: jax.Array, masks: Masks) -> jax.Array:
    """The decays with 0 at resets and 1 at padding."""
    if masks is None:
        return decay_BTD
    reset_BT1, keep_BT1 = (mask[:, :, None] for mask in masks)
    return jnp.where(keep_BT1, jnp.where(reset_BT1, 0.0, decay_BTD), 1.0)


def _chunked(
    decay_BTD: jax.Array, input_BTD: jax.Array, state_BD: jax.Array, reverse: bool, reset_BT: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    hidden_BTD = _scan_chunks(decay_BTD, input_BTD, state_BD, reverse, reset_BT)
    return hidden_BTD.astype(input_BTD.dtype), hidden_BTD[:, 0 if reverse else -1]


def _chunked_backward(
    decay_BTD: jax.Array,
    hidden_BTD: jax.Array,
    state_BD: jax.Array,
    dhidden_BTD: jax.Array,
    dlast_BD: jax.Array,
    reverse: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    # The gradient of the input uses the decay of the next step. The gradient of the decay uses the state before the
    # step.
    next_decay_BTD = _shifted(decay_BTD, jnp.ones_like(decay_BTD[:, 0]), not reverse)
    gradient_BTD = _scan_chunks(next_decay_BTD, dhidden_BTD, dlast_BD, not reverse)
    ddecay_BTD = gradient_BTD * _shifted(hidden_BTD, state_BD, reverse).astype(jnp.float32)
    last = -1 if reverse else 0
    dstate_BD = decay_BTD[:, last].astype(jnp.float32) * gradient_BTD[:, last]
    return ddecay_BTD.astype(decay_BTD.dtype), gradient_BTD.astype(dhidden_BTD.dtype), dstate_BD


def _shifted(x_BTD: jax.Array, first_BD: jax.Array, reverse: bool) -> jax.Array:
    """``x`` shifted by one step in the order of the scan: each step gets the entry of the previous step, and the first
    step gets ``first``."""
    first_B1D = first_BD[:, None].astype(x_BTD.dtype)
    return jnp.concatenate((x_BTD[:, 1:], first_B1D) if reverse else (first_B1D, x_BTD[:, :-1]), axis=1)


def _scan_chunks(
    decay_BTD: jax.Array, input_BTD: jax.Array, state_BD: jax.Array, reverse: bool, reset_BT: jax.Array | None = None
) -> jax.Array:
    """The state after each step, [B, T, D] float32.

    Args:
        reset_BT: True where the state before the step is not used, even if it is NaN. None: nowhere.
    """
    B, T, D = input_BTD.shape
    L = min(CHUNK, T)
    num_chunks = -(-T // L)
    num_padding = num_chunks * L - T
    # In the order of the scan, the padding comes after the last step.
    padding = ((0, 0), (num_padding, 0) if reverse else (0, num_padding), (0, 0))

    def split(x_BTD: jax.Array) -> jax.Array:
        return jnp.swapaxes(jnp.pad(x_BTD, padding).reshape(B, num_chunks, L, x_BTD.shape[2]), 0, 1)

    def decayed(steps: Any, state: jax.Array) -> jax.Array:
        is_reset, decay, _ = steps
        return decay * state if is_reset is None else jnp.where(is_reset, 0.0, decay * state)

    def combine(earlier: Any, later: Any) -> Any:
        is_reset = None if reset_BT is None else earlier[0] | later[0]
        return is_reset, earlier[1] * later[1], decayed(later, earlier[2]) + later[2]

    def run_chunk(state_BD: jax.Array, inputs: Any) -> Any:
        reset_BL1, *arrays = inputs
        steps = (reset_BL1, *(x.astype(jnp.float32) for x in arrays))
        steps = lax.associative_scan(combine, steps, axis=1, reverse=reverse)
        hidden_BLD = decayed(steps, state_BD[:, None]) + steps[2]
        return hidden_BLD[:, 0 if reverse else -1], hidden_BLD

    reset_NBL1 = None if reset_BT is None else split(reset_BT[:, :, None])
    _, hidden_NBLD = lax.scan(run_chunk, state_BD, (reset_NBL1, split(decay_BTD), split(input_BTD)), reverse=reverse)
    hidden_BTD = jnp.swapaxes(hidden_NBLD, 0, 1).reshape(B, num_chunks * L, D)
    return hidden_BTD[:, num_padding:] if reverse else hidden_BTD[:, :T]
