"""Comparison with the goldens (stored reference results). It does not need torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.oracles import GOLDENS, REFERENCE, compare, tolerances

HEADS = ("classification", "span_qa", "tagging", "classes", "tags", "predict")
"""Suffixes of cases that are marked ``thorough``, because only the head of the model differs from another case."""
CASES = [
    pytest.param(name, marks=pytest.mark.thorough) if name.endswith(HEADS) else name
    for name in sorted(path.name for path in GOLDENS.iterdir())
]


@pytest.mark.parametrize("case", CASES)
def test_hidden_states_logits_loss_and_all_gradients_equal_the_reference(case: str) -> None:
    directory: Path = GOLDENS / case
    with np.load(directory / REFERENCE) as file:
        errors = compare(directory, dict(file))
    allowed = tolerances(case.split("-")[0])
    assert errors
    assert all(errors[quantity] < allowed[quantity] for quantity in errors), errors


def test_goldens_are_small() -> None:
    assert sum(path.stat().st_size for path in GOLDENS.rglob("*")) < 4_000_000
