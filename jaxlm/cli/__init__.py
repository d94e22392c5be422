"""The ``jaxlm`` command: one module per subcommand, and the table :data:`COMMANDS`."""

from __future__ import annotations

from typing import Annotated, Any, Protocol, Union

import tyro

import jaxlm
from jaxlm.cli.answer import Answer
from jaxlm.cli.chess import Chess
from jaxlm.cli.classify import Classify
from jaxlm.cli.compare import Compare
from jaxlm.cli.doctor import Doctor
from jaxlm.cli.evaluate import Evaluate
from jaxlm.cli.generate import Generate
from jaxlm.cli.launch import Launch
from jaxlm.cli.plan import Plan
from jaxlm.cli.score import Score
from jaxlm.cli.translate import Summarize, Translate
from jaxlm.command_line import exit_status, parse, split_debug


class Command(Protocol):
    """The interface of a subcommand."""

    def run(self) -> int:
        """The exit status, after running the command."""
        ...


COMMANDS: dict[str, type[Command]] = {
    "generate": Generate,
    "translate": Translate,
    "summarize": Summarize,
    "answer": Answer,
    "classify": Classify,
    "chess": Chess,
    "score": Score,
    "evaluate": Evaluate,
    "compare": Compare,
    "plan": Plan,
    "launch": Launch,
    "doctor": Doctor,
}
"""The class of each subcommand by name.

To add a subcommand, write a frozen dataclass with a method ``run() -> int``. Its fields are the options, and its
docstrings are the help texts.
"""

DESCRIPTION = """Language models in JAX. Commands for a trained model (a run directory, or a directory in Hugging Face
layout): generate, translate, summarize, answer, classify, chess, score, evaluate. For finished or running trainings:
compare. Before training: plan, launch. For this machine: doctor. jaxlm --version prints the version. An error is
printed as one line; --debug adds the traceback."""


def main(arguments: list[str] | None = None) -> int:
    """The exit status of ``jaxlm`` (``jaxlm.command_line``), of which this is the entry point."""
    given, debug = split_debug(arguments)
    if given == ["--version"]:
        print(f"jaxlm {jaxlm.__version__}")
        return 0
    kinds = tuple(Annotated[kind, tyro.conf.subcommand(name)] for name, kind in COMMANDS.items())
    union: Any = Union[kinds]  # noqa: UP007 (created at run time)
    command: Command = parse(union, given, program="jaxlm", description=DESCRIPTION)
    return exit_status(command.run, "jaxlm", debug=debug)
