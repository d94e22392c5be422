"""Linear attention with decay: a matrix for a memory, ``S = decay * S + k v.T`` and ``out = q @ S`` (Katharopoulos et al.
2020, eq. 18 to 20, without their normaliser).

With a decay for each head it is the ground of retention (Sun et al. 2023), Mamba-2 (Dao & Gu 2024) and mLSTM (Beck et
al. 2024); with one for each channel of the keys, of gated linear attention (Yang et al. 2024). A normaliser, where one is
wanted, is one more channel of the values that is always 1.

Shapes: B batch, T time, H heads, K width of queries and keys, V width of values; C chunks, L steps of a chunk; E = 1 or
K, how many decays a head has.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax

from jaxlm import sharding

Implementation = Literal["reference", "chunked"]


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
    """``out_t = q_t @ S_t`` with ``S_t = exp(log_decay_t) * S_{t-1} + k_t v_t.T``: [B, T, H, V] in the values' dtype, and
    the last state, [B, H, K, V] float32. No scale is applied.

    The state is float32 whatever the dtype; products take their inputs in the dtype of the values.

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
    (B, T, H, K), V = query_BTHK.shape, value_BTHV.shape[-1]
    if implementation is None:
        implementation = "chunked" if T >= CHUNKED_FROM else "reference"
    if implementation not in get_args(Implementation):
        choice = ", ".join(map(repr, get_args(Implementation)))
        raise ValueError(f"no linear_attention implementation {implementation!r}: choose from {choice}")
    # A split of time ends here: the steps go one after the other.
    axes = ("batch", None, "heads", None)
    query_BTHK, key_BTHK, value_BTHV = (sharding.constrain(x, axes) for x in (query_BTHK, key_BTHK, value_BTHV))
    decay_BTHE = jnp.exp(log_decay.astype(jnp.float32))
    decay_BTHE = sharding.constrain(decay_BTHE[..., None] if log_decay.ndim == 3 else decay_BTHE, axes)
    if reset_BT is not None:
        decay_BTHE = jnp.where(reset_BT[:, :, None, None], 0.0, decay_BTHE)
    if keep_BT is not None:
        keep_BT11 = keep_BT[:, :, None, None]
        decay_BTHE = jnp.where(keep_BT11, decay_BTHE, 1.0)
        query_BTHK, key_BTHK, value_BTHV = (jnp.where(keep_BT11, x, 0) for x in (query_BTHK, key_BTHK, value_BTHV))
    if state_BHKV is None:
        state_BHKV = jnp.zeros_like(key_BTHK[:, 0, :, :, None] * value_BTHV[:, 0, :, None, :], jnp.float32)
    inputs = (query_BTHK, key_BTHK, value_BTHV, decay_BTHE)
    if implementation == "reference":
        return _reference(inputs, state_BHKV.astype(jnp.float32))
    return _chunked(inputs, state_BHKV.astype(jnp.float32), _chunk_length(T, chunk, log_decay.ndim == 4))


CHUNKED_FROM = 16
"""Steps from which chunks pay off."""


def _chunk_length(T: int, chunk: int | None, by_channel: bool) -> int:
    L = chunk if chunk is not None else (32 if by_channel else 64)
    return min(L, 1 << (T - 1).bit_length())


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
    for name, mask in (("reset_BT", reset), ("keep_BT", keep)):
        if mask is not None and mask.shape != (B, T):
            raise ValueError(f"{name} {list(mask.shape)} must be [batch, time] of the query, {[B, T]}")


