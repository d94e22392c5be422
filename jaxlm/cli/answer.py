"""``jaxlm answer``: answers to questions about a text."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from jaxlm.cli.common import Directory, load, one_line
from jaxlm.data import read_text
from jaxlm.data.examples import read_jsonl
from jaxlm.tasks.question_answering import answer


@dataclasses.dataclass(frozen=True)
class Answer:
    """Answer questions by spans of a text: prints the answer to each and its score, separated by a tab.

    The score is by how much the logits of the answer exceed those of no answer.
    """

    directory: Directory
    """A run directory (made by an experiment) or a model in Hugging Face layout with its tokenizer."""
    question: tuple[str, ...] = ()
    """Questions about one text, as --question "Who?" "Where?"."""
    context: Path | None = None
    """File with the text of --question (.gz too). Without it, the text is standard input."""
    file: Path | None = None
    """Instead of --question: a file with one JSON object {"question": ..., "context": ...} a line."""
    no_answer_threshold: float | None = None
    """Print an empty answer unless the score is above it; None always answers."""
    max_answer_tokens: int = 30
    """Most tokens of an answer."""
    max_length: int | None = None
    """Most tokens of a window of the text; None is 384, or the model's positions if they are fewer."""
    stride: int | None = None
    """Tokens that two neighbouring windows share; None is a third of --max-length."""
    batch_size: int = 32
    """Windows that are read together."""
    dtype: str | None = None
    """Compute dtype, e.g. bfloat16; None keeps the model's."""

    def run(self) -> int:
        """Print one line for each question."""
        questions, contexts = self._questions()
        model, params, tokenizer = load(self.directory, self.dtype)
        found = answer(
            model, params, tokenizer, questions, contexts, max_answer_tokens=self.max_answer_tokens,
            max_length=self.max_length, stride=self.stride, no_answer_threshold=self.no_answer_threshold,
            batch_size=self.batch_size,
        )  # fmt: skip
        for one in found:
            print(f"{one_line(one.text)}\t{one.score:.4f}")
        return 0

    def _questions(self) -> tuple[list[str], list[str]]:
        """The questions, and the text of each."""
        if self.file is not None:
            if self.question or self.context is not None:
                raise ValueError("give --question with --context, or --file, not both")
            rows = read_jsonl(self.file, {"question": "question", "context": "context"})
            for number, row in enumerate(rows, start=1):
                for name in ("question", "context"):
                    if not isinstance(row[name], str):
                        raise ValueError(f"{self.file}: {name} {number} must be a text, got {row[name]!r}")
            return rows.column("question"), rows.column("context")
        if not self.question:
            raise ValueError("there is no question: give --question (with --context FILE), or --file FILE")
        context = sys.stdin.read() if self.context is None else read_text(self.context)
        if not context.strip():
            raise ValueError(f"{self.context or 'standard input'} is empty: it must hold the text of the questions")
        return list(self.question), [context] * len(self.question)
