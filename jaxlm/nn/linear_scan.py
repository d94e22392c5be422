"""The elementwise linear recurrence ``h = decay * h + input``.

It is the ground of RG-LRU (De et al. 2024, eq. 4), minGRU (Feng et al. 2024), QRNN (Bradbury et al. 2017) and SRU (Lei
et al. 2018), which differ in how they make its two inputs.

It does two operations for three numbers moved, so memory is its only bound. ``sequential`` walks over time and replaces
the input by the state in one and the same buffer: nothing else is written, and where the input is not needed any more
no fresh memory is touched. ``chunked`` walks over chunks of time, inside of which all steps go together in
log2(CHUNK) rounds, for machines that pay for each round more than for its numbers. Both have their own gradient, which
is the same recurrence from the last step to the first (Martin & Cundy 2018, section 2.2); only the decay and the states
are kept for it.

Shapes: B batch, T time, D channels, L steps of a chunk.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax

from jaxlm import sharding
from jaxlm.nn.recurrence import both_masks, check_masks

Implementation = Literal["reference", "sequential", "chunked"]

CHUNK = 256
"""Steps that ``chunked`` takes together."""


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
    """The state after each step, [B, T, D] in the input's dtype, and the last one, [B, D] float32.

    The state is float32 inside, whatever the dtypes.

    Args:
        decay_BTD: what is left of each channel, usually in [0, 1]. ``chunked`` multiplies decays with each other, so
            one beyond 1 may overflow there.
        state_BD: the state before the first step; None is zeros.
        reset_BT: True where the state goes back to zeros before the step (see ``recurrence.borders``). None: nowhere.
        keep_BT: False where the step is padding: the state stays as it is, and the output repeats it. None: all real.
        reverse: from the last step to the first; outputs stay at their places, and the last state is that of place 0.
        implementation: ``reference`` (a short ``lax.scan``), ``sequential``, ``chunked`` (see above), or None for the
            best that is known: ``sequential`` on a CPU, ``chunked`` elsewhere. Second derivatives of the latter two are
            for forward over reverse; reverse over reverse needs ``reference``.

    Raises:
        ValueError: shapes that do not fit, no step at all, or an unknown implementation.

    Example:
        >>> states, last = linear_scan(jnp.full((1, 3, 1), 0.5), jnp.ones((1, 3, 1)))
        >>> states[0, :, 0].tolist(), last.tolist()
        ([1.0, 1.5, 1.75], [[1.75]])
    """
    masks = _check(decay_BTD, input_BTD, state_BD, reset_BT, keep_BT)
    if implementation is None:
        implementation = "sequential" if sharding.platform() == "cpu" else "chunked"
    if implementation not in get_args(Implementation):
        choice = ", ".join(map(repr, get_args(Implementation)))
        raise ValueError(f"no linear_scan implementation {implementation!r}: choose from {choice}")
    # A split of time ends here: the steps go one after the other.
    decay_BTD, input_BTD = (sharding.constrain(x, ("batch", None, "mlp")) for x in (decay_BTD, input_BTD))
    state_BD = jnp.zeros_like(input_BTD[:, 0], jnp.float32) if state_BD is None else state_BD.astype(jnp.float32)
    if implementation == "reference":
        return _reference(decay_BTD, input_BTD, state_BD, masks, reverse)
    return _scan(implementation, reverse, decay_BTD, input_BTD, state_BD, masks)


def _check(
    decay_BTD: jax.Array, input_BTD: jax.Array, state_BD: Any, reset_BT: Any, keep_BT: Any
) -> tuple[jax.Array, jax.Array] | None:
    """``(reset_BT, keep_BT)``, or None where there is neither."""
    if input_BTD.ndim != 3 or decay_BTD.shape != input_BTD.shape or not input_BTD.shape[1]:
        raise ValueError(
            f"decay {list(decay_BTD.shape)} and input {list(input_BTD.shape)} must both be [batch, time, channels], "
            "with at least one step"
        )
    B, T, D = input_BTD.shape
    if state_BD is not None and state_BD.shape != (B, D):
        raise ValueError(f"state_BD {list(state_BD.shape)} must be [batch, channels] of the input, {[B, D]}")
    check_masks(reset_BT, keep_BT, (B, T))
    return both_masks(reset_BT, keep_BT, (B, T))


def _step(state: jax.Array, decay: jax.Array, new: jax.Array, mask: Any) -> jax.Array:
    """One step for all rows, [B, D] float32. What a pad holds may be anything, not-a-number too."""
    decay, new = decay.astype(jnp.float32), new.astype(jnp.float32)
    if mask is not None:
        reset_B1, keep_B1 = mask
        decay, new = jnp.where(keep_B1, decay, 1.0), jnp.where(keep_B1, new, 0.0)
        state = jnp.where(reset_B1, 0.0, state)
    return decay * state + new


def _reference(
    decay_BTD: jax.Array, input_BTD: jax.Array, state_BD: jax.Array, masks: Any, reverse: bool
) -> tuple[jax.Array, jax.Array]:
    def step(state: jax.Array, inputs: Any) -> Any:
        decay, new, mask = inputs
        state = _step(state, decay, new, mask)
        return state, state.astype(input_BTD.dtype)

    masks_TB1 = jax.tree.map(lambda mask: mask.T[:, :, None], masks)
    steps = (jnp.swapaxes(decay_BTD, 0, 1), jnp.swapaxes(input_BTD, 0, 1), masks_TB1)
    last_BD, hidden_TBD = lax.scan(step, state_BD, steps, reverse=reverse)
    return jnp.swapaxes(hidden_TBD, 0, 1), last_BD


# ------------------------------------------------------------------------------------------------- own gradient


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scan(
    implementation: str, reverse: bool, decay_BTD: jax.Array, input_BTD: jax.Array, state_BD: jax.Array, masks: Any
) -> tuple[jax.Array, jax.Array]:
    return _forward(implementation, reverse, decay_BTD, input_BTD, state_BD, masks)[0]


def _forward(
    implementation: str, reverse: bool, decay_BTD: jax.Array, input_BTD: jax.Array, state_BD: jax.Array, masks: Any
) -> Any:
    forward = _sequential if implementation == "sequential" else _chunked
    hidden_BTD, last_BD = forward(decay_BTD, input_BTD, state_BD, masks, reverse)
    return (hidden_BTD, last_BD), (decay_BTD, hidden_BTD, state_BD, masks)


def _backward(implementation: str, reverse: bool, saved: Any, cotangents: Any) -> tuple[Any, ...]:
    """With g the gradient of a state by all that comes after it: ``g = dhidden + decay_next * g_next``; that is the
    gradient of the input as well, and ``g * state_before`` that of the decay."""
    masks = saved[-1]
    backward: Any = _sequential_backward if implementation == "sequential" else _chunked_backward
    ddecay_BTD, dinput_BTD, dstate_BD = backward(*saved, *cotangents, reverse)
    if masks is not None:
        dinput_BTD = jnp.where(masks[1][:, :, None], dinput_BTD, 0.0)
    return ddecay_BTD, dinput_BTD, dstate_BD, None


_scan.defvjp(_forward, _backward)


# --------------------------------------------------------------------------------------------------- sequential


def _sequential(
    decay_BTD: jax.Array, input_BTD: jax.Array, state_BD: jax.Array, masks: Any, reverse: bool
) -> tuple[jax.Array, jax.Array]:
    place = _places(input_BTD, reverse)

    def step(states: Any, i: Any, buffers: Any) -> Any:
        decay_BD, new_BD = _at(decay_BTD, place(i)), _at(buffers[0], place(i))
        return (_step(states[0], decay_BD, new_BD, _masks_at(masks, place(i))),)

    (hidden_BTD,), (last_BD,) = _replace((input_BTD,), step((state_BD,), 0, (input_BTD,)), step, place)
    return hidden_BTD, last_BD


def _sequential_backward(
    decay_BTD: jax.Array,
    hidden_BTD: jax.Array,
    state_BD: jax.Array,
    masks: Any,
    dhidden_BTD: jax.Array,
    dlast_BD: jax.Array,
    reverse: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradient of the input replaces that of the states, and the gradient of the decay replaces the states."""
    end = hidden_BTD.shape[1] - 1
    place = _places(hidden_BTD, not reverse)

    def through(gradient_BD: jax.Array, i: Any) -> jax.Array:
        """From the gradient of the state after a step to that of the state before it."""
        decayed_BD = _at(decay_BTD, place(i)).astype(jnp.float32) * gradient_BD
        mask = _masks_at(masks, place(i))
        return decayed_BD if mask is None else jnp.where(mask[1], jnp.where(mask[0], 0.0, decayed_BD), gradient_BD)

    def values(comes_BD: jax.Array, i: Any, buffers: Any) -> Any:
        gradient_BD = _at(buffers[0], place(i)).astype(jnp.float32) + comes_BD
        before_BD = jnp.where(i == end, state_BD, _at(buffers[1], place(jnp.minimum(i + 1, end))).astype(jnp.float32))
        ddecay_BD, mask = gradient_BD * before_BD, _masks_at(masks, place(i))
        return gradient_BD, ddecay_BD if mask is None else jnp.where(mask[1] & ~mask[0], ddecay_BD, 0.0)

    def step(gradients: Any, i: Any, buffers: Any) -> Any:
        return values(through(gradients[0], i - 1), i, buffers)

    buffers = (dhidden_BTD, hidden_BTD.astype(decay_BTD.dtype))
    (dinput_BTD, ddecay_BTD), (gradient_BD, _) = _replace(buffers, values(dlast_BD, 0, buffers), step, place)
    return ddecay_BTD, dinput_BTD, through(gradient_BD, end)


