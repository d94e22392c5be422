"""``jaxlm answer``: extractive question answering."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from jaxlm.cli.common import STANDARD_INPUT, ModelCommand, standard_input
from jaxlm.data import read_text
from jaxlm.data.examples import read_jsonl
from jaxlm.data.text_files import escape_field
from jaxlm.tasks.question_answering import answer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer(ModelCommand):
    """Answer questions with spans of a text. Prints each answer and its score, separated by a tab.

    The score is the logit of the answer minus the logit of "no answer". The logit of an answer is the start logit of
    its first token plus the end logit of its last token.
    """

    question: tuple[str, ...] = ()
    """One or more questions about one text, for example --question "Who?" "Where?"."""
    context: Path | None = None
    """File with the text for --question; may be compressed (.gz). None: the text is read from standard input."""
    file: Path | None = None
    """Instead of --question: a file with one JSON object {"question": ..., "context": ...} per line."""
    no_answer_threshold: float | None = None
    """Print an empty answer if the score is at most this number; None: always print an answer."""
    max_answer_tokens: int = 30
    """Maximum tokens per answer."""
    max_length: int | None = None
    """Maximum tokens per window. A window has the question and a part of the text. None: 384, or the model's
    max_positions if that is less."""
    stride: int | None = None
    """Tokens of the text that two consecutive windows share; None: a third of --max-length."""
    batch_size: int = 32
    """Windows per batch."""

    def run(self) -> int:
        """Print one line per question and return the exit status."""
        questions, contexts = self._questions()
        model, params, tokenizer = self.load()
        answers = answer(
            model, params, tokenizer, questions, contexts, max_answer_tokens=self.max_answer_tokens,
            max_length=self.max_length, stride=self.stride, no_answer_threshold=self.no_answer_threshold,
            batch_size=self.batch_size,
        )  # fmt: skip
        for result in answers:
            print(f"{escape_field(result.text)}\t{result.score:.4f}")
        return 0

    def _questions(self) -> tuple[list[str], list[str]]:
        """The questions, and the context of each question."""
        if self.file is not None:
            if self.question or self.context is not None:
                raise ValueError("give --question with --context, or --file, not both")
            rows = read_jsonl(self.file, {"question": "question", "context": "context"})
            for number, row in enumerate(rows):
                for name in ("question", "context"):
                    if not isinstance(row[name], str):
                        raise ValueError(f"{self.file}: {name} {number} must be a string, got {row[name]!r}")
            return rows.column("question"), rows.column("context")
        if not self.question:
            raise ValueError("there is no question: give --question (with --context FILE), or --file FILE")
        context = standard_input() if self.context is None else read_text(self.context)
        if not context.strip():
            raise ValueError(f"{self.context or STANDARD_INPUT} is empty: it must contain the text for the questions")
        return list(self.question), [context] * len(self.question)
