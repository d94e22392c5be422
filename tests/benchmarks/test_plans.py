"""The comparison of plans with measurements on this machine."""

import json

import pytest

from benchmarks import plans
from jaxlm import get_model
from jaxlm.plan import plan


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
    assert "gpt2-tiny, decode, after 8 x 32" in capsys.readouterr().out
    rows = json.loads(path.read_text())["rows"]
    assert len(rows) == len(plans.SMALL)
    for row in rows:
        assert row["measured_bytes"] > 0.5 * row["planned_bytes"]
        assert 0 < row["bound"] < row["seconds"]


def test_wrong_options_print_an_error(capsys):
    assert plans.main(["--steps", "0"]) == 2
    assert "--steps 0 must be from 1 to" in capsys.readouterr().err
    assert plans.main(["--quick", "--model", "gpt2"]) == 2
    assert "--quick measures tiny models: leave out --model" in capsys.readouterr().err