def _places(x_BTD: jax.Array, reverse: bool) -> Callable[[Any], jax.Array]:
    """The place of step i; unsigned, so that no index counts from the end."""
    last = x_BTD.shape[1] - 1
    return lambda i: jnp.asarray(last - i if reverse else i).astype(jnp.uint32)


def _replace(
    buffers: tuple[jax.Array, ...], values: Any, step: Callable[..., Any], place: Callable[[Any], jax.Array]
) -> tuple[Any, Any]:
    """Buffers [B, T, D] with the values [B, D] of every step in place of what stood there, and the last values.

    Args:
        values: of step 0.
        step: ``step(values of step i - 1, i, buffers)`` gives the values of step i. Before place i the buffers already
            hold new values, there and behind it old ones.

    Each turn of the loop writes first, and then reads for the next step what it wrote into. So the old buffer is never
    read after a write, and XLA needs no copy of it: with the read before the write that depends on how things were
    fused, and a copy in each turn makes the whole quadratic.
    """

    def write(buffers: Any, values: Any, i: Any) -> Any:
        return tuple(_put(buffer, value, place(i)) for buffer, value in zip(buffers, values, strict=True))

    def turn(i: jax.Array, carry: Any) -> Any:
        values, buffers = carry
        buffers = write(buffers, values, i)
        return step(values, i + 1, buffers), buffers

    end = buffers[0].shape[1] - 1
    values, buffers = lax.fori_loop(0, end, turn, (values, buffers))
    return write(buffers, values, end), values


