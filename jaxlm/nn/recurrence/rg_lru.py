"""The real-gated linear recurrent unit, RG-LRU (De et al. 2024, section 2.4). The state of a channel is one number.

    r_t = sigmoid(W_a x_t + b_a)                                recurrence gate (eq. 1)
    i_t = sigmoid(W_x x_t + b_x)                                input gate (eq. 2)
    a_t = exp(-8 * softplus(lambda) * r_t)                      decay (eq. 3)
    h_t = a_t * h_{t-1} + sqrt(1 - a_t^2) * (i_t * x_t)         state and output (eq. 4)

The matrices ``W_a`` and ``W_x`` are block diagonal. The paper writes eq. 3 with ``Lambda = -lambda``. Two details are
from the code of De et al. First, at the first step of a document, the previous state is 0 and the input scale is 1
instead of ``sqrt(1 - a_t^2)``. Second, the derivative of the square root is limited to 1000, because it is infinite at
``a_t = 1``.

Shapes: B batch, T time, W width, N blocks, P = W / N width of a block.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from jaxlm.nn.scan import linear_scan
from jaxlm.nn.scan.vector_state import Implementation
from jaxlm.nn.segments import check_masks
from jaxlm.spec import ZEROS, ArraySpec, Normal, Params, require_arrays

DECAY_EXPONENT = 8.0
"""The constant c of the paper: the decay is ``exp(-c * softplus(lambda) * r_t)``."""

MAX_SQRT_SLOPE = 1000.0
"""Upper bound of the derivative of ``sqrt(x)`` at ``x = 1 - a_t^2``."""


@dataclasses.dataclass(frozen=True)
class DecayInit:
    """Initializer of ``lambda``. With ``a = exp(-softplus(lambda))``, a^2 is uniform on [min_decay^2, max_decay^2).

    This is the initialization in the code of De et al. In the paper, a^8 is uniform on [0.9, 0.999].
    """

    min_decay: float = 0.9
    max_decay: float = 0.999

    def __call__(self, key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
        square = jax.random.uniform(key, shape, dtype, self.min_decay**2, self.max_decay**2)
        return jnp.log(jnp.expm1(-0.5 * jnp.log(square)))


def rg_lru_specs(width: int, num_blocks: int) -> dict[str, Any]:
    """Specs of ``recurrence_gate`` and ``input_gate`` (each weight [N, P, P], bias [N, P]), and of ``lambda`` [W].

    Raises:
        ValueError: ``num_blocks`` does not divide ``width``.

    Example:
        >>> rg_lru_specs(64, 4)["input_gate"]["weight"].shape
        (4, 16, 16)
    """
    if num_blocks < 1 or width % num_blocks:
        raise ValueError(f"num_blocks={num_blocks} must divide width={width}")
    size = width // num_blocks
    gate = {
        "weight": ArraySpec((num_blocks, size, size), ("heads", None, None), Normal(size**-0.5), decay=True),
        "bias": ArraySpec((num_blocks, size), ("heads", None), ZEROS),
    }
    return {"recurrence_gate": gate, "input_gate": gate, "lambda": ArraySpec((width,), ("mlp",), DecayInit())}


def rg_lru(
    params: Params,
    x_BTW: jax.Array,
    state_BW: jax.Array | None = None,
    *,
    reset_BT: jax.Array | None = None,
    keep_BT: jax.Array | None = None,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The state after each step, [B, T, W] in the dtype of ``x``, and the last state, [B, W] float32.

    The gates of all steps are computed at once. Then ``jaxlm.nn.scan.linear_scan`` computes the recurrence. The matmuls
    of the gates have inputs in the dtype of ``x``; everything else is float32.

    Args:
        params: see :func:`rg_lru_specs`.
        state_BW: the state before the first step. None: the first real step of each row starts a document.
        reset_BT: True at each step that starts a document (``segment_boundaries`` with ``include_first=True``). None:
            each row is one document. If ``state_BW`` is given, the row continues a document.
        keep_BT: False where the step is padding; the output is then the unchanged state. None: no padding.
        implementation: see ``linear_scan``.

    Raises:
        ValueError: shapes that do not match, an input without steps, a mask that is not boolean, or an implementation
            that is unknown or does not support the arguments.
    """
    require_arrays(x_BTW=x_BTW, state_BW=state_BW)
    W = params["lambda"].shape[0]
    if x_BTW.ndim != 3 or x_BTW.shape[-1] != W:
        raise ValueError(f"x {list(x_BTW.shape)} must be [batch, time, width] with the width {W} of the parameters")
    check_masks(reset_BT, keep_BT, x_BTW.shape[:2])
    if keep_BT is not None:  # a NaN input at padding would make the gradients of the gates' weights NaN
        x_BTW = jnp.where(keep_BT[:, :, None], x_BTW, 0)
    first_BT = _document_starts(x_BTW, state_BW, reset_BT, keep_BT)
    decay_BTW, input_BTW = _decay_and_input(params, x_BTW, first_BT[:, :, None])
    hidden_BTW, last_BW = linear_scan(
        decay_BTW, input_BTW, state_BW, reset_BT=reset_BT, keep_BT=keep_BT, implementation=implementation
    )
    return hidden_BTW.astype(x_BTW.dtype), last_BW


