"""The comparison of plans with measurements on this machine."""

import json

import jax
import numpy as np
import pytest

from benchmarks import plans, report
from jaxlm import get_model, spec
from jaxlm.plan import plan
from jaxlm.testing.helpers import initial_params


@pytest.mark.thorough
def test_a_plan_for_this_machine_has_memory_and_flops():
    result = plan(get_model("gpt2-tiny"), "local", "data=4,fsdp=2", batch=8, sequence=16)
    assert (result.fits, result.devices, result.device_kind) == (True, 8, "cpu")
    assert result.memory.limit is None
    assert result.memory.total >= result.memory.parts["parameters"] + result.memory.parts["optimizer"]
    assert result.seconds is None  # the compiler for CPUs estimates no cycles


@pytest.mark.thorough
def test_the_command_compares_memory_and_time(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("XLA_FLAGS")  # one device
    path = tmp_path / "plans.json"
    assert plans.main(["--quick", "--steps", "2", "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "gpt2-tiny, decode, cache 8 x 32" in printed
    record = json.loads(path.read_text())
    assert record["machine"]["peaks"] in printed
    rows = record["rows"]
    assert [row.shape for row in report.read(tmp_path)] == [case.name for case in plans.QUICK_CASES]
    assert len(rows) == len(plans.QUICK_CASES)
    for row in rows:
        assert row["measured_bytes"] > 0.5 * row["planned_bytes"]
        assert 0 < row["bound"] < row["seconds"]


@pytest.mark.parametrize("name", ["gpt2-tiny", "t5-tiny"])
def test_decoding_is_measured_with_a_full_cache(name):
    model = get_model(name)
    state = plans.state_after(model, initial_params(model), batch=2, length=12, count=9)
    abstract = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(state)]
    sizes = {"source_length": 12} if model.reads_source else {}
    assert abstract == [(leaf.shape, leaf.dtype) for leaf in spec.flatten(model.state_specs(2, 12, **sizes)).values()]
    assert np.all(np.asarray(state["length"]) == 9)


def test_wrong_options_print_an_error(capsys):
    assert plans.main(["--steps", "0"]) == 2
    assert "--steps 0 must be from 1 to" in capsys.readouterr().err
    assert plans.main(["--model", "gpt2-tiny", "--sequence", "10", "--decode"]) == 2
    assert "8 measured steps and 2 of warm-up need more than 10 slots" in capsys.readouterr().err
    assert plans.main(["--quick", "--model", "gpt2"]) == 2
    assert "--quick measures tiny models: leave out --model" in capsys.readouterr().err
