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
        fault: description, for example "bit 3 of byte 17 of 4/record/metadata".
        expected: the expected outcome, in words.
        outcome: what happened, in words. Equal outcomes have equal words, so that they can be counted.
        passed: whether the outcome was as expected.
    """

    kind: str
    fault: str
    expected: str
    outcome: str
    passed: bool


def table(faults: Iterable[Fault]) -> str:
    """Return a Markdown table of counts by kind and outcome: ``fault | expected | seen | count | held``."""
    counts = collections.Counter((fault.kind, fault.expected, fault.outcome, fault.passed) for fault in faults)
    lines = ["| fault | expected | seen | count | held |", "|---|---|---|---|---|"]
    for (kind, expected, outcome, passed), count in sorted(counts.items()):
        lines.append(f"| {kind} | {expected} | {outcome} | {count} | {'yes' if passed else '**no**'} |")
    return "\n".join(lines)
