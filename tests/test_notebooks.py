"""Tests of the notebooks in docs/notebooks: their structure, their command lines, and (thorough) that they run."""

import json
import os
import re

import pytest

from tests.pages import ROOT, TASKS, command_lines, parse

NOTEBOOKS = ROOT / "docs/notebooks"
CELL_TIMEOUT = 600
"""Time limit of one cell, in seconds. A notebook takes about half a minute on one CPU core."""


def read(name):
    return json.loads((NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8"))


def source(cell):
    return "".join(cell["source"])


def test_each_task_has_a_notebook():
    assert sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")) == TASKS


@pytest.mark.parametrize("name", TASKS)
def test_a_notebook_is_small_and_stored_without_outputs(name):
    """Stored outputs would become out of date, and stored pictures would make every commit large."""
    notebook = read(name)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert len(notebook["cells"]) <= 10
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None


@pytest.mark.parametrize("name", TASKS)
def test_a_notebook_ends_with_the_command_of_the_experiment(name, monkeypatch):
    last = read(name)["cells"][-1]
    assert last["cell_type"] == "markdown"
    (words,) = command_lines(source(last))
    assert words[2] == f"experiments.{name}"
    assert parse(words, monkeypatch) == 0
    for link in re.findall(r"\]\(([^)]+)\)", source(last)):
        assert (NOTEBOOKS / link).exists(), link


@pytest.mark.thorough
@pytest.mark.parametrize("name", TASKS)
def test_a_notebook_runs(name, tmp_path):
    import nbclient
    import nbformat

    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    # XLA_FLAGS of the tests turn off compiler optimizations.
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    client = nbclient.NotebookClient(
        notebook, timeout=CELL_TIMEOUT, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute(env=environment)

    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    formats = {kind for output in outputs for kind in output.get("data", {})}
    assert "image/png" in formats, "the curves of the training"
    assert ("image/svg+xml" in formats) == (name == "chess"), "the boards"
    text = "".join(output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in outputs)
    losses = [float(loss) for loss in re.findall(r"validation .*?loss (\d+\.\d+)", text)]
    assert len(losses) >= 3, "lines of progress"
    assert losses[-1] < losses[0]
    assert "Warning" not in text
