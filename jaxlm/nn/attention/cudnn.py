"""Fused attention by cuDNN (``jax.nn.dot_product_attention``): O(T) memory, half precision, NVIDIA GPUs only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxlm import sharding
from jaxlm.nn.attention import split
from jaxlm.nn.attention.mask import Mask

DTYPES = (jnp.bfloat16, jnp.float16)
MAX_HEAD_WIDTH = 128
"""The largest width of a head that JAX supports on every GPU with cuDNN attention."""

MIN_COMPUTE_CAPABILITY = 8
"""cuDNN attention needs an Ampere GPU or a later one: compute capability 8.0."""


def unsupported_reason(
    mask: Mask, dtype: DTypeLike, head_width: int, value_width: int, biases: Sequence[Any], key: jax.Array | None
) -> str | None:
    """Why cuDNN attention cannot run with the arguments, the GPU and the mesh, as a part of an error message.

    None if it can run.
    """
    if jnp.dtype(dtype) not in DTYPES:
        return f"takes bfloat16 and float16, not {jnp.dtype(dtype).name}"
    if head_width % 8 or head_width > MAX_HEAD_WIDTH:
        return f"takes head widths that are multiples of 8 up to {MAX_HEAD_WIDTH}, not {head_width}"
    if value_width != head_width:
        return f"takes values of the width of the keys ({head_width}), not {value_width}"
    if biases:
        return "takes no bias"
    if key is not None:
        return "has no dropout: its dropout mask would differ from that of the other implementations"
    if mask.query_order is not None or mask.query_segments is not None:
        return "takes no query_order and no segments: they would need a dense mask"
    capability = sharding.compute_capability()
    if capability is not None and not _is_ampere_or_later(capability):
        return f"needs an NVIDIA GPU of compute capability {MIN_COMPUTE_CAPABILITY}.0 or higher, not {capability}"
    return split.unsupported_reason()


def _is_ampere_or_later(capability: str) -> bool:
    """Whether the compute capability is high enough; False for AMD GPUs, whose capability is a name such as gfx942."""
    major = capability.partition(".")[0]
    return major.isdigit() and int(major) >= MIN_COMPUTE_CAPABILITY


def attention(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    mask: Mask,
    *,
    scale: float,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> jax.Array:
    """Attention as in ``jaxlm.nn.attention.attention``.

    ``implementation="xla"`` runs on all platforms. Its result differs only by rounding errors.
    """
    window = None if mask.window is None else (mask.window - 1, 0)
    return jax.nn.dot_product_attention(
        q_BTHK, k_BSGK, v_BSGK, scale=scale, is_causal=mask.causal, local_window_size=window,
        implementation=implementation,
    )  # fmt: skip
