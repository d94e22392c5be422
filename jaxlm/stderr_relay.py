"""Copies the output of a process on file descriptor 2, and replaces JAX's report of a lost process with one line.

When a process of a run is lost, JAX aborts the other processes from C++. It prints a message and a stack trace to file
descriptor 2, and no Python code runs. ``jaxlm.processes`` therefore starts this program with a pipe from descriptor 2.

A line that begins with a zero byte is not copied. It sets the text that this program prints if JAX aborts the process.
In this text, ``{lost}`` is replaced with the indices of the lost processes.

This file is run by its path and imports nothing from jaxlm, so that it starts quickly.
"""

from __future__ import annotations

import re
import sys
from typing import BinaryIO

ABORT_MESSAGE = b"Terminating process because the JAX distributed service detected fatal errors"
LOSS_MESSAGES = re.compile(
    rb"[IWE]\d{4} [\d:.]+ +\d+ (coordination_service|coordination_service_agent|preemption_\w+)\.cc:\d+\]"
)
"""Matches the first line of a message that JAX's coordination or preemption service logs after the loss of a process.
The other lines of the message match ``CONTINUATION_LINES``. :func:`relay` does not copy these messages."""
CONTINUATION_LINES = re.compile(rb"\d+$|The tasks have crashed|Additional GRPC error|:UNKNOWN:Error|RPC: /xla\.")


def lost(report: bytes) -> str:
    """The indices of the lost processes in JAX's report, as text such as "1, 3"; "0" if the report names no process.

    Process 0 detects the loss of the other processes. If process 0 itself was lost, the report names no process.
    """
    named = re.search(rb"stopped sending heartbeats\):\s*((?:\d+\s+)+)", report)
    return ", ".join(named[1].decode().split()) if named else "0"


def relay(source: BinaryIO, target: BinaryIO) -> None:
    """Copy ``source`` to ``target`` until ``source`` ends, with the changes that the module docstring describes."""
    last_line, dropping = b"", False
    for line in source:
        if line.startswith(b"\0"):
            last_line = line[1:] if line[1:].strip() else b""
            continue
        if ABORT_MESSAGE in line:
            report = line + source.read()  # read to the end: JAX aborts the process after this line
            target.write(last_line.replace(b"{lost}", lost(report).encode()))
            target.flush()
            return
        dropping = bool(LOSS_MESSAGES.match(line) or (dropping and CONTINUATION_LINES.match(line)))
        if not dropping:
            target.write(line)
            target.flush()


if __name__ == "__main__":
    relay(sys.stdin.buffer, sys.stdout.buffer)
