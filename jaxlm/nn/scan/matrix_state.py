"""Linear attention with decay: the recurrence ``S = decay * S + k v.T`` of a matrix S, with the output ``q @ S``.

With a decay of 1, the recurrence and the output are eq. 18 and 20 of Katharopoulos et al. 2020, but the output is not
divided by the normalizer (eq. 19). To compute the normalizer, add a channel of ones to the values. The output of this
channel is the normalizer.

Retention (Sun et al. 2023), Mamba-2 (Dao & Gu 2024) and mLSTM (Beck et al. 2024) use one decay per head; gated linear
attention (Yang et al. 2024) uses one decay per channel of the keys.

Shapes: B batch, T time, H heads, G groups of heads, R = H / G heads of a group, K width of queries and keys, V width of
values, L steps of a chunk (M: the same steps, on the axis of the keys), E = 1 or K decays per head, P pairs of blocks
of W steps (X: the same number, for the earlier block).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.nn import choices
from jaxlm.nn.scan import head_blocks, matrix_state_pallas, step_pallas
from jaxlm.nn.scan.chunks import per_head, prepare, product_in, scan_chunks, scan_steps
from jaxlm.nn.segments import Masks, check_masks, reset_state
from jaxlm.spec import require_arrays

_ImplementationName = Literal["reference", "chunked", "pallas"]


@dataclasses.dataclass(frozen=True)
class Chunked:
    """The implementation ``chunked`` with a given number of steps per chunk.

    Attributes:
        steps: L, a power of two.

    Raises:
        ValueError: ``steps`` is not a power of two.
    """

    steps: int

    def __post_init__(self) -> None:
        if type(self.steps) is not int or self.steps < 1 or self.steps & (self.steps - 1):
            raise ValueError(f"Chunked({self.steps!r}): the number of steps must be a power of two, such as 32 or 64")


Implementation = _ImplementationName | Chunked


def linear_attention(
    query_BTGK: jax.Array,
    key_BTGK: jax.Array,
    value_BTHV: jax.Array,
    log_decay: jax.Array,
    state_BHKV: jax.Array | None = None,
    *,
    scale_BTH: jax.Array | None = None,
    reset_BT: jax.Array | None = None,
    keep_BT: jax.Array | None = None,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The outputs ``q_t @ S_t`` with ``S_t = exp(log_decay_t) * S_{t-1} + scale_t * k_t v_t.T``, and the last state.

    The output is [B, T, H, V] in the dtype of the values; the state is [B, H, K, V] float32. Queries and keys are not
    scaled. Matmuls have inputs in the dtype of the values (``reference``: float32); everything else is float32.

    Args:
        query_BTGK, key_BTGK: with one decay per channel, G must be H. With one decay per head, G may be a divisor of H.
            Each query and key then belongs to H / G consecutive heads. The scores of a group are computed only once.
        log_decay: [B, T, H] (one per head) or [B, T, H, K] (one per channel of the keys). At most 0; -inf sets
            the old state of the head (or of the channel) to zeros if this state is finite.
        state_BHKV: the state before the first step; None: zeros.
        scale_BTH: the factor ``scale_t`` of each step and head; None: 1.
        reset_BT: True where the state is set to zeros before the step (``jaxlm.nn.segments.segment_boundaries``). The
            state before the step may be NaN. But ``chunked`` and ``pallas`` multiply the inputs of a chunk by each
            other. So a non-finite input before a reset can make the results after the reset NaN if both steps are in
            the same chunk. None: no resets.
        keep_BT: False where the step is padding; the state does not change and the output is zeros. None: no padding.
        implementation: ``reference`` is a loop over steps. ``chunked`` is a loop over chunks; matmuls compute all steps
            of a chunk, and the result is accurate for all decays. Its number of steps per chunk depends on the
            platform; ``jaxlm.nn.scan.Chunked(32)`` sets it to 32. ``pallas`` is a TPU kernel that computes chunks, for
            one decay per head (``jaxlm.nn.scan.matrix_state_pallas``). None selects the fastest known implementation.
            On a CPU, this may depend on whether the call is differentiated: ``reference`` if it is not, ``chunked`` if
            it is.

    Raises:
        ValueError: shapes that do not match, inputs without steps, a mask that is not boolean, an unknown
            implementation, or ``pallas`` on another platform or with arguments that it does not support.

    Example:
        >>> ones = jnp.ones((1, 3, 1, 1))
        >>> out, state = linear_attention(ones, ones, ones, jnp.log(0.5 * ones[..., 0]))
        >>> out.ravel().tolist(), state.ravel().tolist()
        ([1.0, 1.5, 1.75], [1.75])
    """
    check_inputs(query_BTGK, key_BTGK, value_BTHV, state_BHKV, reset_BT, keep_BT, shared_keys=True)
    require_arrays(log_decay=log_decay, scale_BTH=scale_BTH)
    (B, T, G, K), H = query_BTGK.shape, value_BTHV.shape[2]
    if H % G:
        raise ValueError(f"the number of heads of query and key, {G}, must divide the number of heads of value, {H}")
    if log_decay.shape not in ((B, T, H), (B, T, H, K)):
        raise ValueError(
            f"log_decay {list(log_decay.shape)} must be {[B, T, H]}, one for each head, or "
            f"{[B, T, H, K]}, one for each channel of the keys"
        )
    if log_decay.ndim == 4 and G != H:
        raise ValueError(
            f"log_decay {list(log_decay.shape)} has one decay per channel, which needs queries and keys for each head: "
            f"repeat the {G} heads of query and key {H // G} times"
        )
    if scale_BTH is not None and scale_BTH.shape != (B, T, H):
        raise ValueError(f"scale {list(scale_BTH.shape)} must be {[B, T, H]}, one for each head")
    per_channel = "supports one decay per head, not one per channel" if log_decay.ndim == 4 else None
    unsupported = per_channel or head_blocks.unsupported_reason(query_BTGK, value_BTHV)
    is_default = implementation is None
    default_chunk = choices.linear_attention_chunk()
    implementation = choose_implementation("linear_attention", implementation, T, default_chunk, unsupported)
    log_BTHE = log_decay.astype(jnp.float32)
    log_BTHE = log_BTHE[..., None] if log_decay.ndim == 3 else log_BTHE
    if reset_BT is not None and implementation != "pallas":
        log_BTHE = jnp.where(reset_BT[:, :, None, None], -jnp.inf, log_BTHE)
    scale_BTH1 = jnp.ones_like(log_BTHE[..., :1]) if scale_BTH is None else scale_BTH.astype(jnp.float32)[..., None]
    inputs, state_BHKV, reset_BT = prepare(
        (query_BTGK, key_BTGK, value_BTHV, log_BTHE, scale_BTH1), state_BHKV, reset_BT, keep_BT
    )
    if scale_BTH is None and implementation != "pallas":
        inputs.pop()  # the scales of 1, which only the kernel needs
    # Here, autodiff differentiates the products of decays. The kernels of ``pallas`` compute the gradient of a log
    # decay from differences of two inner products (see Yang et al. 2024, section 4.3). For a decay near 0, the rounding
    # errors of these differences are large relative to the gradient.
    step, run_chunk = (functools.partial(function, jnp.exp) for function in (decay_step, decay_chunk))
    rule = Rule(step, run_chunk, matrix_state_pallas.KERNELS, has_faster_steps=is_default)
    return run_rule(rule, implementation, inputs, state_BHKV, reset_BT)


