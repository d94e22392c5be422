"""``jaxlm chess``: a game against a chess model."""

from __future__ import annotations

import dataclasses
from typing import Literal

from jaxlm.cli.common import ModelCommand
from jaxlm.data.moves import MoveTokenizer
from jaxlm.decoding.describe import describe
from jaxlm.tasks.chess import play_on_terminal


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chess(ModelCommand):
    """Play chess against a model in the terminal. Prints the board and reads your moves from standard input."""

    color: Literal["white", "black"] = "white"
    """Your color."""
    temperature: float = 0.0
    """Sampling temperature of the model's moves; 0 plays the most probable legal move."""
    seed: int = 0
    """Seed for sampling."""

    def run(self) -> int:
        """Play one game and return the exit status."""
        model, params, tokenizer = self.load()
        if not isinstance(tokenizer, MoveTokenizer):
            raise ValueError(
                f"{self.directory} has no chess model: this is {describe(model)} with a "
                f"{type(tokenizer).__name__}; train a chess model with python -m experiments.chess"
            )
        play_on_terminal(model, params, tokenizer, color=self.color, temperature=self.temperature, seed=self.seed)
        return 0
