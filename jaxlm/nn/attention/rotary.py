"""Rotary position embeddings (Su et al. 2021), and frequency scaling for long texts.

The entries of a head form pairs. Each pair is rotated by an angle that is proportional to the position. So the score of
a query and a key depends on their positions only through the distance between them. Entry ``i`` is paired with entry
``i + P`` (as in Hugging Face's Llama), not with the next entry (as in the paper and in Meta's files). The two
conventions differ only in the order of the entries of queries and keys, and so in the order of the output features of
the query and key weights.

Shapes: B batch, T time, H heads, K head width, P pairs (K / 2, or fewer if only a part of each head is rotated).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.nn import choices
from jaxlm.nn.attention import rotary_pallas
from jaxlm.nn.custom_gradient import custom_vjp
from jaxlm.spec import require_arrays

ScalingKind = Literal["linear", "dynamic", "llama3", "yarn"]


@dataclasses.dataclass(frozen=True)
class RotaryScaling:
    """How the rotation frequencies of a model are reduced for texts that are longer than the training texts."""

    kind: ScalingKind
    """linear: divide all frequencies by ``factor`` (Chen et al. 2023). dynamic: use a larger base (NTK-aware) if
    ``max_positions`` of :func:`rotary_frequencies` exceeds ``original_positions``. llama3 (Llama 3.1) and yarn (Peng et
    al. 2023): divide low frequencies by ``factor``, keep high frequencies, and interpolate for the frequencies between
    them."""
    factor: float
    """linear, llama3, yarn: the number by which frequencies are divided, often the ratio of the longest text length to
    the longest training sequence. dynamic: the base is multiplied by ``(factor * r - factor + 1) ** (w / (w - 2))``.
    r is ``max_positions / original_positions``, at least 1, and w is the number of rotated entries of a head."""
    original_positions: int | None = None
    """Length of the longest training sequence; not needed for linear scaling."""
    low_frequency_factor: float = 1.0
    """llama3: the frequency of a pair is divided by ``factor`` if the pair makes fewer turns than this in
    ``original_positions`` positions."""
    high_frequency_factor: float = 4.0
    """llama3: the frequency of a pair is unchanged if the pair makes more turns than this in ``original_positions``
    positions."""
    beta_fast: float = 32.0
    """yarn: the frequency of a pair is unchanged if the pair makes more turns than this in ``original_positions``
    positions."""
    beta_slow: float = 1.0
    """yarn: the frequency of a pair is divided by ``factor`` if the pair makes fewer turns than this in
    ``original_positions`` positions."""
    truncate: bool = True
    """yarn: the interpolation is linear in the index of the pair. It begins at the (fractional) index of a pair with
    ``beta_fast`` turns and ends at that of a pair with ``beta_slow`` turns. True: the first index is rounded down to an
    integer, and the second index is rounded up."""
    attention_factor: float | None = None
    """yarn: the rotated entries of queries and keys are multiplied by this factor; None: ``0.1 * log(factor) + 1``."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(ScalingKind):
            raise ValueError(
                f"kind={self.kind!r} of rotary scaling is unknown: choose from {', '.join(get_args(ScalingKind))}"
            )
        if not self.factor >= 1.0:  # also refuses NaN
            raise ValueError(f"factor={self.factor} of rotary scaling must be at least 1")
        if self.kind != "linear" and (self.original_positions is None or self.original_positions < 1):
            raise ValueError(
                f"original_positions={self.original_positions} of {self.kind} rotary scaling must be at least 1: "
                "give the length of the longest training sequence"
            )
        if self.kind == "llama3" and self.high_frequency_factor <= self.low_frequency_factor:
            raise ValueError(
                f"high_frequency_factor={self.high_frequency_factor} must exceed "
                f"low_frequency_factor={self.low_frequency_factor}"
            )
        if self.kind == "yarn" and not 0 < self.beta_slow < self.beta_fast:
            raise ValueError(f"beta_slow={self.beta_slow} must be above 0 and below beta_fast={self.beta_fast}")


