"""The ``jaxlm`` command: one module per subcommand, and the table :data:`COMMANDS`."""

from __future__ import annotations

from typing import Annotated, Any, NoReturn, Protocol, Union

import tyro

import jaxlm
from jaxlm.cli.answer import Answer
from jaxlm.cli.calibrate import Calibrate
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
from jaxlm.command_line import end_process, exit_status, parse, split_debug


class Command(Protocol):
    """The interface of a subcommand."""

    def run(self) -> int:
        """Run the command and return the exit status."""
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
    "calibrate": Calibrate,
}
"""The class of each subcommand, by the name of the subcommand.

To add a subcommand, write a frozen dataclass with a method ``run() -> int``, and add it to this dict. Its fields are
the options, and its docstrings are the help texts.
"""

DESCRIPTION = """Language models in JAX. Commands for a trained model (a run directory, or a directory in Hugging Face
layout): generate, translate, summarize, answer, classify, chess, score, evaluate. For finished or running training
runs: compare. Before training: plan. For runs on other machines or in several processes: launch. For this machine:
doctor, calibrate. jaxlm --version prints the version. An error is printed as one line; --debug adds the traceback."""


def main(arguments: list[str] | None = None) -> int:
    """Run the ``jaxlm`` command and return the exit status, which ``jaxlm.command_line`` defines."""
    words, debug = split_debug(arguments)

    def run_command() -> int:
        if words == ["--version"]:
            print(f"jaxlm {jaxlm.__version__}")
            return 0
        subcommands = tuple(Annotated[command, tyro.conf.subcommand(name)] for name, command in COMMANDS.items())
        union: Any = Union[subcommands]  # noqa: UP007 (created at run time)
        command: Command = parse(union, words, program="jaxlm", description=DESCRIPTION)
        return command.run()

    return exit_status(run_command, "jaxlm", debug=debug)


def run() -> NoReturn:
    """Run the ``jaxlm`` command and end the process with its exit status."""
    end_process(main())
