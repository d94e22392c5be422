"""What an import brings along, each in a process of its own."""

import subprocess
import sys

import pytest

OPTIONAL = {
    "torch", "transformers", "tokenizers", "matplotlib", "grain", "datasets", "chess", "sacrebleu", "rouge_score",
    "peft", "lm_eval",
}  # fmt: skip


def packages_after(statement: str) -> set[str]:
    """Top-level packages that ``statement`` adds to what ``import jax`` has loaded, the standard library left out."""
    script = (
        f"import sys, jax; before = set(sys.modules); {statement};"
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names)"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=100)
    return set(run.stdout.split())


def test_import_jaxlm_is_light():
    assert packages_after("import jaxlm") == {"jaxlm", "safetensors"}


@pytest.mark.parametrize(
    "name",
    [
        "cli", "checkpoint", "decoding", "data", "training.loop", "training.experiment", "interop.huggingface",
        "interop.peft", "metrics", "tasks.predict", "tasks.text_requests", "tasks.classification", "data.games",
    ],
)  # fmt: skip
def test_no_part_imports_what_is_optional(name):
    packages = packages_after(f"import jaxlm.{name}")
    assert "jaxlm" in packages
    assert packages & OPTIONAL == set()


def test_the_experiment_draws_with_matplotlib_only_when_it_draws():
    assert packages_after("import experiments.text_generation") & OPTIONAL == set()