def rotary_frequencies(
    width: int, base: float, scaling: RotaryScaling | None = None, max_positions: int | None = None
) -> tuple[np.ndarray, float]:
    """The rotation angle of each pair per position, [P] float32, and the factor by which the cosines and sines are
    multiplied (1 for all kinds except yarn).

    Args:
        width: number of entries of a head that are rotated: K, or less for partial rotation (:func:`rotary_width`).
        base: base of the geometric series of frequencies (``rope_theta``).
        scaling: None: the frequencies are not scaled.
        max_positions: length of the longest sequence; only ``dynamic`` uses it. It determines one base for all calls.
            Other libraries, such as transformers, compute a base in each call from the longest row, so that cached keys
            and later queries may have different bases. The frequencies equal those of other libraries for sequences of
            length ``max_positions``. If ``max_positions`` is at most ``original_positions``, they are also equal for
            shorter sequences.

    Raises:
        ValueError: an odd width; or, with dynamic scaling, a width below 4 or no ``max_positions``.
    """
    if width % 2:
        raise ValueError(f"rotary embeddings rotate pairs of entries: a head width of {width} is odd")
    if scaling is not None and scaling.kind == "dynamic":
        if width < 4:
            raise ValueError(f"dynamic rotary scaling needs at least 4 rotated entries per head, not {width}")
        check_dynamic_scaling(scaling, max_positions)
        assert scaling.original_positions is not None
        assert max_positions is not None
        length_ratio = max(max_positions, scaling.original_positions) / scaling.original_positions
        base *= (scaling.factor * length_ratio - (scaling.factor - 1.0)) ** (width / (width - 2))
    frequencies = 1.0 / base ** (np.arange(0, width, 2) / width)
    magnitude = 1.0
    if scaling is not None and scaling.kind != "dynamic":
        reduced = frequencies / scaling.factor
        ramp = _ramp(frequencies, width, base, scaling)
        frequencies = ramp * frequencies + (1.0 - ramp) * reduced
        if scaling.kind == "yarn":
            magnitude = (
                0.1 * math.log(scaling.factor) + 1.0 if scaling.attention_factor is None else scaling.attention_factor
            )
    return frequencies.astype(np.float32), magnitude


