"""Comparison with the goldens (stored reference results). It does not need torch."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.oracles import FAMILIES, GOLDENS, compare, oracle, read_golden, tolerances

CASES = [(family, case) for family in FAMILIES for case in sorted(oracle(family).CASES)]
FIRST = dict(reversed(CASES))
"""The first case of each family. The others are marked ``thorough``."""


@pytest.mark.parametrize(
    ("family", "case"),
    [pytest.param(*each, marks=[] if each in FIRST.items() else pytest.mark.thorough) for each in CASES],
)
def test_hidden_states_logits_loss_and_all_gradients_equal_the_reference(
    family: str, case: str, tmp_path: Path
) -> None:
    errors = compare(tmp_path, read_golden(family, case, tmp_path))
    allowed = tolerances(family)
    assert errors
    assert all(errors[quantity] < allowed[quantity] for quantity in errors), errors


def test_goldens_are_small() -> None:
    assert sum(path.stat().st_size for path in GOLDENS.rglob("*")) < 4_000_000
