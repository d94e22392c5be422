"""The gated delta rule (Yang, Kautz and Hatamizadeh 2024, eq. 10), a recurrence whose state S is a matrix.

    S_t = exp(g_t) * (I - beta_t k_t k_t.T) @ S_{t-1} + beta_t k_t v_t.T
    out_t = q_t @ S_t

The state maps keys to values. A step first decays the state. Then it replaces the old value of the key, ``k_t @ S``, by
``(1 - beta_t) * old value + beta_t * v_t`` (for keys of length 1). The paper writes the transposed state. With
``g = 0``, this is the delta rule (Schlag et al. 2021; Yang et al. 2024). For keys of length 1, the eigenvalues of
``I - beta k k.T`` are 1 and ``1 - beta``. With beta in [0, 2], they are in [-1, 1] (Grazzi et al. 2024).

Shapes: B batch, T time, H heads, K width of queries and keys, V width of values, C chunks, L steps of a chunk.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax

from jaxlm import sharding
from jaxlm.nn import choices
from jaxlm.nn.scan.matrix_state import decay_products, join_chunks, split_into_chunks
from jaxlm.nn.segments import check_masks

Implementation = Literal["reference", "chunked"]


def gated_delta_rule(
    query_BTHK: jax.Array,
    key_BTHK: jax.Array,
    value_BTHV: jax.Array,
    log_decay_BTH: jax.Array,
    beta_BTH: jax.Array,
    state_BHKV: jax.Array | None = None,
    *,
    reset_BT: jax.Array | None = None,
    keep_BT: jax.Array | None = None,
    chunk: int | None = None,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The outputs ``q_t @ S_t`` of the gated delta rule (equations: see the module), and the last state.

    The output is [B, T, H, V] in the dtype of the values; the state is [B, H, K, V] float32. Queries and keys are
    neither scaled nor normalised. Matmul inputs have the dtype of the values; everything else is float32.

    Args:
        key_BTHK: keys, usually of length 1. If ``beta * |k|**2`` exceeds 2, the state can grow exponentially.
        log_decay_BTH: g, at most 0; -inf sets the old state to zeros.
        beta_BTH: the weight of the new value, in [0, 2].
        state_BHKV: the state before the first step; None: zeros.
        reset_BT: True where the state is set to zeros before the step (``jaxlm.nn.segments.segment_boundaries``).
            None: no resets.
        keep_BT: False where the step is padding; the state does not change and the output is zeros. None: no padding.
        chunk: L, a power of two, used only by ``chunked``; None: a default for the platform.
        implementation: ``reference`` is a loop over steps. ``chunked`` is a loop over chunks; a triangular system and
            matmuls compute all steps of a chunk. For the backward pass, it saves the state before each chunk and
            recomputes everything else. None selects the fastest known implementation.

    Raises:
        ValueError: shapes that do not match, a chunk that is not a power of two, or an unknown implementation.

    Example:
        >>> key, value = jnp.ones((1, 3, 1, 1)), jnp.array([4.0, 8.0, 8.0]).reshape(1, 3, 1, 1)
        >>> gate = jnp.zeros((1, 3, 1))
        >>> out, state = gated_delta_rule(key, key, value, gate, gate + 0.5)
        >>> out.ravel().tolist(), state.ravel().tolist()
        ([2.0, 5.0, 6.5], [6.5])
    """
    _check(query_BTHK, key_BTHK, value_BTHV, log_decay_BTH, beta_BTH, state_BHKV, reset_BT, keep_BT)
    if chunk is not None and (chunk < 1 or chunk & (chunk - 1)):
        raise ValueError(f"chunk={chunk} must be a power of two, such as 32 or 64")
    T = query_BTHK.shape[1]
    if implementation is None:
        implementation = choices.gated_delta_rule(T)
    if implementation not in get_args(Implementation):
        choice = ", ".join(map(repr, get_args(Implementation)))
        raise ValueError(f"no gated_delta_rule implementation {implementation!r}: choose from {choice}")
    log_BTH1, beta_BTH1 = (x[..., None].astype(jnp.float32) for x in (log_decay_BTH, beta_BTH))
    if reset_BT is not None:
        log_BTH1 = jnp.where(reset_BT[:, :, None, None], -jnp.inf, log_BTH1)
    # The time axis is not sharded, because the steps are sequential.
    axes = ("batch", None, "heads", None)
    inputs = [sharding.constrain(x, axes) for x in (query_BTHK, key_BTHK, value_BTHV, log_BTH1, beta_BTH1)]
    if keep_BT is not None:
        inputs = [jnp.where(keep_BT[:, :, None, None], x, 0) for x in inputs]
    if state_BHKV is None:
        _, k, v, _, _ = inputs
        state_BHKV = jnp.zeros_like(k[:, 0, :, :, None] * v[:, 0, :, None, :], jnp.float32)
    if implementation == "reference":
        return _reference(inputs, state_BHKV.astype(jnp.float32))
    if chunk is None:
        chunk = choices.gated_delta_rule_chunk()
    return _chunked(inputs, state_BHKV.astype(jnp.float32), min(chunk, 1 << (T - 1).bit_length()))


