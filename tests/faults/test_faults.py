"""Short versions of ``python -m tests.faults`` for the thorough tests."""

from pathlib import Path

import pytest

from tests.faults.faults import Fault, table
from tests.faults.flips import all_flips
from tests.faults.kills import kills


def test_the_table_counts_outcomes():
    fault = Fault("flip", "bit 1", "an error", "an error", True)
    lines = table([fault, fault, Fault("flip", "bit 2", "an error", "silence", False)]).splitlines()
    assert lines[2:] == ["| flip | an error | an error | 2 | yes |", "| flip | an error | silence | 1 | **no** |"]


# If several arrays cannot be read, orbax raises the first error and closes its event loop. The other reads then fail in
# tensorstore's threads with "Event loop is closed", which pytest reports as an unraisable exception.
@pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")
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
