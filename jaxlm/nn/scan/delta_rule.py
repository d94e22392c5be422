"""Delta rules. Their state S is a matrix [K, V] that maps keys to values. The output of a step is ``q_t @ S_t``.

The gated delta rule (Yang, Kautz and Hatamizadeh 2024, eq. 10) has one decay per head:

    S_t = exp(g_t) * (I - beta_t k_t k_t.T) @ S_{t-1} + beta_t k_t v_t.T

A step first decays the state. Then it changes the value that the key k_t reads from the state. For a key of length 1,
the old value ``k_t @ S`` becomes ``(1 - beta_t) * old value + beta_t * v_t``. With ``g = 0``, this is the delta rule
(Schlag et al. 2021; Yang et al. 2024). For keys of length 1, the eigenvalues of ``I - beta k k.T`` are 1 and
``1 - beta``. With beta in [0, 2], they are in [-1, 1], so that this matrix does not enlarge the state (Grazzi et al.
2025).

The generalized delta rule (Peng et al. 2025, RWKV-7) has one decay per channel of the keys. A step decays the state. It
also reads a value ``a_t @ S_{t-1}``, writes this value with the key b_t, and writes the new value v_t with the key k_t:

    S_t = (diag(exp(g_t)) + b_t a_t.T) @ S_{t-1} + k_t v_t.T

The gated delta rule is a special case: ``a = -k``, ``b = exp(g) * beta * k``, and the key of the new value is
``beta * k``. RWKV-7 has ``a = -c`` and ``b = rate * c`` with a vector c of length 1 and a rate in [0, 1] for each
channel. The papers use the transposed state.

Shapes: B batch, T time, H heads, K width of queries and keys, V width of values, C chunks, L steps of a chunk (M: the
same steps, on the axis of the keys), P pairs of blocks of S steps (R: the steps of the earlier block), N score
matrices.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxlm.nn import choices
from jaxlm.nn.scan import chunks, delta_rule_pallas, generalized_delta_rule_pallas, head_blocks
from jaxlm.nn.scan.matrix_state import (
    Chunked,
    Implementation,
    Rule,
    block_pairs,
    check_inputs,
    check_per_head,
    choose_implementation,
    decay_products,
    pair_scores_and_decays,
    run_rule,
)
from jaxlm.nn.scan.triangular import solve_unit_lower
from jaxlm.nn.segments import Masks, reset_state
from jaxlm.spec import require_arrays

MAX_CHUNK_DECAY = 60.0
"""Maximum absolute sum of the log decays of a chunk for which :func:`_bounded_scores` is used. The largest factor there
is the exponential of half of this number."""


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
    implementation: Implementation | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The outputs ``q_t @ S_t`` of the gated delta rule (equations: see the module), and the last state.

    The output is [B, T, H, V] in the dtype of the values; the state is [B, H, K, V] float32. Queries and keys are
    neither scaled nor normalized. ``reference`` computes in float32. In the other implementations, matmuls have inputs
    in the dtype of the values, and everything else is float32. The triangular system is also float32; if the values are
    bfloat16, ``pallas`` solves it with matmuls whose relative error is about 1e-5.

    Args:
        key_BTHK: keys, usually of length 1. If ``beta * |k|**2`` exceeds 2, the state can grow exponentially.
        log_decay_BTH: g, at most 0; -inf sets a finite old state to zeros.
        beta_BTH: the weight of the new value, in [0, 2].
        state_BHKV: the state before the first step; None: zeros.
        reset_BT: True where the state is set to zeros before the step (``jaxlm.nn.segments.segment_boundaries``), even
            if it is NaN; see ``linear_attention`` for non-finite inputs. None: no resets.
        keep_BT: False where the step is padding; the state does not change and the output is zeros. None: no padding.
        implementation: ``reference`` is a loop over steps. ``chunked`` is a loop over chunks; a triangular system and
            matmuls compute all steps of a chunk. Its number of steps per chunk depends on the platform;
            ``jaxlm.nn.scan.Chunked(32)`` sets it to 32. The forward pass saves the inputs and the state before each
            chunk, and the backward pass recomputes everything else. ``pallas`` is a TPU kernel that computes chunks
            (``jaxlm.nn.scan.delta_rule_pallas``). None selects the fastest known implementation.

    Raises:
        ValueError: shapes that do not match, inputs without steps, a mask that is not boolean, an unknown
            implementation, or ``pallas`` on another platform or with arguments that it does not support.

    Example:
        >>> key, value = jnp.ones((1, 3, 1, 1)), jnp.array([4.0, 8.0, 8.0]).reshape(1, 3, 1, 1)
        >>> gate = jnp.zeros((1, 3, 1))
        >>> out, state = gated_delta_rule(key, key, value, gate, gate + 0.5)
        >>> out.ravel().tolist(), state.ravel().tolist()
        ([2.0, 5.0, 6.5], [6.5])
    """
    check_inputs(query_BTHK, key_BTHK, value_BTHV, state_BHKV, reset_BT, keep_BT)
    check_per_head(query_BTHK, log_decay=log_decay_BTH, beta=beta_BTH)
    unsupported = head_blocks.unsupported_reason(query_BTHK, value_BTHV)
    T = query_BTHK.shape[1]
    default_chunk = choices.gated_delta_rule_chunk()
    implementation = choose_implementation("gated_delta_rule", implementation, T, default_chunk, unsupported)
    log_BTH1, beta_BTH1 = (x[..., None].astype(jnp.float32) for x in (log_decay_BTH, beta_BTH))
    if reset_BT is not None and implementation != "pallas":
        log_BTH1 = jnp.where(reset_BT[:, :, None, None], -jnp.inf, log_BTH1)
    inputs, state_BHKV, reset_BT = chunks.prepare(
        (query_BTHK, key_BTHK, value_BTHV, log_BTH1, beta_BTH1), state_BHKV, reset_BT, keep_BT
    )
    rule = Rule(_gated_step, _gated_chunk, delta_rule_pallas.KERNELS)
    return run_rule(rule, implementation, inputs, state_BHKV, reset_BT)


