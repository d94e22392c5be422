"""Inject faults and print the table ``fault | expected | seen`` of docs/reliability.md.

    python -m tests.faults --flips 500 --kills 200

The faults are flipped bits, kills, user errors (``mistakes.txt``) and, with ``--processes``, faults of one of two
processes. The exit status is 1 if an outcome was not as expected. These faults are listed below the table.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

# The settings of tests/conftest.py. JAX reads them when the first command needs devices.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0")

from tests.faults.faults import Fault, table
from tests.faults.flips import all_flips
from tests.faults.kills import kills
from tests.faults.mistakes import mistakes


def processes(directory: Path) -> Iterator[Fault]:
    """Run the tests of ``test_processes_faults.py`` in a separate process; each test is one fault."""
    results, module = directory / "results.xml", Path(__file__).parent / "test_processes_faults.py"
    options = ["-n", "0", "-m", "thorough", "-p", "no:cacheprovider", f"--junitxml={results}"]
    subprocess.run([sys.executable, "-m", "pytest", *options, str(module)], check=False)
    if not results.exists():
        yield Fault("several processes", "all", "the tests run", "pytest did not start (see above)", False)
        return
    for case in ElementTree.parse(results).iter("testcase"):
        passed = all(case.find(problem) is None for problem in ("failure", "error", "skipped"))
        seen = "as expected" if passed else "another outcome (see above)"
        expected = "the processes end in time, with one line each; the run can be resumed"
        yield Fault("several processes", case.get("name", ""), expected, seen, passed)


def main() -> int:
    """Run the faults, print the table, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument(
        "--flips", type=int, default=500, help="number of flipped bits, half in a checkpoint, half in an export"
    )
    parser.add_argument("--kills", type=int, default=200, help="number of kills of training runs")
    parser.add_argument("--mistakes", action=argparse.BooleanOptionalAction, default=True, help="user errors")
    parser.add_argument("--processes", action="store_true", help="faults of one of two processes, and restarts")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random times and bits")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        faults = list(all_flips(directory / "flips", options.flips, options.seed)) if options.flips else []
        faults += list(kills(directory / "kills", options.kills, options.seed)) if options.kills else []
        if options.mistakes:
            faults += mistakes(directory / "mistakes")
        if options.processes:
            faults += processes(directory)
    print(table(faults))
    failed = [fault for fault in faults if not fault.passed]
    for fault in failed:
        print(f"not as expected: {fault.kind}, {fault.fault}: {fault.outcome}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
