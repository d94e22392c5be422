"""Attention by cuDNN, through ``jax.nn.dot_product_attention``: fused, O(T) memory, half precision, NVIDIA GPUs."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxlm.nn.mask import Mask

DTYPES = (jnp.bfloat16, jnp.float16)


def refusal(mask: Mask, dtype: Any, bias: Any, key: jax.Array | None) -> str | None:
    """Why cuDNN cannot do this, as the end of a sentence, or None."""
    if jnp.dtype(dtype) not in [jnp.dtype(one) for one in DTYPES]:
        return f"takes bfloat16 and float16, not {jnp.dtype(dtype).name}"
    if bias is not None:
        return "takes no bias"
    if key is not None:
        return "drops nothing: its mask would not be that of the other implementations"
    if mask.query_order is not None or mask.query_segments is not None:
        return "takes neither orders nor segments: as a mask they would be a dense array"
    return None


def attention(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    mask: Mask,
    *,
    scale: float,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> jax.Array:
    """See ``jaxlm.nn.attention.attention``; ``xla`` is what the same call means on any device."""
    window = None if mask.window is None else (mask.window - 1, 0)
    return jax.nn.dot_product_attention(
        q_BTHK, k_BSGK, v_BSGK, scale=scale, is_causal=mask.causal, local_window_size=window,
        implementation=implementation,
    )  # fmt: skip
