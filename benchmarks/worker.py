"""The process that a peer lives in: ``python -m benchmarks.worker MODULE:CLASS`` answers JSON lines.

``{"call": "setup", ...arguments}`` makes the peer, ``{"call": "run"}`` is one timed repetition, ``{"call": "facts"}``
what else is known. An answer holds ``result``, or ``error``: one sentence (its traceback goes to stderr).
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys
import time
import traceback
from typing import Any


class Peer:
    """What a worker serves. Made from the arguments of ``setup``."""

    keeps_memory = False
    """Whether the process is told to keep what it frees (``jaxlm.host``), before anything else."""

    def prepare(self) -> None:
        """What a repetition uses up, made before its time begins."""

    def run(self) -> Any:
        """One repetition, complete on return: what it computed, to be checked against the other peers."""
        raise NotImplementedError

    def facts(self) -> dict[str, Any]:
        """What is known about it, for the record."""
        return {}


def serve(target: str) -> None:
    """Answer until the input ends."""
    # The pipe is kept for answers alone: what a library prints goes to stderr.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    peer: Peer | None = None
    for line in sys.stdin:
        arguments = json.loads(line)
        call = arguments.pop("call")
        try:
            if call == "setup":
                module, name = target.split(":")
                kind = getattr(importlib.import_module(module), name)
                if kind.keeps_memory:
                    importlib.import_module("jaxlm.host").keep_freed_memory()
                peer = kind(**arguments)
                result: Any = None
            elif peer is None:
                raise RuntimeError(f"{call!r} before 'setup'")
            elif call == "run":
                peer.prepare()
                begun = time.perf_counter()
                value = peer.run()
                result = {"seconds": time.perf_counter() - begun, "value": value}
            else:
                result = {**peer.facts(), "peak_process_bytes": _peak_bytes()}
            answers.write(json.dumps({"result": result}) + "\n")
        except Exception as error:
            traceback.print_exc()
            answers.write(json.dumps({"error": f"{type(error).__name__}: {error}"}) + "\n")


def _peak_bytes() -> int:
    """Most memory that the process ever had, loading and compiling included."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    serve(sys.argv[1])
