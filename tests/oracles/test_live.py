"""Comparison of all cases of all families with their references: run with ``-m live`` and the ``reference`` extra."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.oracles import FAMILIES, compare, oracle, tolerances

pytestmark = pytest.mark.live


@pytest.mark.parametrize(
    ("family", "case"),
    [(family, case) for family in FAMILIES for case in (*oracle(family).CASES, *oracle(family).LIVE)],
)
def test_hidden_states_logits_loss_and_all_gradients_equal_the_reference(
    family: str, case: str, tmp_path: Path
) -> None:
    errors = compare(tmp_path, oracle(family).reference(case, tmp_path))
    allowed = tolerances(family)
    assert errors
    assert all(errors[quantity] < allowed[quantity] for quantity in errors), errors
