"""Inject faults and print the table ``fault | expected | seen`` of docs/reliability.md.

    python -m tests.faults --flips 500 --kills 200

The exit status is 1 if an outcome was not as expected. These faults are listed below the table.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from tests.faults.faults import table
from tests.faults.flips import all_flips
from tests.faults.kills import kills


def main() -> int:
    """Run the faults, print the table, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument(
        "--flips", type=int, default=500, help="number of flipped bits, half in a checkpoint, half in an export"
    )
    parser.add_argument("--kills", type=int, default=200, help="number of kills of training runs")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random times and bits")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        faults = list(all_flips(directory / "flips", options.flips, options.seed)) if options.flips else []
        faults += list(kills(directory / "kills", options.kills, options.seed)) if options.kills else []
    print(table(faults))
    failed = [fault for fault in faults if not fault.passed]
    for fault in failed:
        print(f"not as expected: {fault.kind}, {fault.fault}: {fault.outcome}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