class Rule(NamedTuple):
    """The functions of a recurrence whose state is a matrix.

    Attributes:
        step: see :func:`jaxlm.nn.scan.chunks.scan_steps`.
        run_chunk: see :func:`jaxlm.nn.scan.chunks.scan_chunks`.
        kernels: the TPU kernels of ``pallas``; None: there are none.
        has_faster_steps: whether ``jaxlm.nn.scan.step_pallas`` may compute a single step, and whether a call that is
            not differentiated may run as a loop over steps instead of chunks. False if the caller chose the
            implementation.
    """

    step: Callable[..., Any]
    run_chunk: Callable[..., Any]
    kernels: head_blocks.Kernels | None = None
    has_faster_steps: bool = False


def run_rule(
    rule: Rule, implementation: Literal["reference", "pallas"] | Chunked, inputs: Sequence[jax.Array],
    state_BHKV: jax.Array, reset_BT: jax.Array | None,
) -> Any:  # fmt: skip
    """The outputs [B, T, H, V] and the last state.

    Args:
        implementation: from :func:`choose_implementation`.
        inputs, state_BHKV, reset_BT: from :func:`jaxlm.nn.scan.chunks.prepare`. The first inputs are queries, keys,
            values, and the numbers from which the rule computes the decays (such as log decays), one per head or per
            channel.
    """
    query, _, value, decay = inputs[:4]
    if isinstance(implementation, Chunked):
        may_loop = rule.has_faster_steps and choices.loops_without_gradient(
            query.shape[3], state_BHKV.size, per_channel=decay.shape[3] > 1
        )
        step = rule.step if may_loop else None
        return scan_chunks(rule.run_chunk, inputs, state_BHKV, reset_BT, implementation.steps, step)
    if implementation == "pallas":
        assert rule.kernels is not None
        return head_blocks.run(rule.kernels, inputs, state_BHKV, reset_BT)
    if rule.has_faster_steps and step_pallas.supports(query, value):
        return step_pallas.run(rule.step, inputs, state_BHKV, reset_BT)
    return scan_steps(rule.step, inputs, state_BHKV, reset_BT)


