"""The plot of attention maps can show any token."""

import numpy as np
import pytest

from jaxlm.training.plots import save_attention
from jaxlm.training.report import AttentionMap


def test_tokens_with_special_characters_are_drawn(tmp_path):
    tokens = ["$\\frac", "{$", "\n", "㫨"]  # a formula, a line break, a character that the font lacks
    weights = np.eye(4)
    path = tmp_path / "attention.png"
    save_attention([AttentionMap("text", tokens, tokens, weights)], path)
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="there are no attention maps"):
        save_attention([], path)
