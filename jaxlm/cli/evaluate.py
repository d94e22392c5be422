"""``jaxlm evaluate``: scores on tasks of EleutherAI's lm-evaluation-harness."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from jaxlm.cli.common import ModelCommand
from jaxlm.command_line import check_output_file


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate(ModelCommand):
    """Evaluate a model on tasks of lm-evaluation-harness. Prints a table. Needs the extra eval of jaxlm.

    The data sets of most tasks are downloaded from the Hugging Face Hub.
    """

    tasks: tuple[str, ...]
    """Names of tasks or task groups, from the harness or from --include-path."""
    include_path: Path | None = None
    """Directory with the YAML files of additional tasks."""
    limit: int | None = None
    """Maximum documents per task; None: all documents."""
    num_fewshot: int | None = None
    """Few-shot examples in each context; None: the number that the task sets."""
    batch_size: int = 32
    """Requests per batch."""
    max_length: int | None = None
    """Maximum tokens that the model reads; None: the model's max_positions, or no limit if it has none."""
    prefix_token_id: int | None = None
    """Id of the token that replaces an empty context; None: the tokenizer's BOS token, or its end token if it has
    no BOS token."""
    max_gen_toks: int = 256
    """Maximum tokens to generate, for tasks that do not set a limit."""
    seed: int = 0
    """Seed for sampling in tasks that generate text."""
    output: Path | None = None
    """JSON file for the results."""

    def run(self) -> int:
        """Print the table of results and return the exit status."""
        if not self.tasks:
            raise ValueError("there are no tasks: give --tasks NAME")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"--limit {self.limit} must be at least 1")
        if self.include_path is not None and not self.include_path.is_dir():
            raise ValueError(f"--include-path {self.include_path} is not a directory")
        check_output_file("output", self.output)
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise ValueError(f"--num-fewshot {self.num_fewshot} must be at least 0")
        from jaxlm.tasks.lm_eval import HarnessModel  # isort: skip (imported first: its error names the extra)
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
        from lm_eval.utils import handle_non_serializable, make_table

        model, params, tokenizer = self.load()
        harness_model = HarnessModel(
            model, params, tokenizer, batch_size=self.batch_size, max_length=self.max_length,
            prefix_token_id=self.prefix_token_id, max_gen_toks=self.max_gen_toks, seed=self.seed,
        )  # fmt: skip
        # The names are checked after the other options, because the harness needs about ten seconds to read its tasks.
        manager = TaskManager(include_path=None if self.include_path is None else str(self.include_path))
        unknown = [name for name in self.tasks if name not in manager.all_tasks]
        if unknown:
            raise ValueError(f"unknown tasks {', '.join(unknown)}: run `lm_eval ls tasks` to see all names")
        results: dict[str, Any] = simple_evaluate(
            model=harness_model, tasks=list(self.tasks), num_fewshot=self.num_fewshot, limit=self.limit,
            batch_size=self.batch_size, task_manager=manager, log_samples=False,
        )  # fmt: skip
        print(make_table(results))
        if results.get("groups"):
            print(make_table(results, "groups"))
        for method, count in harness_model.requests.truncated.items():
            if count:
                action = "scored in several windows" if method.startswith("rolling") else "truncated"
                max_length = harness_model.requests.max_length
                print(f"{count} requests were {action}: the model reads at most {max_length} tokens")
        if self.output is not None:
            text = json.dumps(results, indent=2, default=handle_non_serializable, ensure_ascii=False)
            self.output.write_text(text + "\n", encoding="utf-8")
        return 0
