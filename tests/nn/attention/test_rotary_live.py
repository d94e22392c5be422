"""Compare rotary frequencies with those of transformers: run with ``-m live`` and the ``reference`` extra."""

from typing import Any

import pytest

from jaxlm.nn.attention.rotary import RotaryScaling, rotary_frequencies
from jaxlm.testing.helpers import relative_error

pytestmark = pytest.mark.live

LONG = {"factor": 4.0, "original_max_position_embeddings": 2048}
CASES: dict[str, tuple[dict[str, Any] | None, RotaryScaling | None]] = {
    "default": (None, None),
    "linear": ({"factor": 4.0}, RotaryScaling("linear", 4.0)),
    "dynamic": ({"factor": 4.0}, RotaryScaling("dynamic", 4.0, original_positions=2048)),
    "llama3": (
        {**LONG, "low_freq_factor": 1.5, "high_freq_factor": 6.0},
        RotaryScaling("llama3", 4.0, 2048, low_frequency_factor=1.5, high_frequency_factor=6.0),
    ),
    "yarn": (LONG, RotaryScaling("yarn", 4.0, 2048)),
    "yarn, all pairs slow": (
        {"factor": 4.0, "original_max_position_embeddings": 8, "beta_fast": 4.0, "beta_slow": 2.0, "truncate": False},
        RotaryScaling("yarn", 4.0, 8, beta_fast=4.0, beta_slow=2.0, truncate=False),
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("width", "base"), [(64, 500000.0), (128, 10000.0), (8, 100.0)])
def test_rotary_frequencies_equal_transformers(name: str, width: int, base: float) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    reference_fields, scaling = CASES[name]
    kind = name.partition(",")[0]
    config = LlamaConfig(
        hidden_size=2 * width, num_attention_heads=2, rope_theta=base,
        max_position_embeddings=2048 if kind == "dynamic" else 8192,
        rope_scaling=None if reference_fields is None else {"rope_type": kind, **reference_fields},
    )  # fmt: skip
    want, magnitude = ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=8192)
    got, got_magnitude = rotary_frequencies(width, base, scaling, max_positions=8192)
    assert relative_error(got / want.numpy(), got / got) < 1e-6
    assert got_magnitude == pytest.approx(magnitude)