def _ramp(frequencies: np.ndarray, width: int, base: float, scaling: RotaryScaling) -> np.ndarray:
    """The weight of each pair's original frequency, [P]: 1 for fast pairs, 0 for slow pairs, and a linear ramp between
    them. With linear scaling, all weights are 0."""
    if scaling.kind == "linear":
        return np.zeros_like(frequencies)
    assert scaling.original_positions is not None
    if scaling.kind == "llama3":
        turns = scaling.original_positions * frequencies / (2 * math.pi)
        low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
        return np.clip((turns - low) / (high - low), 0.0, 1.0)

    def pair_index(turns: float) -> float:
        """The (fractional) index of the pair that makes ``turns`` turns (Peng et al. 2023, section 3.2)."""
        assert scaling.original_positions is not None
        return width * math.log(scaling.original_positions / (turns * 2 * math.pi)) / (2 * math.log(base))

    first, last = pair_index(scaling.beta_fast), pair_index(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    # ``last - first`` is negative only in two cases. If ``last`` is negative, all pairs make fewer than beta_slow
    # turns, but all weights are 1. If ``first`` exceeds ``width - 1``, all pairs make more than beta_fast turns, but
    # all weights are 0. The results are the same as in transformers.
    return 1.0 - np.clip((np.arange(width // 2) - first) / (last - first or 0.001), 0.0, 1.0)


def check_dynamic_scaling(scaling: RotaryScaling | None, max_positions: int | None) -> None:
    """Raise ``ValueError`` if the scaling is dynamic and ``max_positions`` is None."""
    if scaling is not None and scaling.kind == "dynamic" and max_positions is None:
        raise ValueError("dynamic rotary scaling needs max_positions, the length of the longest sequence, got None")


def rotary_width(head_dim: int, fraction: float) -> int:
    """The number of entries of a head that are rotated: ``fraction * head_dim``, rounded down.

    The product is a floating-point number, as in transformers, so it may be just below a whole number: ``0.57 * 100``
    gives 56.

    Raises:
        ValueError: the fraction is not in (0, 1], or the number of entries is odd or 0.
    """
    width = int(fraction * head_dim)
    if not 0.0 < fraction <= 1.0 or width < 2 or width % 2:
        raise ValueError(
            f"rotary_fraction={fraction} must be at most 1, and its product with head_dim={head_dim}, rounded down, "
            "must be even and at least 2, because rotary positions rotate pairs"
        )
    return width


def rotary_angles(
    positions_BT: jax.Array,
    width: int,
    base: float,
    scaling: RotaryScaling | None = None,
    max_positions: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of the angle of each pair at each position, both [B, T, P] float32.

    Both are multiplied by the factor that :func:`rotary_frequencies` returns.

    All layers with equal arguments can use the same angles. See :func:`rotary_frequencies` for the arguments and the
    errors.
    """
    require_arrays(positions_BT=positions_BT)
    frequencies_P, magnitude = rotary_frequencies(width, base, scaling, max_positions)
    angles_BTP = positions_BT.astype(jnp.float32)[..., None] * frequencies_P[None, None, :]
    return jnp.cos(angles_BTP) * magnitude, jnp.sin(angles_BTP) * magnitude


def rotate(x_BTHK: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Queries or keys rotated by the angles of their positions, [B, T, H, K] in the dtype of ``x``.

    ``angles`` are from :func:`rotary_angles`. If P is less than K / 2, only the first 2 P entries of each head are
    rotated.

    Example:
        >>> angles = rotary_angles(jnp.array([[0, 5]]), 4, 10000.0)
        >>> rotated = rotate(jnp.ones((1, 2, 1, 4)), angles)
        >>> bool((rotated[0, 0] == 1).all()), bool((rotated[0, 1] == 1).all())
        (True, False)
    """
    require_arrays(x_BTHK=x_BTHK)
    if not choices.rotary_kernel(x_BTHK):
        return _rotate(x_BTHK, *angles)
    # Angles that all rows share may have a batch axis of size 1.
    tables = (jnp.broadcast_to(table, (*x_BTHK.shape[:2], table.shape[-1])) for table in angles)
    return _rotate_by_kernel(x_BTHK, *tables)


def _rotate(x_BTHK: jax.Array, cos_BTP: jax.Array, sin_BTP: jax.Array) -> jax.Array:
    cos, sin = (table_BTP[:, :, None, :] for table_BTP in (cos_BTP, sin_BTP))
    pairs = cos.shape[-1]
    first, second, rest = jnp.split(x_BTHK.astype(jnp.float32), (pairs, 2 * pairs), axis=-1)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate([*rotated, rest], axis=-1).astype(x_BTHK.dtype)


_rotate_by_kernel = custom_vjp(rotary_pallas.rotate)


def _forward(x_BTHK: jax.Array, cos_BTP: jax.Array, sin_BTP: jax.Array) -> tuple[jax.Array, Any]:
    # Second derivatives differentiate this rule. So it calls the function with the custom gradient.
    return _rotate_by_kernel(x_BTHK, cos_BTP, sin_BTP), (x_BTHK, cos_BTP, sin_BTP)


def _backward(saved: Any, dout_BTHK: jax.Array) -> tuple[jax.Array, ...]:
    x_BTHK, cos_BTP, sin_BTP = saved
    # The gradient of x is the gradient of the result, rotated by the negative angles.
    dx_BTHK = _rotate_by_kernel(dout_BTHK, cos_BTP, -sin_BTP)
    # XLA removes the gradients of the angles if they are not used, as for angles of integer positions.
    return dx_BTHK, *jax.vjp(functools.partial(_rotate, x_BTHK), cos_BTP, sin_BTP)[1](dout_BTHK)


_rotate_by_kernel.defvjp(_forward, _backward)
