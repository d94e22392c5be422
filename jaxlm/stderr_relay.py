"""Copies what a process of a run writes to file descriptor 2, with one line in place of JAX's report of a lost process.

JAX ends a process when another one is lost: it aborts from C++, after a message and a stack trace on file descriptor 2,
before any Python code can run. ``jaxlm.processes`` therefore starts this program with a pipe from descriptor 2. A line
that begins with a zero byte is not copied: it is the line to print after such an abort. ``{lost}`` in it stands for the
numbers of the lost processes.

This file is run by its path and imports nothing of jaxlm, so that it starts at once.
"""

from __future__ import annotations

import re
import sys
from typing import BinaryIO

ABORT = b"Terminating process because the JAX distributed service detected fatal errors"
CONSEQUENCES = re.compile(
    rb"[IWE]\d{4} [\d:.]+ +\d+ (coordination_service|coordination_service_agent|preemption_\w+)\.cc:\d+\]"
)
"""Messages that come with the loss of a process; their further lines begin as in ``CONTINUED``."""
CONTINUED = re.compile(rb"\d+$|The tasks have crashed|Additional GRPC error|:UNKNOWN:Error|RPC: /xla\.")


def lost(report: bytes) -> str:
    """The numbers of the lost processes in JAX's report. It names none if it is process 0, which JAX asks for them."""
    named = re.search(rb"stopped sending heartbeats\):\s*((?:\d+\s+)+)", report)
    return ", ".join(named[1].decode().split()) if named else "0"


def relay(source: BinaryIO, target: BinaryIO) -> None:
    """Copy ``source`` to ``target`` until its end."""
    last_line, dropping = b"", False
    for line in source:
        if line.startswith(b"\0"):
            last_line = line[1:] if line[1:].strip() else b""
            continue
        if ABORT in line:
            report = line + source.read()  # to the end: the process aborts
            target.write(last_line.replace(b"{lost}", lost(report).encode()))
            target.flush()
            return
        dropping = bool(CONSEQUENCES.match(line) or (dropping and CONTINUED.match(line)))
        if not dropping:
            target.write(line)
            target.flush()


if __name__ == "__main__":
    relay(sys.stdin.buffer, sys.stdout.buffer)