def linear_attention_step(
    query_BHK: jax.Array, key_BHK: jax.Array, value_BHV: jax.Array, log_decay: jax.Array, state_BHKV: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """One step in a loop of one's own, such as a decoder's: the output [B, H, V], and the new state, float32.

    ``log_decay`` is [B, H] or [B, H, K].
    """
    decay = jnp.exp(log_decay.astype(jnp.float32))
    return _step(query_BHK, key_BHK, value_BHV, decay[..., None] if decay.ndim == 2 else decay, state_BHKV)


def _step(q_BHK: jax.Array, k_BHK: jax.Array, v_BHV: jax.Array, decay_BHE: jax.Array, state_BHKV: jax.Array) -> Any:
    q, k, v = (x.astype(jnp.float32) for x in (q_BHK, k_BHK, v_BHV))
    state_BHKV = decay_BHE[..., None] * state_BHKV + k[..., None] * v[:, :, None, :]
    return jnp.einsum("BHK,BHKV->BHV", q, state_BHKV).astype(v_BHV.dtype), state_BHKV


def _reference(inputs: Any, state_BHKV: jax.Array) -> tuple[jax.Array, jax.Array]:
    def step(state_BHKV: jax.Array, inputs: Any) -> Any:
        out_BHV, state_BHKV = _step(*inputs, state_BHKV)
        return state_BHKV, out_BHV

    state_BHKV, out_TBHV = lax.scan(step, state_BHKV, [jnp.swapaxes(x, 0, 1) for x in inputs])
    return jnp.swapaxes(out_TBHV, 0, 1), state_BHKV


# ------------------------------------------------------------------------------------------------------ chunked


def _chunked(inputs: Any, state_BHKV: jax.Array, L: int) -> tuple[jax.Array, jax.Array]:
    B, T, H, _ = inputs[0].shape

    def chunks(x_BTHX: jax.Array, fill: float) -> jax.Array:
        widths = ((0, 0), (0, -T % L), (0, 0), (0, 0))
        x_BTHX = jnp.pad(x_BTHX, widths, constant_values=fill)
        return x_BTHX.reshape(B, -1, L, H, x_BTHX.shape[-1]).transpose(1, 0, 3, 2, 4)

    fills = (0.0, 0.0, 0.0, 1.0)  # steps that change nothing
    # Of a chunk only its inputs and the state before it are kept for the gradient.
    step = jax.checkpoint(_chunk, prevent_cse=False)
    state_BHKV, out_CBHLV = lax.scan(step, state_BHKV, tuple(map(chunks, inputs, fills)))
    out_BTHV = out_CBHLV.transpose(1, 0, 3, 2, 4).reshape(B, -1, H, out_CBHLV.shape[-1])
    return out_BTHV[:, :T], state_BHKV


def _chunk(state_BHKV: jax.Array, inputs: Any) -> tuple[jax.Array, jax.Array]:
    """Step t of a chunk sees step s by all decays between them, and the state before the chunk by all up to t; the state
    after it sees step s by all decays behind s. Decays are multiplied, never divided: no number leaves [0, 1]."""
    q_BHLK, k_BHLK, v_BHLV, decay_BHLE = inputs
    dtype = v_BHLV.dtype

    def product(form: str, *factors: jax.Array) -> jax.Array:
        return jnp.einsum(form, *(x.astype(dtype) for x in factors), preferred_element_type=jnp.float32)

    if decay_BHLE.shape[-1] == 1:
        between_BHLM, upto_BHLE, behind_BHLE = _decays(decay_BHLE)
        scores_BHLM = product("BHLK,BHMK->BHLM", q_BHLK, k_BHLK) * between_BHLM
    else:
        scores_BHLM, upto_BHLE, behind_BHLE = _decayed_scores(q_BHLK, k_BHLK, decay_BHLE, product)
    out_BHLV = product("BHLM,BHMV->BHLV", scores_BHLM, v_BHLV)
    out_BHLV += product("BHLK,BHKV->BHLV", q_BHLK * upto_BHLE, state_BHKV)
    through_BHE1 = jnp.swapaxes(upto_BHLE[:, :, -1:], 2, 3)
    state_BHKV = through_BHE1 * state_BHKV + product("BHLK,BHLV->BHKV", k_BHLK * behind_BHLE, v_BHLV)
    return state_BHKV, out_BHLV.astype(dtype)


def _decays(decay_BHLE):
    tri = jnp.ones((*decay_BHLE.shape[:3], 1, 1), jnp.float32)
    return _double(decay_BHLE, tri, lambda later, earlier, m: later * jnp.swapaxes(earlier, -1, -2))


def _decayed_scores(q, k, decay, product):
    def off(later, earlier, m):
        B, H, L, K = q.shape
        q_ = q.reshape(B, H, L // (2 * m), 2, m, K)[:, :, :, 1] * later
        k_ = k.reshape(B, H, L // (2 * m), 2, m, K)[:, :, :, 0] * earlier
        return product("BHPLK,BHPMK->BHPLM", q_, k_)

    tri = jnp.sum(q.astype(jnp.float32) * k.astype(jnp.float32), -1)[..., None, None]
    return _double(decay, tri, off)


def _double(decay_BHLE, tri, off):
    B, H, L, E = decay_BHLE.shape
    upto = decay_BHLE[:, :, :, None]
    behind = jnp.ones_like(upto)
    m = 1
    while m < L:
        first, second = (lambda x: x[:, :, 0::2]), (lambda x: x[:, :, 1::2])
        low = off(second(upto), first(behind), m)
        tri = jnp.concatenate(
            [
                jnp.concatenate([first(tri), jnp.zeros_like(low)], -1),
                jnp.concatenate([low, second(tri)], -1),
            ],
            -2,
        )
        total = upto[..., -1:, :]
        upto = jnp.concatenate([first(upto), first(total) * second(upto)], -2)
        behind = jnp.concatenate([first(behind) * second(total), second(behind)], -2)
        m *= 2
    return tri[:, :, 0], upto[:, :, 0], behind[:, :, 0]
