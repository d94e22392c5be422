"""The lines that show the progress of a run."""

import io
import os
import sys
import types

import pytest
from rich.console import Console

from jaxlm.training import progress
from jaxlm.training.progress import ProgressBar


def test_the_remaining_time_does_not_count_the_steps_before_a_rollback(monkeypatch):
    seconds, output = iter(range(100)), io.StringIO()
    monkeypatch.setattr(progress.time, "perf_counter", lambda: float(next(seconds)))
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    bar = ProgressBar(10, console=Console(file=output, width=200))
    for step in (1, 2, 3, 4, 3, 4):  # one second per step; a rollback to step 2 after step 4
        bar.update(step, 1.0, None)
    left = [line.rpartition(" · ")[2] for line in output.getvalue().splitlines()]
    assert left[1:4] == ["8 s left", "7 s left", "6 s left"]
    assert not left[4].endswith("left")
    assert left[5] == "6 s left"


def test_a_notebook_has_one_live_line_and_a_line_for_each_message(monkeypatch):
    outputs = []

    def display(value, *, raw=False, display_id=False):
        outputs.append(value["text/plain"] if raw else value.text.strip())
        index = len(outputs) - 1
        return types.SimpleNamespace(update=lambda data, raw: outputs.__setitem__(index, data["text/plain"]))

    module = types.SimpleNamespace(display=display)
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(display=module))
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_UPDATES", 0.0)
    errors = io.StringIO()
    with ProgressBar(3, console=Console(file=errors, force_jupyter=True, width=200)) as bar:
        bar.update(1, 4.0, None)
        bar.update(2, 3.0, 100.0)
        bar.say("step 2: validation loss 3.1")
        bar.update(3, 2.0, 100.0)
    assert len(outputs) == 2
    assert outputs[0].startswith("step 3/3 · loss 2.000 · 100 tok/s · ")
    assert outputs[1] == "step 2: validation loss 3.1"
    assert not errors.getvalue()


@pytest.mark.thorough
def test_the_kernel_of_a_notebook_keeps_one_live_line():
    nbclient = pytest.importorskip("nbclient")
    import nbformat

    code = """
from jaxlm.training import progress
progress.SECONDS_BETWEEN_UPDATES = 0.0
with progress.ProgressBar(5) as bar:
    for step in range(1, 6):
        bar.update(step, 1.0 / step, None)
    bar.say("step 5: validation loss 0.5")
"""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute(env=dict(os.environ))
    texts = [output["data"]["text/plain"].strip() for output in notebook.cells[0].outputs]
    assert len(texts) == 2
    assert texts[0].startswith("step 5/5 · loss 0.200")
    assert texts[1] == "step 5: validation loss 0.5"
