"""Rotary position embeddings (Su et al. 2021), and the ways of stretching them over longer texts.

Each pair of a head's entries is a point in the plane, turned by an angle that grows with the position, so that scores
depend on distances only. Entry ``i`` is paired with ``i + K / 2`` (as in Hugging Face's Llama), not with its neighbour
(as in the paper and in Meta's files): the same up to the order of the rows of the query and key weights.

Shapes: B batch, T time, H heads, K head width, P pairs (K / 2).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

Kind = Literal["linear", "dynamic", "llama3", "yarn"]


@dataclasses.dataclass(frozen=True)
class RotaryScaling:
    """How the turns of a model trained on short texts are slowed down for longer ones."""

    kind: Kind
    """linear: all pairs (Chen et al. 2023). dynamic: by a larger base (NTK-aware). llama3, yarn: slow pairs only."""
    factor: float
    """How many times longer than ``original_positions`` texts may be."""
    original_positions: int | None = None
    """Longest sequence of the first training; linear scaling does without it."""
    low_frequency_factor: float = 1.0
    """llama3: pairs with fewer turns than this within ``original_positions`` are slowed down by the whole factor."""
    high_frequency_factor: float = 4.0
    """llama3: pairs with more turns than this within ``original_positions`` stay as they are."""
    fast_turns: float = 32.0
    """yarn: pairs with more turns than this within ``original_positions`` stay as they are."""
    slow_turns: float = 1.0
    """yarn: pairs with fewer turns than this within ``original_positions`` are slowed down by the whole factor."""
    whole_pairs: bool = True
    """yarn: round the borders between fast and slow to whole pairs."""
    magnitude: float | None = None
    """yarn: what queries and keys are multiplied by; None means ``0.1 * log(factor) + 1``."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(
                f"kind={self.kind!r} of rotary scaling is unknown: choose from {', '.join(get_args(Kind))}"
            )
        if self.factor < 1.0:
            raise ValueError(f"factor={self.factor} of rotary scaling must be at least 1")
        if self.kind != "linear" and (self.original_positions is None or self.original_positions < 1):
            raise ValueError(
                f"original_positions={self.original_positions} of {self.kind} rotary scaling must be at least 1: "
                "say how long the sequences of the first training were"
            )
        if self.kind == "llama3" and self.high_frequency_factor <= self.low_frequency_factor:
            raise ValueError(
                f"high_frequency_factor={self.high_frequency_factor} must exceed "
                f"low_frequency_factor={self.low_frequency_factor}"
            )
        if self.kind == "yarn" and self.fast_turns <= self.slow_turns:
            raise ValueError(f"fast_turns={self.fast_turns} must exceed slow_turns={self.slow_turns}")


def rotary_frequencies(
    width: int, base: float, scaling: RotaryScaling | None = None, max_positions: int | None = None
) -> tuple[np.ndarray, float]:
    """Angle by which each pair turns from one position to the next, [P] float32, and the magnitude (1 but for yarn).

    Args:
        width: of a head.
        base: of the geometric series of frequencies (``rope_theta``).
        max_positions: the longest sequence, for which ``dynamic`` chooses the base. Other libraries choose it anew in
            each call, by the longest row, so that keys in a cache no longer fit later queries; here it is fixed, and
            equal to theirs for sequences of that length, and for all up to ``original_positions`` where it is that.

    Raises:
        ValueError: an odd width.
    """
    if width % 2:
        raise ValueError(f"rotary embeddings turn pairs: a head width of {width} is odd")
    if scaling is not None and scaling.kind == "dynamic":
        assert scaling.original_positions is not None
        longer = max(max_positions or 0, scaling.original_positions) / scaling.original_positions
        base *= (scaling.factor * longer - (scaling.factor - 1.0)) ** (width / (width - 2))
    frequencies = 1.0 / base ** (np.arange(0, width, 2) / width)
    magnitude = 1.0
    if scaling is not None and scaling.kind != "dynamic":
        slowed = frequencies / scaling.factor
        kept = _kept(frequencies, width, base, scaling)
        frequencies = kept * frequencies + (1.0 - kept) * slowed
        if scaling.kind == "yarn":
            magnitude = 0.1 * math.log(scaling.factor) + 1.0 if scaling.magnitude is None else scaling.magnitude
    return frequencies.astype(np.float32), magnitude


def _kept(frequencies: np.ndarray, width: int, base: float, scaling: RotaryScaling) -> np.ndarray:
    """How much of each pair's frequency stays as it is: 1 for pairs that turn fast, 0 for slow ones."""
    if scaling.kind == "linear":
        return np.zeros_like(frequencies)
    assert scaling.original_positions is not None
    if scaling.kind == "llama3":
        turns = scaling.original_positions * frequencies / (2 * math.pi)
        low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
        return np.clip((turns - low) / (high - low), 0.0, 1.0)

    def pair(turns: float) -> float:
        """The (fractional) pair that makes this many turns (Peng et al. 2023, section 3.2)."""
        assert scaling.original_positions is not None
        return width * math.log(scaling.original_positions / (turns * 2 * math.pi)) / (2 * math.log(base))

    first, last = pair(scaling.fast_turns), pair(scaling.slow_turns)
    if scaling.whole_pairs:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    return 1.0 - np.clip((np.arange(width // 2) - first) / max(last - first, 0.001), 0.0, 1.0)


def rotary_angles(
    positions_BT: jax.Array,
    width: int,
    base: float,
    scaling: RotaryScaling | None = None,
    max_positions: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of the angle of every pair at every position, each [B, T, P] float32: the same for all layers.

    The magnitude is in them. Arguments and errors: see :func:`rotary_frequencies`.
    """
    frequencies_P, magnitude = rotary_frequencies(width, base, scaling, max_positions)
    angles_BTP = positions_BT.astype(jnp.float32)[..., None] * frequencies_P[None, None, :]
    return jnp.cos(angles_BTP) * magnitude, jnp.sin(angles_BTP) * magnitude


def rotate(x_BTHK: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Queries or keys turned by the ``angles`` of their positions (:func:`rotary_angles`). Keeps ``x``'s dtype.

    Example:
        >>> angles = rotary_angles(jnp.array([[0, 5]]), 4, 10000.0)
        >>> turned = rotate(jnp.ones((1, 2, 1, 4)), angles)
        >>> bool((turned[0, 0] == 1).all()), bool((turned[0, 1] == 1).all())
        (True, False)
    """
    cos, sin = (table_BTP[:, :, None, :] for table_BTP in angles)
    one, two = jnp.split(x_BTHK.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([one * cos - two * sin, two * cos + one * sin], axis=-1).astype(x_BTHK.dtype)
