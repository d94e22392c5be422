"""Tests of which packages an import of jaxlm loads. Each import runs in its own process."""

import subprocess
import sys

import pytest

from jaxlm.models import FAMILIES

OPTIONAL = {
    "torch", "transformers", "tokenizers", "matplotlib", "grain", "datasets", "chess", "sacrebleu", "rouge_score",
    "peft", "lm_eval", "equinox",
}  # fmt: skip


def modules_after(statement: str) -> set[str]:
    """The modules that ``statement`` loads in addition to those of ``import jax``, without the standard library."""
    script = (
        f"import sys, jax; before = set(sys.modules); {statement};"
        "print(*(name for name in set(sys.modules) - before if name.partition('.')[0] not in sys.stdlib_module_names))"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=100)
    return set(run.stdout.split())


def packages(modules: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in modules}


def packages_after(statement: str) -> set[str]:
    return packages(modules_after(statement))


def test_import_jaxlm_loads_only_jaxlm_and_safetensors():
    modules = modules_after("import jaxlm")
    assert packages(modules) == {"jaxlm", "safetensors"}
    lazy_modules = {f"jaxlm.{package}.{name}" for package in ("models", "interop.formats") for name in FAMILIES}
    assert modules & lazy_modules == set()


@pytest.mark.plain_cases(1)
@pytest.mark.parametrize(
    "name",
    [
        "cli", "checkpoint", "decoding", "data", "training.loop", "training.experiment", "interop.huggingface",
        "interop.peft", "metrics", "tasks.predict", "tasks.text_requests", "tasks.classification", "data.games",
    ],
)  # fmt: skip
def test_no_module_imports_an_optional_package(name):
    packages = packages_after(f"import jaxlm.{name}")
    assert "jaxlm" in packages
    assert packages & OPTIONAL == set()


@pytest.mark.thorough
def test_the_experiment_imports_matplotlib_only_for_a_plot():
    assert packages_after("import experiments.text_generation") & OPTIONAL == set()
