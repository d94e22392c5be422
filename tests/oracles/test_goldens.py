"""Comparison with the goldens (stored reference results). It does not need torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.oracles import GOLDENS, REFERENCE, compare, tolerances

NAMES = sorted(path.name for path in GOLDENS.iterdir())
FIRST = {name.split("-")[0]: name for name in reversed(NAMES)}
"""The first case of each family. The others are marked ``thorough``."""
CASES = [name if name in FIRST.values() else pytest.param(name, marks=pytest.mark.thorough) for name in NAMES]


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