def generalized_delta_rule(
    query_BTHK: jax.Array,
    key_BTHK: jax.Array,
    value_BTHV: jax.Array,
    log_decay_BTHK: jax.Array,
    low_rank: tuple[jax.Array, jax.Array],
    state_BHKV: jax.Array | None = None,
    *,
    reset_BT: jax.Array | None = None,
    keep_BT: jax.Array | None = None,
    min_log_decay: float | None = None,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The outputs ``q_t @ S_t`` of the generalized delta rule (equations: see the module), and the last state.

    Shapes and dtypes of the results are as in :func:`gated_delta_rule`. If g, a and b are constant and an eigenvalue of
    ``diag(exp(g)) + b a.T`` has a magnitude above 1, the state can grow exponentially.

    Args:
        log_decay_BTHK: g, at most 0. With -inf, the decay of the channel is 0, but ``a`` still reads the old state of
            the channel. To reset the state, use ``reset_BT``.
        low_rank: the vectors a and b, [B, T, H, K] each. A step reads the value ``a_t @ S_{t-1}`` from the state and
            adds ``b_t (a_t @ S_{t-1}).T`` to it.
        min_log_decay: a lower bound of the log decays, at most 0; None: no bound. With a bound, ``chunked`` needs fewer
            operations, but only if ``-min_log_decay`` times the number of steps of a chunk is at most 60
            (``MAX_CHUNK_DECAY``) and the values are not float16. Results may be wrong, NaN or infinite if a log decay
            is far below the bound. ``pallas`` has chunks of 64 steps and needs a bound of at least -0.9375.
        state_BHKV, reset_BT, keep_BT, implementation: see :func:`gated_delta_rule`. On a CPU, if ``implementation`` is
            None, a call that is not differentiated runs as ``reference``, and a call that is differentiated runs as
            ``chunked`` (with fewer than 8 steps as ``reference``).

    Raises:
        ValueError: shapes that do not match, inputs without steps, a mask that is not boolean, a positive
            ``min_log_decay``, ``low_rank`` that is not a tuple of two, an unknown implementation, or ``pallas`` on
            another platform or with arguments that it does not support.

    Example:
        >>> key, value = jnp.ones((1, 3, 1, 1)), jnp.array([4.0, 8.0, 8.0]).reshape(1, 3, 1, 1)
        >>> out, state = generalized_delta_rule(key, key, value, 0 * key, (-key, 0.5 * key))
        >>> out.ravel().tolist(), state.ravel().tolist()
        ([4.0, 10.0, 13.0], [13.0])
    """
    check_inputs(query_BTHK, key_BTHK, value_BTHV, state_BHKV, reset_BT, keep_BT)
    if not isinstance(low_rank, tuple) or len(low_rank) != 2:
        got = f"a tuple of {len(low_rank)}" if isinstance(low_rank, tuple) else type(low_rank).__name__
        raise ValueError(f"low_rank must be the tuple (a, b) of two arrays, not {got}")
    a_BTHK, b_BTHK = low_rank
    named_arrays = {"log_decay": log_decay_BTHK, "a": a_BTHK, "b": b_BTHK}
    require_arrays(**named_arrays)
    for name, x in named_arrays.items():
        if x.shape != query_BTHK.shape:
            raise ValueError(f"{name} {list(x.shape)} must have the shape of the query, {list(query_BTHK.shape)}")
    if min_log_decay is not None and not min_log_decay <= 0.0:
        raise ValueError(f"min_log_decay={min_log_decay} must be at most 0: log decays are at most 0")

    def is_bounded(steps: int) -> bool:
        """Whether :func:`_bounded_scores` can compute chunks of this size. Its factors would overflow in float16."""
        if min_log_decay is None or value_BTHV.dtype == jnp.float16:
            return False
        return -min_log_decay * steps <= MAX_CHUNK_DECAY

    is_default, T = implementation is None, query_BTHK.shape[1]
    default_chunk = choices.generalized_delta_rule_chunk(is_bounded)
    kernel_chunk = generalized_delta_rule_pallas.CHUNK
    unsupported = head_blocks.unsupported_reason(query_BTHK, value_BTHV, generalized_delta_rule_pallas.vmem_bytes)
    if unsupported is None and not is_bounded(kernel_chunk):
        unsupported = f"needs a min_log_decay of at least {-MAX_CHUNK_DECAY / kernel_chunk:g}, not {min_log_decay}"
    implementation = choose_implementation("generalized_delta_rule", implementation, T, default_chunk, unsupported)
    arrays = query_BTHK, key_BTHK, value_BTHV, log_decay_BTHK, a_BTHK, b_BTHK
    if implementation == "pallas":
        return generalized_delta_rule_pallas.run(arrays, state_BHKV, reset_BT, keep_BT)
    log_BTHK = log_decay_BTHK.astype(jnp.float32)
    if reset_BT is not None:
        log_BTHK = jnp.where(reset_BT[:, :, None, None], -jnp.inf, log_BTHK)
        a_BTHK = jnp.where(reset_BT[:, :, None, None], 0, a_BTHK)
    arrays = query_BTHK, key_BTHK, value_BTHV, log_BTHK, a_BTHK, b_BTHK
    inputs, state_BHKV, reset_BT = chunks.prepare(arrays, state_BHKV, reset_BT, keep_BT)
    scores = _bounded_scores if isinstance(implementation, Chunked) and is_bounded(implementation.steps) else _scores
    rule = Rule(_generalized_step, functools.partial(_generalized_chunk, scores), has_faster_steps=is_default)
    return run_rule(rule, implementation, inputs, state_BHKV, reset_BT)


# ---------------------------------------------------------------------------------------------- gated delta rule


def _gated_step(state_BHKV: jax.Array, mask: Masks, *inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
    q_BHK, k_BHK, v_BHV, log_BH1, beta_BH1 = (x.astype(jnp.float32) for x in inputs)
    state_BHKV = jnp.exp(log_BH1)[..., None] * reset_state(mask, state_BHKV)
    old_BHV = jnp.einsum("BHK,BHKV->BHV", k_BHK, state_BHKV)
    state_BHKV = state_BHKV + k_BHK[..., None] * (beta_BH1 * (v_BHV - old_BHV))[:, :, None, :]
    return state_BHKV, jnp.einsum("BHK,BHKV->BHV", q_BHK, state_BHKV).astype(inputs[2].dtype)


def _gated_chunk(
    state_BHKV: jax.Array,
    q_BHLK: jax.Array,
    k_BHLK: jax.Array,
    v_BHLV: jax.Array,
    log_BHL1: jax.Array,
    beta_BHL1: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The state after a chunk, and the outputs of its steps.

    The steps of the chunk are 1 to L. Let D(s, t) be the product of the decays of steps s + 1 to t, and S the state
    before the chunk. Let ``u_t = beta_t * (v_t - old_t)``, where old_t is the value that k_t reads from the decayed
    state before step t. Then the state after step t is ``D(0, t) * S + sum_{s <= t} D(s, t) * k_s u_s.T``, as in linear
    attention with the values u. old_t depends on all u_s with s < t. So the vectors u solve a triangular system (the UT
    transform of Yang, Kautz and Hatamizadeh 2024, section 3.3):

        u_t + beta_t * sum_{s < t} D(s, t) * (k_t @ k_s) * u_s = beta_t * (v_t - D(0, t) * k_t @ S)
    """
    product = chunks.product_in(v_BHLV.dtype)
    decay_BHLM, prefix_BHL1, suffix_BHL1 = decay_products(jnp.exp(log_BHL1))
    lower_BHLM = jnp.tril(beta_BHL1 * decay_BHLM * product("BHLK,BHMK->BHLM", k_BHLK, k_BHLK), -1)
    from_state_BHLV = product("BHLK,BHKV->BHLV", k_BHLK * prefix_BHL1, state_BHKV)
    u_BHLV = solve_unit_lower(lower_BHLM, beta_BHL1 * (v_BHLV.astype(jnp.float32) - from_state_BHLV))
    out_BHLV = product("BHLM,BHMV->BHLV", product("BHLK,BHMK->BHLM", q_BHLK, k_BHLK) * decay_BHLM, u_BHLV)
    out_BHLV += product("BHLK,BHKV->BHLV", q_BHLK * prefix_BHL1, state_BHKV)
    state_BHKV = prefix_BHL1[:, :, -1:] * state_BHKV + product("BHLK,BHLV->BHKV", k_BHLK * suffix_BHL1, u_BHLV)
    return state_BHKV, out_BHLV.astype(v_BHLV.dtype)


# ---------------------------------------------------------------------------------------- generalized delta rule


def _generalized_step(state_BHKV: jax.Array, mask: Masks, *inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
    q_BHK, k_BHK, v_BHV, log_BHK, a_BHK, b_BHK = (x.astype(jnp.float32) for x in inputs)
    # The reset is applied to the result of the matmul. If the matmul read the state after the reset, XLA would write
    # this state to memory before the matmul.
    old_BHV = reset_state(mask, jnp.einsum("BHK,BHKV->BHV", a_BHK, state_BHKV))
    state_BHKV = jnp.exp(log_BHK)[..., None] * reset_state(mask, state_BHKV) + b_BHK[..., None] * old_BHV[:, :, None]
    state_BHKV = state_BHKV + k_BHK[..., None] * v_BHV[:, :, None]
    return state_BHKV, jnp.einsum("BHK,BHKV->BHV", q_BHK, state_BHKV).astype(inputs[2].dtype)


def _generalized_chunk(
    scores: Callable[..., tuple[jax.Array, ...]],
    state_BHKV: jax.Array,
    q_BHLK: jax.Array,
    k_BHLK: jax.Array,
    v_BHLV: jax.Array,
    log_BHLK: jax.Array,
    a_BHLK: jax.Array,
    b_BHLK: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The state after a chunk, and the outputs of its steps.

    The steps of the chunk are 1 to L. Let D(s, t) be the products of the decays of steps s + 1 to t for each channel,
    and S the state before the chunk. Let ``u_t = a_t @ S_{t-1}``. Then the state after step t is
    ``D(0, t) * S + sum_{s <= t} (D(s, t) * b_s) u_s.T + (D(s, t) * k_s) v_s.T``. The vectors u solve a triangular
    system:

        u_t - sum_{s < t} (a_t @ (D(s, t-1) * b_s)) * u_s =
            (a_t * D(0, t-1)) @ S + sum_{s < t} (a_t @ (D(s, t-1) * k_s)) * v_s

    Args:
        scores: :func:`_scores` or :func:`_bounded_scores`.
    """
    dtype = v_BHLV.dtype
    product = chunks.product_in(dtype)
    qk_BHLM, qb_BHLM, ak_BHLM, ab_BHLM, prefix_BHLK, suffix_BHLK = scores(
        dtype, q_BHLK, k_BHLK, log_BHLK, a_BHLK, b_BHLK
    )
    prefix_before_BHLK = _shift_steps(prefix_BHLK, 1.0)
    right_BHLV = product("BHLK,BHKV->BHLV", a_BHLK * prefix_before_BHLK, state_BHKV)
    u_BHLV = solve_unit_lower(-ab_BHLM, right_BHLV + product("BHLM,BHMV->BHLV", ak_BHLM, v_BHLV))
    out_BHLV = product("BHLM,BHMV->BHLV", qk_BHLM, v_BHLV) + product("BHLM,BHMV->BHLV", qb_BHLM, u_BHLV)
    out_BHLV += product("BHLK,BHKV->BHLV", q_BHLK * prefix_BHLK, state_BHKV)
    state_BHKV = jnp.swapaxes(prefix_BHLK[:, :, -1:], 2, 3) * state_BHKV
    state_BHKV += product("BHLK,BHLV->BHKV", k_BHLK * suffix_BHLK, v_BHLV)
    state_BHKV += product("BHLK,BHLV->BHKV", b_BHLK * suffix_BHLK, u_BHLV)
    return state_BHKV, out_BHLV.astype(dtype)


def _scores(
    dtype: DTypeLike, q_BHLK: jax.Array, k_BHLK: jax.Array, log_BHLK: jax.Array, a_BHLK: jax.Array, b_BHLK: jax.Array
) -> tuple[jax.Array, ...]:
    """The scores of a chunk, for any log decays.

    a_t needs the decays D(s, t-1), and a query of step t - 1 needs the same decays. So the code uses ``a_{t+1}`` as a
    second query of step t, and then moves the scores of ``a_{t+1}`` from step t to step t + 1.

    Returns:
        ``q_t @ (D(s, t) * k_s)`` and ``q_t @ (D(s, t) * b_s)`` for s <= t; ``a_t @ (D(s, t-1) * k_s)`` and
        ``a_t @ (D(s, t-1) * b_s)`` for s < t, each [B, H, L, L] with zeros for other pairs; and D(0, t) and D(t, L),
        each [B, H, L, K].
    """
    product = chunks.product_in(dtype)
    queries = (q_BHLK, jnp.pad(a_BHLK[:, :, 1:], ((0, 0), (0, 0), (0, 1), (0, 0))))  # q_t and a_{t+1}
    keys = (k_BHLK, b_BHLK)

    # X is the axis of the two queries, Y the axis of the two keys.
    def pair_scores(later: jax.Array, earlier: jax.Array) -> jax.Array:
        size = later.shape[3]
        later_XBHPSK = jnp.stack([(block_pairs(x, size)[1] * later).astype(dtype) for x in queries])
        earlier_YBHPSK = jnp.stack([(block_pairs(x, size)[0] * earlier).astype(dtype) for x in keys])
        scores = product("XBHPSK,YBHPRK->BHPXYSR", later_XBHPSK, earlier_YBHPSK)
        return scores.reshape(*scores.shape[:3], 4, size, size)

    diagonal = [jnp.sum(q.astype(jnp.float32) * k.astype(jnp.float32), axis=-1) for q in queries for k in keys]
    scores_BHNLM, prefix_BHLK, suffix_BHLK = pair_scores_and_decays(
        jnp.exp(log_BHLK), jnp.stack(diagonal, axis=-1), pair_scores
    )
    qk_BHLM, qb_BHLM = scores_BHNLM[:, :, 0], scores_BHNLM[:, :, 1]
    ak_BHLM, ab_BHLM = (_shift_steps(scores_BHNLM[:, :, index]) for index in (2, 3))
    return qk_BHLM, qb_BHLM, ak_BHLM, ab_BHLM, prefix_BHLK, suffix_BHLK


def _bounded_scores(
    dtype: DTypeLike, q_BHLK: jax.Array, k_BHLK: jax.Array, log_BHLK: jax.Array, a_BHLK: jax.Array, b_BHLK: jax.Array
) -> tuple[jax.Array, ...]:
    """The results of :func:`_scores` for log decays whose sum is small enough (:data:`MAX_CHUNK_DECAY`).

    With the sums c_t of the log decays and the middle step m, ``D(s, t) = exp(c_t - c_m) * exp(c_m - c_s)``. The first
    factor multiplies the queries and the second one the keys. A reset is a log decay of -inf. It is not added to c_t.
    Instead, D(s, t) is set to zero if one of the steps s + 1 to t has a reset.
    """
    product = chunks.product_in(dtype)
    L = q_BHLK.shape[2]
    is_reset_BHL1 = jnp.isneginf(log_BHLK[..., :1])
    segment_BHL1 = jnp.cumsum(is_reset_BHL1, axis=2)  # the number of resets up to and including each step
    sums_BHLK = jnp.cumsum(jnp.where(is_reset_BHL1, 0.0, log_BHLK), axis=2)
    # D(s, t) does not depend on c_m. Without ``stop_gradient``, rounding errors would give the log decays of later
    # steps (t + 1 to m) a nonzero gradient.
    middle_BH1K = jax.lax.stop_gradient(sums_BHLK[:, :, (L - 1) // 2, None])
    earlier_BHLK = jnp.exp(middle_BH1K - sums_BHLK)
    queries = q_BHLK * jnp.exp(sums_BHLK - middle_BH1K), a_BHLK * jnp.exp(_shift_steps(sums_BHLK) - middle_BH1K)
    keys = k_BHLK * earlier_BHLK, b_BHLK * earlier_BHLK
    is_same_segment_BHLM = segment_BHL1 == segment_BHL1.mT
    scores = [
        jnp.tril(
            jnp.where(is_same_segment_BHLM, product("BHLK,BHMK->BHLM", query.astype(dtype), key.astype(dtype)), 0.0),
            diagonal,
        )
        for query, diagonal in zip(queries, (0, -1), strict=True)
        for key in keys
    ]
    prefix_BHLK = jnp.where(segment_BHL1 == 0, jnp.exp(sums_BHLK), 0.0)
    suffix_BHLK = jnp.where(segment_BHL1 == segment_BHL1[:, :, -1:], jnp.exp(sums_BHLK[:, :, -1:] - sums_BHLK), 0.0)
    return (*scores, prefix_BHLK, suffix_BHLK)


def _shift_steps(x_BHLX: jax.Array, first: float = 0.0) -> jax.Array:
    """``x`` shifted by one step: step t has the value of step t - 1, and the first step has the value ``first``."""
    return jnp.concatenate([jnp.full_like(x_BHLX[:, :, :1], first), x_BHLX[:, :, :-1]], axis=2)