def _check(
    query: jax.Array, key: jax.Array, value: jax.Array, log_decay: jax.Array, beta: jax.Array, state: Any, reset: Any,
    keep: Any,
) -> None:  # fmt: skip
    if query.ndim != 4 or key.shape != query.shape or value.shape[:-1] != query.shape[:-1] or not query.shape[1]:
        raise ValueError(
            f"query {list(query.shape)} and key {list(key.shape)} must both be [batch, time, heads, width], with at "
            f"least one step, and value {list(value.shape)} [batch, time, heads, value width]"
        )
    for name, x in (("log_decay", log_decay), ("beta", beta)):
        if x.shape != query.shape[:-1]:
            raise ValueError(f"{name} {list(x.shape)} must be [batch, time, heads], {list(query.shape[:-1])}")
    (B, T, H, K), V = query.shape, value.shape[-1]
    if state is not None and state.shape != (B, H, K, V):
        raise ValueError(f"state {list(state.shape)} must be [batch, heads, key width, value width], {[B, H, K, V]}")
    check_masks(reset, keep, (B, T), "query")


def _reference(inputs: Any, state_BHKV: jax.Array) -> tuple[jax.Array, jax.Array]:
    def step(state_BHKV: jax.Array, inputs: Any) -> Any:
        q_BHK, k_BHK, v_BHV, log_BH1, beta_BH1 = (x.astype(jnp.float32) for x in inputs)
        state_BHKV = jnp.exp(log_BH1)[..., None] * state_BHKV
        old_BHV = jnp.einsum("BHK,BHKV->BHV", k_BHK, state_BHKV)
        state_BHKV = state_BHKV + k_BHK[..., None] * (beta_BH1 * (v_BHV - old_BHV))[:, :, None, :]
        return state_BHKV, jnp.einsum("BHK,BHKV->BHV", q_BHK, state_BHKV).astype(inputs[2].dtype)

    state_BHKV, out_TBHV = lax.scan(step, state_BHKV, [jnp.swapaxes(x, 0, 1) for x in inputs])
    return jnp.swapaxes(out_TBHV, 0, 1), state_BHKV


# ------------------------------------------------------------------------------------------------------ chunked


def _chunked(inputs: Any, state_BHKV: jax.Array, L: int) -> tuple[jax.Array, jax.Array]:
    # The backward pass recomputes each chunk and differentiates it by autodiff, including the products of decays.
    # ``linear_attention`` instead computes the gradient of the decays as a difference of gradients of q and k. Here,
    # this difference would be inaccurate for strong decays.
    chunk = jax.checkpoint(_chunk, prevent_cse=False)
    chunks = [split_into_chunks(x, L) for x in inputs]
    state_BHKV, out_CBHLV = lax.scan(lambda state, inputs: chunk(state, *inputs), state_BHKV, chunks)
    return join_chunks(out_CBHLV, inputs[0].shape[1]), state_BHKV


def _chunk(
    state_BHKV: jax.Array,
    q_BHLK: jax.Array,
    k_BHLK: jax.Array,
    v_BHLV: jax.Array,
    log_BHL1: jax.Array,
    beta_BHL1: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The state after a chunk, and the outputs of its steps.

    The steps of the chunk are 1 to L. Let D(s, t) be the product of the decays of steps s + 1 to t, and S the state
    before the chunk. Let ``u_t = beta_t * (v_t - old value of k_t)``. Then the state after step t is
    ``D(0, t) * S + sum_{s <= t} D(s, t) * k_s u_s.T``, as in linear attention with the values u. The old value of k_t
    depends on all u_s with s < t. So the vectors u solve a triangular system (the UT transform of the paper, section
    3.3):

        u_t + beta_t * sum_{s < t} D(s, t) * (k_t @ k_s) * u_s = beta_t * (v_t - D(0, t) * k_t @ S)
    """
    dtype = v_BHLV.dtype
    decay_BHLM, prefix_BHL1, suffix_BHL1 = decay_products(jnp.exp(log_BHL1))

    def product(subscripts: str, *factors: jax.Array) -> jax.Array:
        return jnp.einsum(subscripts, *(x.astype(dtype) for x in factors), preferred_element_type=jnp.float32)

    overlap_BHLM = jnp.tril(beta_BHL1 * decay_BHLM * product("BHLK,BHMK->BHLM", k_BHLK, k_BHLK), -1)
    old_BHLV = product("BHLK,BHKV->BHLV", k_BHLK * prefix_BHL1, state_BHKV)
    new_BHLV = lax.linalg.triangular_solve(
        overlap_BHLM, beta_BHL1 * (v_BHLV.astype(jnp.float32) - old_BHLV), left_side=True, lower=True,
        unit_diagonal=True,
    )  # fmt: skip
    out_BHLV = product("BHLM,BHMV->BHLV", product("BHLK,BHMK->BHLM", q_BHLK, k_BHLK) * decay_BHLM, new_BHLV)
    out_BHLV += product("BHLK,BHKV->BHLV", q_BHLK * prefix_BHL1, state_BHKV)
    state_BHKV = prefix_BHL1[:, :, -1:] * state_BHKV + product("BHLK,BHLV->BHKV", k_BHLK * suffix_BHL1, new_BHLV)
    return state_BHKV, out_BHLV.astype(dtype)