def choose_implementation(
    name: str, implementation: Implementation | None, steps: int, default_chunk: int, unsupported: str | None
) -> Literal["reference", "pallas"] | Chunked:
    """The implementation of the function ``name``: the given one, or the fastest known one if ``implementation`` is
    None. ``chunked`` is returned as ``Chunked(default_chunk)``.

    Args:
        steps: T, the number of steps.
        default_chunk: the number of steps of a chunk if the caller did not choose it.
        unsupported: why ``pallas`` does not support the arguments, as a part of an error message; None if it supports
            them.

    Raises:
        ValueError: an unknown implementation, or ``pallas`` on another platform or with arguments that it does not
            support.
    """
    if isinstance(implementation, Chunked):
        return implementation
    if isinstance(implementation, int):
        raise ValueError(
            f"{name} implementation {implementation}: for chunks of this size, write Chunked({implementation})"
        )
    choices.check_implementation(name, implementation, _ImplementationName, {"pallas": unsupported})
    chosen = implementation or choices.matrix_scan(steps, unsupported)
    return Chunked(default_chunk) if chosen == "chunked" else chosen


def check_inputs(
    query: jax.Array, key: jax.Array, value: jax.Array, state: Any, reset: Any, keep: Any, *, shared_keys: bool = False
) -> None:
    """Check queries and keys [B, T, H, K], values [B, T, H, V], the state [B, H, K, V] and the masks [B, T].

    T must be at least 1. The state and the masks may be None. With ``shared_keys``, the number of heads of queries and
    keys may differ from the number of heads of the values.

    Raises:
        ValueError: an array has another shape, or a mask is not boolean.
        TypeError: an argument is not an array.
    """
    require_arrays(query=query, key=key, value=value, state=state)
    num_equal_axes = 2 if shared_keys else 3
    if (
        (query.ndim, value.ndim) != (4, 4)
        or key.shape != query.shape
        or value.shape[:num_equal_axes] != query.shape[:num_equal_axes]
        or not all(query.shape[1:3])
    ):
        raise ValueError(
            f"query {list(query.shape)} and key {list(key.shape)} must both be [batch, time, heads, width], with at "
            f"least one step and one head, and value {list(value.shape)} must be [batch, time, heads, value width]"
        )
    (B, T, _, K), (H, V) = query.shape, value.shape[2:]
    if state is not None and state.shape != (B, H, K, V):
        raise ValueError(f"state {list(state.shape)} must be [batch, heads, key width, value width], {[B, H, K, V]}")
    check_masks(reset, keep, (B, T), "query")


def check_per_head(query_BTHK: jax.Array, **arrays: jax.Array) -> None:
    """Raise ``ValueError`` if one of the named arrays is not [B, T, H]."""
    require_arrays(**arrays)
    for name, x in arrays.items():
        if x.shape != query_BTHK.shape[:-1]:
            raise ValueError(f"{name} {list(x.shape)} must be [batch, time, heads], {list(query_BTHK.shape[:-1])}")


