"""Linear attention with decay: a matrix for a memory, ``S = decay * S + k v.T`` and ``out = q @ S``.

(Katharopoulos et al. 2020, eq. 18 to 20, without their normaliser.)

With a decay for each head it is the ground of retention (Sun et al. 2023), Mamba-2 (Dao & Gu 2024) and mLSTM (Beck et
al. 2024); with one for each channel of the keys, of gated linear attention (Yang et al. 2024). A normaliser is one more
channel of the values that is always 1.

Shapes: B batch, T time, H heads, K width of queries and keys, V width of values; C chunks, L steps of a chunk; E = 1 or
K, how many decays a head has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax

from jaxlm import sharding
from jaxlm.nn.recurrence import check_masks

Implementation = Literal["reference", "chunked"]

CHUNK = {"cpu": 32}
"""Steps of a chunk by platform; ``CHUNK_ELSEWHERE`` on others, whose matrix units want longer ones."""
CHUNK_ELSEWHERE = 128
CHUNKED_FROM = 8
"""Steps from which chunks pay off."""


def linear_attention(
    query_BTHK: jax.Array,
    key_BTHK: jax.Array,
    value_BTHV: jax.Array,
    log_decay: jax.Array,
    state_BHKV: jax.Array | None = None,
    *,
    reset_BT: jax.Array | None = None,
    keep_BT: jax.Array | None = None,
    chunk: int | None = None,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, jax.Array]:
    """``out_t = q_t @ S_t`` with ``S_t = exp(log_decay_t) * S_{t-1} + k_t v_t.T``, and the last state.

    The output is [B, T, H, V] in the values' dtype, the state [B, H, K, V] float32. No scale is applied. Products take
    their inputs in the dtype of the values, all else is float32.

    Args:
        log_decay: [B, T, H], one for a head, or [B, T, H, K], one for each channel of its keys; at most 0 (-inf forgets
            everything).
        state_BHKV: the state before the first step; None is zeros.
        reset_BT: True where the state goes back to zeros before the step (see ``recurrence.borders``). None: nowhere.
        keep_BT: False where the step is padding: the state stays as it is, and the output is zeros. None: all real.
        chunk: L of ``chunked``, a power of two; None chooses.
        implementation: ``reference`` (one step after the other), ``chunked`` (chunks one after the other, all the steps
            of a chunk by products of matrices; exact, for decays of any strength), or None for the best that is known.

    Raises:
        ValueError: shapes that do not fit, a chunk that is no power of two, or an unknown implementation.

    Example:
        >>> ones = jnp.ones((1, 3, 1, 1))
        >>> out, state = linear_attention(ones, ones, ones, jnp.log(0.5 * ones[..., 0]))
        >>> out.ravel().tolist(), state.ravel().tolist()
        ([1.0, 1.5, 1.75], [1.75])
    """
    _check(query_BTHK, key_BTHK, value_BTHV, log_decay, state_BHKV, reset_BT, keep_BT)
    if chunk is not None and (chunk < 1 or chunk & (chunk - 1)):
        raise ValueError(f"chunk={chunk} must be a power of two, such as 32 or 64")
    T = query_BTHK.shape[1]
    if implementation is None:
        implementation = "chunked" if T >= CHUNKED_FROM else "reference"
    if implementation not in get_args(Implementation):
        choice = ", ".join(map(repr, get_args(Implementation)))
        raise ValueError(f"no linear_attention implementation {implementation!r}: choose from {choice}")
    # A split of time ends here: the steps go one after the other.
    axes = ("batch", None, "heads", None)
    query_BTHK, key_BTHK, value_BTHV = (sharding.constrain(x, axes) for x in (query_BTHK, key_BTHK, value_BTHV))
    log_BTHE = log_decay.astype(jnp.float32)
    log_BTHE = sharding.constrain(log_BTHE[..., None] if log_decay.ndim == 3 else log_BTHE, axes)
    if reset_BT is not None:
        log_BTHE = jnp.where(reset_BT[:, :, None, None], -jnp.inf, log_BTHE)
    if keep_BT is not None:
        keep_BT11 = keep_BT[:, :, None, None]
        query_BTHK, key_BTHK, value_BTHV, log_BTHE = (
            jnp.where(keep_BT11, x, 0) for x in (query_BTHK, key_BTHK, value_BTHV, log_BTHE)
        )
    if state_BHKV is None:
        state_BHKV = jnp.zeros_like(key_BTHK[:, 0, :, :, None] * value_BTHV[:, 0, :, None, :], jnp.float32)
    inputs = (query_BTHK, key_BTHK, value_BTHV, log_BTHE)
    if implementation == "reference":
        return _reference(inputs, state_BHKV.astype(jnp.float32))
    if chunk is None:
        chunk = CHUNK.get(sharding.platform(), CHUNK_ELSEWHERE)
    return _chunked(inputs, state_BHKV.astype(jnp.float32), min(chunk, 1 << (T - 1).bit_length()))


def _check(
    query: jax.Array, key: jax.Array, value: jax.Array, log_decay: jax.Array, state: Any, reset: Any, keep: Any
) -> None:
    if query.ndim != 4 or key.shape != query.shape or value.shape[:-1] != query.shape[:-1] or not query.shape[1]:
        raise ValueError(
            f"query {list(query.shape)} and key {list(key.shape)} must both be [batch, time, heads, width], with at "
            f"least one step, and value {list(value.shape)} [batch, time, heads, value width]"
        )
    if log_decay.shape not in (query.shape[:-1], query.shape):
        raise ValueError(
            f"log_decay {list(log_decay.shape)} must be {list(query.shape[:-1])}, one for each head, or "
            f"{list(query.shape)}, one for each channel of the keys"
        )
    (B, T, H, K), V = query.shape, value.shape[-1]
    if state is not None and state.shape != (B, H, K, V):
        raise ValueError(f"state {list(state.shape)} must be [batch, heads, key width, value width], {[B, H, K, V]}")
    check_masks(reset, keep, (B, T), "query")


def linear_attention_step(
    query_BHK: jax.Array, key_BHK: jax.Array, value_BHV: jax.Array, log_decay: jax.Array, state_BHKV: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """One step in a loop of one's own, such as a decoder's: the output [B, H, V], and the new state, float32.

    ``log_decay`` is [B, H] or [B, H, K].
    """
    log_BHE = log_decay.astype(jnp.float32)
    return _step(state_BHKV, query_BHK, key_BHK, value_BHV, log_BHE[..., None] if log_decay.ndim == 2 else log_BHE)


def _step(state_BHKV: jax.Array, q_BHK: jax.Array, k_BHK: jax.Array, v_BHV: jax.Array, log_BHE: jax.Array) -> Any:
    q, k, v = (x.astype(jnp.float32) for x in (q_BHK, k_BHK, v_BHV))
    state_BHKV = jnp.exp(log_BHE)[..., None] * state_BHKV + k[..., None] * v[:, :, None, :]
    return jnp.einsum("BHK,BHKV->BHV", q, state_BHKV).astype(v_BHV.dtype), state_BHKV


def _reference(inputs: Any, state_BHKV: jax.Array) -> tuple[jax.Array, jax.Array]:
    def step(state_BHKV: jax.Array, inputs: Any) -> Any:
        out_BHV, state_BHKV = _step(state_BHKV, *inputs)
        return state_BHKV, out_BHV

    state_BHKV, out_TBHV = lax.scan(step, state_BHKV, [jnp.swapaxes(x, 0, 1) for x in inputs])
    return jnp.swapaxes(out_TBHV, 0, 1), state_BHKV


# ------------------------------------------------------------------------------------------------------ chunked


def _chunked(inputs: Any, state_BHKV: jax.Array, L: int) -> tuple[jax.Array, jax.Array]:
    B, T, H, _ = inputs[0].shape

    def chunks(x_BTHX: jax.Array) -> jax.Array:
        x_BTHX = jnp.pad(x_BTHX, ((0, 0), (0, -T % L), (0, 0), (0, 0)))  # steps that change nothing
        return x_BTHX.reshape(B, -1, L, H, x_BTHX.shape[-1]).transpose(1, 0, 3, 2, 4)

    out_CBHLV, state_BHKV = _scan(tuple(map(chunks, inputs)), state_BHKV)
    out_BTHV = out_CBHLV.transpose(1, 0, 3, 2, 4).reshape(B, -1, H, out_CBHLV.shape[-1])
    return out_BTHV[:, :T], state_BHKV


@jax.custom_vjp
def _scan(inputs: Any, state_BHKV: jax.Array) -> tuple[jax.Array, jax.Array]:
    state_BHKV, out_CBHLV = lax.scan(lambda state, inputs: _chunk(state, *inputs), state_BHKV, inputs)
    return out_CBHLV, state_BHKV


def _scan_forward(inputs: Any, state_BHKV: jax.Array) -> Any:
    """Only the inputs and the state before each chunk are kept."""

    def step(state_BHKV: jax.Array, inputs: Any) -> Any:
        after_BHKV, out_BHLV = _chunk(state_BHKV, *inputs)
        return after_BHKV, (out_BHLV, state_BHKV)

    last_BHKV, (out_CBHLV, states_CBHKV) = lax.scan(step, state_BHKV, inputs)
    return (out_CBHLV, last_BHKV), (inputs, states_CBHKV)


def _scan_backward(saved: Any, cotangents: Any) -> Any:
    def step(dafter_BHKV: jax.Array, inputs: Any) -> Any:
        (q, k, v, log_BHLE), state_BHKV, dout_BHLV = inputs
        wide = (q.astype(jnp.float32), k.astype(jnp.float32))  # the gradient of decays is a difference of theirs
        (after_BHKV, _), pull = jax.vjp(lambda state, q, k, v: _chunk(state, q, k, v, log_BHLE), state_BHKV, *wide, v)
        dstate_BHKV, dq, dk, dv = pull((dafter_BHKV, dout_BHLV))
        dlog_BHLE = _log_decay_gradient(wide[0] * dq - wide[1] * dk, after_BHKV * dafter_BHKV, log_BHLE)
        return dstate_BHKV, (dq.astype(q.dtype), dk.astype(k.dtype), dv, dlog_BHLE)

    dout_CBHLV, dlast_BHKV = cotangents
    dstate_BHKV, dinputs = lax.scan(step, dlast_BHKV, (*saved, dout_CBHLV), reverse=True)
    return dinputs, dstate_BHKV


def _log_decay_gradient(dsum_BHLK: jax.Array, after_BHKV: jax.Array, log_BHLE: jax.Array) -> jax.Array:
    """Without a way back through the products of decays (Yang et al. 2024, section 4.3).

    With b_t the sum of log decays up to t, all that a chunk gives depends on ``exp(b_t) * q_t``, ``exp(-b_t) * k_t``
    and, behind it, ``exp(b_L) * S``. So the gradient of b_t is ``q_t * dq_t - k_t * dk_t``, and a log decay has a part
    in all b from its step on.

    Args:
        dsum_BHLK: ``q * dq - k * dk``.
        after_BHKV: the state after the chunk times its gradient.
    """
    dsum_BHLE, dlast_BHE = dsum_BHLK, jnp.sum(after_BHKV, axis=-1)
    if log_BHLE.shape[-1] == 1:
        dsum_BHLE, dlast_BHE = (jnp.sum(x, axis=-1, keepdims=True) for x in (dsum_BHLE, dlast_BHE))
    from_here_LM = jnp.triu(jnp.ones((log_BHLE.shape[2],) * 2, jnp.float32))
    dlog_BHLE = jnp.einsum("LM,BHME->BHLE", from_here_LM, dsum_BHLE, precision=lax.Precision.HIGHEST)
    return jnp.where(log_BHLE == -jnp.inf, 0.0, dlog_BHLE + dlast_BHE[:, :, None])


_scan.defvjp(_scan_forward, _scan_backward)


def _chunk(
    state_BHKV: jax.Array, q_BHLK: jax.Array, k_BHLK: jax.Array, v_BHLV: jax.Array, log_BHLE: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Step t of a chunk sees step s by all decays between them, and the state before the chunk by all up to t.

    The state after the chunk sees step s by all decays behind s. Decays are multiplied, never divided: no product of
    them leaves [0, 1]."""
    dtype, decay_BHLE = v_BHLV.dtype, jnp.exp(log_BHLE)

    def product(form: str, *factors: jax.Array) -> jax.Array:
        return jnp.einsum(form, *(x.astype(dtype) for x in factors), preferred_element_type=jnp.float32)

    if decay_BHLE.shape[-1] == 1:  # it can be taken out of the product

        def part(later: jax.Array, earlier: jax.Array) -> jax.Array:
            return later * jnp.swapaxes(earlier, -1, -2)

        own_BHL = jnp.ones(decay_BHLE.shape[:3], jnp.float32)
        between_BHLM, upto_BHLE, behind_BHLE = _by_doubling(decay_BHLE, own_BHL, part)
        scores_BHLM = product("BHLK,BHMK->BHLM", q_BHLK, k_BHLK) * between_BHLM
    else:

        def part(later: jax.Array, earlier: jax.Array) -> jax.Array:
            q_BHPSK, k_BHPSK = _halves(q_BHLK, later)[1], _halves(k_BHLK, later)[0]
            return product("BHPSK,BHPRK->BHPSR", q_BHPSK * later, k_BHPSK * earlier)

        own_BHL = jnp.sum(q_BHLK.astype(jnp.float32) * k_BHLK.astype(jnp.float32), axis=-1)
        scores_BHLM, upto_BHLE, behind_BHLE = _by_doubling(decay_BHLE, own_BHL, part)
    out_BHLV = product("BHLM,BHMV->BHLV", scores_BHLM, v_BHLV)
    out_BHLV += product("BHLK,BHKV->BHLV", q_BHLK * upto_BHLE, state_BHKV)
    through_BHE1 = jnp.swapaxes(upto_BHLE[:, :, -1:], 2, 3)
    state_BHKV = through_BHE1 * state_BHKV + product("BHLK,BHLV->BHKV", k_BHLK * behind_BHLE, v_BHLV)
    return state_BHKV, out_BHLV.astype(dtype)


