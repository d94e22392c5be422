"""The outcome of one fault, and the table that ``python -m tests.faults`` prints."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable


@dataclasses.dataclass(frozen=True)
class Fault:
    """One injected fault and its outcome.

    Attributes:
        kind: group of the table, such as "bit flip, checkpoint".
        fault: what was done, for example "bit 3 of byte 17 of 4/record/metadata".
        expected: the promise, in words.
        seen: what happened, in words; equal outcomes have equal words, so that they can be counted.
        held: whether the promise held.
    """

    kind: str
    fault: str
    expected: str
    seen: str
    held: bool


def table(faults: Iterable[Fault]) -> str:
    """Counts by kind and outcome, as a Markdown table ``fault | expected | seen | count | held``."""
    counts = collections.Counter((one.kind, one.expected, one.seen, one.held) for one in faults)
    lines = ["| fault | expected | seen | count | held |", "|---|---|---|---|---|"]
    for (kind, expected, seen, held), count in sorted(counts.items()):
        lines.append(f"| {kind} | {expected} | {seen} | {count} | {'yes' if held else '**no**'} |")
    return "\n".join(lines)