def _scaled(k_BG: jax.Array, v_BH: jax.Array, scale_BH: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Keys and values in float32. Either the keys or the values are multiplied by the scale.

    The keys are multiplied if each head has its own keys, otherwise the values. Scaled keys are more accurate for
    mLSTM: its numerator and its normalizer then have the same rounding errors.
    """
    k_BG, v_BH = k_BG.astype(jnp.float32), v_BH.astype(jnp.float32)
    if scale_BH is None:
        return k_BG, v_BH
    return (scale_BH * k_BG, v_BH) if k_BG.shape[1] == v_BH.shape[1] else (k_BG, scale_BH * v_BH)


def decay_step(
    to_decay: Callable[[jax.Array], jax.Array],
    state_BHKV: jax.Array,
    mask: Masks,
    q_BGK: jax.Array,
    k_BGK: jax.Array,
    v_BHV: jax.Array,
    gate_BHE: jax.Array,
    scale_BH1: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The state after a step, and its output in the dtype of the value. The decay is ``to_decay(gate)``."""
    q, k, v = (per_head(x, v_BHV.shape[1]) for x in (q_BGK.astype(jnp.float32), *_scaled(k_BGK, v_BHV, scale_BH1)))
    state_BHKV = to_decay(gate_BHE)[..., None] * reset_state(mask, state_BHKV) + k[..., None] * v[:, :, None, :]
    return state_BHKV, jnp.einsum("BHK,BHKV->BHV", q, state_BHKV).astype(v_BHV.dtype)


# ------------------------------------------------------------------------------------------------------ chunked


def decay_chunk(
    to_decay: Callable[[jax.Array], jax.Array],
    state_BHKV: jax.Array,
    q_BGLK: jax.Array,
    k_BGLK: jax.Array,
    v_BHLV: jax.Array,
    gate_BHLE: jax.Array,
    scale_BHL1: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The state after a chunk, and the outputs of its steps in the dtype of the values. Decays are ``to_decay(gate)``.

    Let D(s, t) be the product of the decays of steps s + 1 to t, and S the state before the chunk (after step 0). Then
    the output of step t is ``q_t @ (D(0, t) * S + sum_{s <= t} D(s, t) * scale_s * k_s v_s.T)``. The state after the
    chunk is the expression in parentheses for t = L. Decays must be in [-1, 1] (``ssd`` can have negative decays). The
    decays are multiplied and never divided, so no product has a magnitude above 1.
    """
    dtype = v_BHLV.dtype
    product = product_in(dtype)
    # With float32 queries, keys and values, autodiff sums their gradients in float32.
    q_BGLK = q_BGLK.astype(jnp.float32)
    k_BGLK, v_BHLV = _scaled(k_BGLK, v_BHLV, scale_BHL1)
    decay_BHLE = to_decay(gate_BHLE)
    if decay_BHLE.shape[-1] == 1:  # one decay per head: multiply scores and values by decays, instead of q and k

        def split_groups(x_BHXV: jax.Array) -> jax.Array:
            B, H, X, V = x_BHXV.shape
            G = q_BGLK.shape[1]
            return x_BHXV.reshape(B, G, H // G, X, V)

        decay_BHLM, prefix_BHLE, suffix_BHLE = decay_products(decay_BHLE)
        scores_BHLM = per_head(product("BGLK,BGMK->BGLM", q_BGLK, k_BGLK), v_BHLV.shape[1]) * decay_BHLM
        from_state_BHLV = (
            product("BGLK,BGRKV->BGRLV", q_BGLK, split_groups(state_BHKV)).reshape(v_BHLV.shape) * prefix_BHLE
        )
        new_BHKV = product("BGLK,BGRLV->BGRKV", k_BGLK, split_groups(v_BHLV * suffix_BHLE)).reshape(state_BHKV.shape)
    else:

        def pair_scores(later: jax.Array, earlier: jax.Array) -> jax.Array:
            size = later.shape[3]
            q_BHPWK, k_BHPXK = block_pairs(q_BGLK, size)[1], block_pairs(k_BGLK, size)[0]
            return product("BHPWK,BHPXK->BHPWX", q_BHPWK * later, k_BHPXK * earlier)

        diagonal_BHL = jnp.sum(q_BGLK * k_BGLK, axis=-1)
        scores_BHLM, prefix_BHLE, suffix_BHLE = pair_scores_and_decays(decay_BHLE, diagonal_BHL, pair_scores)
        from_state_BHLV = product("BHLK,BHKV->BHLV", q_BGLK * prefix_BHLE, state_BHKV)
        new_BHKV = product("BHLK,BHLV->BHKV", k_BGLK * suffix_BHLE, v_BHLV)
    out_BHLV = product("BHLM,BHMV->BHLV", scores_BHLM, v_BHLV) + from_state_BHLV
    total_BHE1 = jnp.swapaxes(prefix_BHLE[:, :, -1:], 2, 3)
    return total_BHE1 * state_BHKV + new_BHKV, out_BHLV.astype(dtype)


def decay_products(decay_BHL1: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Products of the decays of a chunk, for one decay per head. Nothing is divided by a decay, so a decay may be 0.

    Returns:
        For steps t and s, the product of the decays of steps s + 1 to t, [B, H, L, L], which is 0 for s > t; the
        product of all decays up to and including each step [B, H, L, 1]; and the product of all decays after each step
        [B, H, L, 1].
    """

    def pair_scores(later: jax.Array, earlier: jax.Array) -> jax.Array:
        return later * jnp.swapaxes(earlier, -1, -2)

    diagonal_BHL = jnp.ones_like(decay_BHL1[..., 0])  # ones_like keeps the sharding
    return pair_scores_and_decays(decay_BHL1, diagonal_BHL, pair_scores)


def pair_scores_and_decays(
    decay_BHLE: jax.Array, diagonal_BHL: jax.Array, pair_scores: Callable[[jax.Array, jax.Array], jax.Array]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The scores of all pairs of steps of a chunk, and the products of the decays up to each step and after each step.

    Blocks of 1, 2, 4, ... steps are joined in pairs. For step s of the earlier block and step t of the later block, the
    product of the decays of steps s + 1 to t is ``later[t] * earlier[s]``. ``later[t]`` is the product of the decays of
    the later block up to and including t. ``earlier[s]`` is the product of the decays of the earlier block after s. The
    method divides no products: a quotient could overflow.

    Args:
        diagonal_BHL: the score of each step with itself; [B, H, L, N] if ``pair_scores`` returns N score matrices, as
            in the generalized delta rule.
        pair_scores: ``pair_scores(later, earlier)``, with arguments [B, H, P, W, E], returns the scores of the steps of
            the later block (axis -2) with the steps of the earlier block (axis -1) for each of P pairs of blocks:
            [B, H, P, W, X], or [B, H, P, N, W, X] for N score matrices.

    Returns:
        The scores [B, H, L, L] or [B, H, N, L, L], which are 0 for keys of later steps; the product of all decays up
        to and including each step [B, H, L, E]; and the product of all decays after each step [B, H, L, E].
    """
    B, H, L, E = decay_BHLE.shape
    prefix, scores = decay_BHLE[:, :, :, None], diagonal_BHL[..., None, None]
    suffix = jnp.ones_like(prefix)
    for size in (1 << power for power in range(L.bit_length() - 1)):
        prefix_pairs, suffix_pairs = (x.reshape(B, H, L // (2 * size), 2, size, E) for x in (prefix, suffix))
        lower = pair_scores(prefix_pairs[:, :, :, 1], suffix_pairs[:, :, :, 0])
        upper = jnp.zeros_like(lower)
        rows = [jnp.concatenate(row, axis=-1) for row in ((scores[:, :, 0::2], upper), (lower, scores[:, :, 1::2]))]
        scores = jnp.concatenate(rows, axis=-2)
        (first, second), (first_suffix, second_suffix) = (
            (x[:, :, :, 0], x[:, :, :, 1]) for x in (prefix_pairs, suffix_pairs)
        )
        prefix = jnp.concatenate([first, first[..., -1:, :] * second], axis=-2)
        suffix = jnp.concatenate([second[..., -1:, :] * first_suffix, second_suffix], axis=-2)
    return scores[:, :, 0], prefix[:, :, 0], suffix[:, :, 0]


def block_pairs(x_BHLK: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """The earlier and the later block of each pair of blocks of W = ``size`` steps, [B, H, P, W, K] each."""
    B, H, L, K = x_BHLK.shape
    pairs = x_BHLK.reshape(B, H, L // (2 * size), 2, size, K)
    return pairs[:, :, :, 0], pairs[:, :, :, 1]
