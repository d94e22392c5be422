"""The process that runs one implementation: ``python -m benchmarks.worker MODULE:CLASS``.

It reads requests from stdin and writes one answer per request to stdout. Requests and answers are JSON objects, one per
line. The requests are:

    {"call": "setup", ...}    create the implementation; the other keys are the arguments of its constructor
    {"call": "run"}           run one repetition; the result is {"seconds": ..., "value": ...}
    {"call": "facts"}         the result has properties of the implementation and the peak memory of the process

An answer has the key ``result``. After an exception, an answer instead has the keys ``error`` (the type and the message
of the exception) and ``is_user_error`` (whether the exception is a ``ValueError`` or ``ImportError``). The traceback is
printed to stderr.
"""

from __future__ import annotations

import abc
import importlib
import json
import os
import resource
import sys
import time
import traceback
from typing import Any


class Implementation(abc.ABC):
    """Base class of the implementations that are measured. The constructor gets the arguments of ``setup``."""

    packages: tuple[str, ...] = ()
    """Packages that the implementation needs. Packages that jaxlm itself depends on are not listed."""

    extra: str = "reference"
    """The extra of jaxlm that installs ``packages``."""

    is_freed_memory_kept = False
    """Whether the process keeps freed memory. If True, the worker calls ``jaxlm.host.keep_freed_memory`` before it
    creates the implementation."""

    def prepare(self) -> None:  # noqa: B027 (most implementations have nothing to prepare)
        """Create the inputs that each repetition consumes, such as donated arrays. This call is not measured."""

    @abc.abstractmethod
    def run(self) -> Any:
        """Run one repetition, wait until it has ended, and return its result."""

    def read(self, result: Any) -> Any:
        """The result of :meth:`run` as a JSON value. The results of all implementations are compared. The time of this
        call is not measured."""
        return result

    def facts(self) -> dict[str, Any]:
        """Properties of the implementation, JSON values that are written to the results."""
        return {}


def find(target: str) -> type[Implementation]:
    """The class of an implementation, from ``module:class``."""
    module, name = target.split(":")
    return getattr(importlib.import_module(module), name)


def serve(target: str) -> None:
    """Answer requests until stdin ends.

    Args:
        target: ``module:class`` of the implementation.
    """
    # Libraries may print to file descriptor 1, but stdout must have only answers. So redirect descriptor 1 to stderr.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    implementation: Implementation | None = None
    for line in sys.stdin:
        arguments = json.loads(line)
        call = arguments.pop("call")
        try:
            if call == "setup":
                kind = find(target)
                if kind.is_freed_memory_kept:
                    importlib.import_module("jaxlm.host").keep_freed_memory()
                implementation = kind(**arguments)
                result: Any = None
            elif implementation is None:
                raise RuntimeError(f"{call!r} before 'setup'")
            elif call == "run":
                implementation.prepare()
                start = time.perf_counter()
                value = implementation.run()
                seconds = time.perf_counter() - start
                value = implementation.read(value)  # frees the arrays before the next repetition
                result = {"seconds": seconds, "value": value}
            else:
                result = {**implementation.facts(), "peak_process_bytes": _peak_bytes()}
            answers.write(json.dumps({"result": result}) + "\n")
        except Exception as error:
            traceback.print_exc()
            is_user_error = isinstance(error, ValueError | ImportError)
            answer = {"error": f"{type(error).__name__}: {error}", "is_user_error": is_user_error}
            answers.write(json.dumps(answer) + "\n")


def _peak_bytes() -> int:
    """Peak host memory (resident set) of the process in bytes, including loading and compilation."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    serve(sys.argv[1])