def _at(x_BTD: jax.Array, place: jax.Array) -> jax.Array:
    zero = jnp.zeros_like(place)
    return lax.dynamic_slice(x_BTD, (zero, place, zero), (x_BTD.shape[0], 1, x_BTD.shape[2]))[:, 0]


def _put(x_BTD: jax.Array, value_BD: jax.Array, place: jax.Array) -> jax.Array:
    zero = jnp.zeros_like(place)
    return lax.dynamic_update_slice(x_BTD, value_BD[:, None].astype(x_BTD.dtype), (zero, place, zero))


def _masks_at(masks: Any, place: jax.Array) -> Any:
    zero = jnp.zeros_like(place)
    return jax.tree.map(lambda mask: lax.dynamic_slice(mask, (zero, place), (mask.shape[0], 1)), masks)


# ------------------------------------------------------------------------------------------------------ chunked


def _chunked(
    decay_BTD: jax.Array, input_BTD: jax.Array, state_BD: jax.Array, masks: Any, reverse: bool
) -> tuple[jax.Array, jax.Array]:
    if masks is not None:
        input_BTD = jnp.where(masks[1][:, :, None], input_BTD, 0.0)
    decay_BTD = _masked_decay(decay_BTD, masks)
    hidden_BTD = _by_chunks(decay_BTD, input_BTD, state_BD, reverse)
    return hidden_BTD.astype(input_BTD.dtype), hidden_BTD[:, 0 if reverse else -1]