def _by_doubling(
    decay_BHLE: jax.Array, own_BHL: jax.Array, part: Callable[[jax.Array, jax.Array], jax.Array]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What each step sees of those up to it, [B, H, L, L], and the products of all decays up to a step and behind it.

    The products are [B, H, L, E]; a step's own decay is among those up to it. Blocks of 1, 2, 4, ... steps are joined
    in pairs. A step of the later block sees one of the earlier block through two products of decays, one on each side
    of the border between them: ``later`` up to the one, ``earlier`` behind the other. A quotient of two products, which
    overflows, is never needed.

    Args:
        own_BHL: what each step sees of itself.
        part: from ``later`` and ``earlier`` [B, H, P pairs, S, E] to what the steps of the later block of each pair see
            of those of the earlier one, [B, H, P, S, S].
    """
    B, H, L, E = decay_BHLE.shape
    upto, behind, seen = decay_BHLE[:, :, :, None], jnp.ones_like(decay_BHLE[:, :, :, None]), own_BHL[..., None, None]
    for size in (1 << power for power in range(L.bit_length() - 1)):
        pairs_upto, pairs_behind = (x.reshape(B, H, -1, 2, size, E) for x in (upto, behind))
        low = part(pairs_upto[:, :, :, 1], pairs_behind[:, :, :, 0])
        high = jnp.zeros_like(low)
        rows = [jnp.concatenate(row, axis=-1) for row in ((seen[:, :, 0::2], high), (low, seen[:, :, 1::2]))]
        seen = jnp.concatenate(rows, axis=-2)
        (first, second), (first_behind, second_behind) = (
            (x[:, :, :, 0], x[:, :, :, 1]) for x in (pairs_upto, pairs_behind)
        )
        upto = jnp.concatenate([first, first[..., -1:, :] * second], axis=-2)
        behind = jnp.concatenate([second[..., -1:, :] * first_behind, second_behind], axis=-2)
    return seen[:, :, 0], upto[:, :, 0], behind[:, :, 0]


def _halves(x_BHLK: jax.Array, half_BHPSE: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The earlier and the later block of each pair, [B, H, P, S, K] each."""
    pairs = x_BHLK.reshape(*x_BHLK.shape[:2], -1, 2, half_BHPSE.shape[3], x_BHLK.shape[-1])
    return pairs[:, :, :, 0], pairs[:, :, :, 1]
