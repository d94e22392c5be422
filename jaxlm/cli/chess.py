"""``jaxlm chess``: a game against a model that was trained on moves."""

from __future__ import annotations

import dataclasses
from typing import Literal

from jaxlm.cli.common import Directory, load
from jaxlm.data.moves import MoveTokenizer
from jaxlm.decoding.describe import describe
from jaxlm.tasks.chess import play_on_terminal


@dataclasses.dataclass(frozen=True)
class Chess:
    """Play chess against a model on the terminal: it draws the board and reads your moves from standard input."""

    directory: Directory
    """A run directory of experiments.chess, or a model in Hugging Face layout with its tokenizer of moves."""
    person: Literal["white", "black"] = "white"
    """Your color."""
    temperature: float = 0.0
    """Above 0 the model draws its moves at random; at 0 it plays the most probable legal one."""
    seed: int = 0
    """Seed of the draws."""
    dtype: str | None = None
    """Compute dtype, e.g. bfloat16; None keeps the model's."""

    def run(self) -> int:
        """Play one game."""
        model, params, tokenizer = load(self.directory, self.dtype)
        if not isinstance(tokenizer, MoveTokenizer):
            raise ValueError(
                f"{self.directory} holds no chess model: this is {describe(model)} with a "
                f"{type(tokenizer).__name__}; train one with python -m experiments.chess"
            )
        play_on_terminal(
            model, params, tokenizer, person=self.person, temperature=self.temperature, seed=self.seed
        )  # fmt: skip
        return 0
