"""Inject faults and print the table ``fault | expected | seen`` of docs/reliability.md.

    python -m tests.faults --flips 500 --kills 200

Exit status 1 if a promise was broken; the broken ones are listed below the table.
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
    """Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--flips", type=int, default=500, help="flipped bits, half in a checkpoint, half in an export")
    parser.add_argument("--kills", type=int, default=200, help="kills of a training run")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments and bits")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        faults = list(all_flips(directory / "flips", options.flips, options.seed)) if options.flips else []
        faults += list(kills(directory / "kills", options.kills, options.seed)) if options.kills else []
    print(table(faults))
    broken = [one for one in faults if not one.held]
    for one in broken:
        print(f"broken: {one.kind}, {one.fault}: {one.seen}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