def _document_starts(x_BTW: jax.Array, state_BW: Any, reset_BT: Any, keep_BT: Any) -> jax.Array:
    """Whether each step is the first of a document, [B, T]."""
    starts_BT = jnp.zeros_like(x_BTW[:, :, 0], bool) if reset_BT is None else reset_BT
    if state_BW is not None:
        return starts_BT
    is_real_BT = jnp.ones_like(starts_BT) if keep_BT is None else keep_BT
    return starts_BT | (is_real_BT & (jnp.cumsum(is_real_BT, axis=1) == 1))


def _decay_and_input(params: Params, x: jax.Array, is_first: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The decay ``a`` and the scaled input ``sqrt(1 - a^2) * (i * x)`` of each step, [..., W] float32."""
    recurrence_gate, input_gate = (_gate(params[name], x) for name in ("recurrence_gate", "input_gate"))
    softplus = jnp.expand_dims(jax.nn.softplus(params["lambda"].astype(jnp.float32)), range(x.ndim - 1))
    log_decay = -DECAY_EXPONENT * softplus * recurrence_gate
    # With m = a - 1, 1 - a^2 = -m (2 + m). This form is accurate for decays near 1.
    decay_minus_one = jnp.expm1(log_decay)
    scale = jnp.where(is_first, 1.0, _sqrt(-decay_minus_one * (2.0 + decay_minus_one)))
    return 1.0 + decay_minus_one, scale * (input_gate * x.astype(jnp.float32))


def _gate(params: Params, x: jax.Array) -> jax.Array:
    """``sigmoid(x @ W + b)``, [..., W] float32, with the block-diagonal matrix W."""
    weight_NPP, bias_NP = params["weight"].astype(x.dtype), params["bias"].astype(jnp.float32)
    # On a CPU, dot_general with the blocks as the first axis is twice as fast as einsum, also in the backward pass.
    blocks = jnp.moveaxis(x.reshape(*x.shape[:-1], *bias_NP.shape), -2, 0)  # [N, ..., P]
    dimensions = (((x.ndim,), (1,)), ((0,), (0,)))
    product = lax.dot_general(blocks, weight_NPP, dimensions, preferred_element_type=jnp.float32)
    product = jnp.moveaxis(product, 0, -2)  # [..., N, P]
    return jax.nn.sigmoid(product + jnp.expand_dims(bias_NP, range(x.ndim - 1))).reshape(x.shape)


@jax.custom_jvp
def _sqrt(x: jax.Array) -> jax.Array:
    """The square root. Its derivative is limited to ``MAX_SQRT_SLOPE``."""
    return jnp.sqrt(x)


@_sqrt.defjvp
def _sqrt_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    root = jnp.sqrt(primals[0])
    return root, tangents[0] * 0.5 / jnp.maximum(root, 0.5 / MAX_SQRT_SLOPE)