def _chunked_backward(
    decay_BTD: jax.Array,
    hidden_BTD: jax.Array,
    state_BD: jax.Array,
    masks: Any,
    dhidden_BTD: jax.Array,
    dlast_BD: jax.Array,
    reverse: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    decay_BTD, dtype = _masked_decay(decay_BTD, masks), decay_BTD.dtype
    # Each step takes the decay of the one that its gradient comes from, and the state that it started from.
    following_BTD = _shifted(decay_BTD, jnp.ones_like(decay_BTD[:, 0]), not reverse)
    gradient_BTD = _by_chunks(following_BTD, dhidden_BTD, dlast_BD, not reverse)
    ddecay_BTD = gradient_BTD * _shifted(hidden_BTD, state_BD, reverse).astype(jnp.float32)
    if masks is not None:
        ddecay_BTD = jnp.where((masks[1] & ~masks[0])[:, :, None], ddecay_BTD, 0.0)
    last = -1 if reverse else 0
    dstate_BD = decay_BTD[:, last].astype(jnp.float32) * gradient_BTD[:, last]
    return ddecay_BTD.astype(dtype), gradient_BTD.astype(dhidden_BTD.dtype), dstate_BD


def _shifted(x_BTD: jax.Array, first_BD: jax.Array, reverse: bool) -> jax.Array:
    """What stood one step earlier in the order of reading."""
    first_B1D = first_BD[:, None].astype(x_BTD.dtype)
    return jnp.concatenate((x_BTD[:, 1:], first_B1D) if reverse else (first_B1D, x_BTD[:, :-1]), axis=1)


def _masked_decay(decay_BTD: jax.Array, masks: Any) -> jax.Array:
    if masks is None:
        return decay_BTD
    reset_BT1, keep_BT1 = (mask[:, :, None] for mask in masks)
    return jnp.where(keep_BT1, jnp.where(reset_BT1, 0.0, decay_BTD), 1.0)


def _by_chunks(decay_BTD: jax.Array, input_BTD: jax.Array, state_BD: jax.Array, reverse: bool) -> jax.Array:
    """The states, [B, T, D] float32."""
    B, T, D = input_BTD.shape
    L = min(CHUNK, T)
    short = -T % L
    padding = ((0, 0), (short, 0) if reverse else (0, short), (0, 0))  # behind the last step that is read

    def chunks(x_BTD: jax.Array) -> jax.Array:
        return jnp.swapaxes(jnp.pad(x_BTD, padding).reshape(B, -1, L, D), 0, 1)

    def together(earlier: Any, later: Any) -> Any:
        return earlier[0] * later[0], later[0] * earlier[1] + later[1]

    def chunk(state_BD: jax.Array, inputs: Any) -> Any:
        decay_BLD, new_BLD = (x.astype(jnp.float32) for x in inputs)
        decay_BLD, hidden_BLD = lax.associative_scan(together, (decay_BLD, new_BLD), axis=1, reverse=reverse)
        hidden_BLD = decay_BLD * state_BD[:, None] + hidden_BLD
        return hidden_BLD[:, 0 if reverse else -1], hidden_BLD

    _, hidden_NBLD = lax.scan(chunk, state_BD, (chunks(decay_BTD), chunks(input_BTD)), reverse=reverse)
    hidden_BTD = jnp.swapaxes(hidden_NBLD, 0, 1).reshape(B, -1, D)
    return hidden_BTD[:, short:] if reverse else hidden_BTD[:, :T]
