"""Command line of ``tests.oracles``."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from tests.oracles import FAMILIES, compare, oracle, write_goldens


def table(families: list[str]) -> None:
    """Print a table: for each family, the largest relative difference of each quantity over all cases."""
    print("| family | cases | hidden | logits | loss | gradients |\n|---|---|---|---|---|---|")
    for family in families:
        module, worst = oracle(family), {}
        for case in (*module.CASES, *module.LIVE):
            with tempfile.TemporaryDirectory() as directory:
                for quantity, error in compare(Path(directory), module.reference(case, Path(directory))).items():
                    worst[quantity] = max(worst.get(quantity, 0.0), error)
        cells = [f"{worst[q]:.1e}" if q in worst else "" for q in ("hidden", "logits", "loss", "gradient")]
        print(f"| {family} | {len(module.CASES) + len(module.LIVE)} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.oracles")
    parser.add_argument("families", nargs="*", choices=[*FAMILIES, []], default=[])
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    chosen = arguments.families or FAMILIES
    if arguments.write:
        for name in chosen:
            write_goldens(name)
    else:
        table(chosen)
