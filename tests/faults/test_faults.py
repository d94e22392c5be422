"""Short versions of ``python -m tests.faults`` for the thorough tests."""

from pathlib import Path

import pytest

from tests.faults import mistakes
from tests.faults.faults import Fault, table
from tests.faults.flips import all_flips
from tests.faults.kills import kills


def test_the_table_counts_outcomes():
    fault = Fault("flip", "bit 1", "an error", "an error", True)
    lines = table([fault, fault, Fault("flip", "bit 2", "an error", "silence", False)]).splitlines()
    assert lines[2:] == ["| flip | an error | an error | 2 | yes |", "| flip | an error | silence | 1 | **no** |"]


def test_the_table_has_mistakes_and_their_unexpected_outcomes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [mistakes.Mistake(f"compare {{{name}}}", 2, "is not a directory", "") for name in ("none", "emptydir")]
    monkeypatch.setattr(mistakes, "MISTAKES", rows)
    expected, unexpected = mistakes.mistakes(tmp_path / "work")
    assert (expected.passed, expected.outcome) == (True, "as expected")
    assert not unexpected.passed
    assert "is not a run directory" in unexpected.outcome


@pytest.mark.thorough
def test_no_flipped_bit_changes_loaded_values_silently(tmp_path: Path) -> None:
    faults = list(all_flips(tmp_path, 120))
    assert len(faults) == 120
    assert [fault for fault in faults if not fault.passed] == []


@pytest.mark.thorough
def test_killed_runs_can_be_resumed(tmp_path: Path) -> None:
    faults = list(kills(tmp_path, 5))
    assert len(faults) >= 5
    assert [fault for fault in faults if not fault.passed] == []
