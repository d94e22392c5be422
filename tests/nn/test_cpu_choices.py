"""Tests of the values for a CPU, and of the file that replaces their defaults."""

import dataclasses
import json

import jaxlib.version
import pytest

from jaxlm import config, host, processes
from jaxlm.nn import choices, cpu_choices
from jaxlm.nn.cpu_choices import VARIABLE, Calibration, CpuChoices, active_calibration
from jaxlm.training import checks

HERE = {"processor": host.processor_model(), "cores": 2, "jaxlib": jaxlib.version.__version__, "date": "2026-11-30"}


@pytest.fixture
def use_file(tmp_path, monkeypatch):
    """A function that writes a calibration file and sets the variable to its path. The values are read again."""

    def write(content):
        path = tmp_path / "choices.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        monkeypatch.setenv(VARIABLE, str(path))
        cpu_choices._process_values.cache_clear()
        return path

    yield write
    cpu_choices._process_values.cache_clear()


def error_of(function, kind=ValueError):
    with pytest.raises(kind) as error:
        function()
    return str(error.value)


def test_the_values_of_an_active_file_are_chosen(use_file):
    """The functions of ``choices`` read each field, and a field that the file lacks is the default."""
    chosen = {
        "min_blockwise_queries": lambda: choices.attention(100, 100, biases=False, reasons={"decode": "no"}),
        "max_shared_mask_queries": lambda: choices.share_mask_between_heads(300, has_integers=True),
        "recurrence_chunk_rows": lambda: choices.recurrence_chunk(4, 1000),
        "linear_attention_chunk": choices.linear_attention_chunk,
        "gated_delta_rule_chunk": choices.gated_delta_rule_chunk,
        "generalized_delta_rule_chunk": lambda: choices.generalized_delta_rule_chunk(lambda steps: True),
        "max_loop_state": lambda: choices.loops_without_gradient(64, 2**17, per_channel=False),
        "decode_partial_sums": lambda: choices.decode_partial_sums(64),
        "max_few_rows": lambda: choices.is_table_first_operand(50, 64),
        "max_logits": choices.max_logits,
    }
    assert set(chosen) == {field.name for field in dataclasses.fields(CpuChoices)}
    defaults = {name: function() for name, function in chosen.items()}
    assert defaults["min_blockwise_queries"] == "reference"
    larger = {
        field.name: field.default // 2 if field.name == "min_blockwise_queries" else 2 * field.default
        for field in dataclasses.fields(CpuChoices)
    }
    for name, value in larger.items():
        use_file({**HERE, "values": {name: value}})
        for other, function in chosen.items():
            assert (function() == defaults[other]) == (other != name), (name, other)


def test_without_the_variable_or_with_an_empty_one_the_defaults_are_used(use_file, monkeypatch):
    use_file({**HERE, "values": {"max_few_rows": 64}})
    assert cpu_choices.cpu_choices() == CpuChoices(max_few_rows=64)
    assert active_calibration() == Calibration(**HERE, values=CpuChoices(max_few_rows=64))
    monkeypatch.setenv(VARIABLE, "")
    assert cpu_choices.cpu_choices() == CpuChoices(max_few_rows=64), "the file is read once"
    cpu_choices._process_values.cache_clear()
    assert cpu_choices.cpu_choices() == CpuChoices()
    assert active_calibration() is None
    with cpu_choices.use(CpuChoices(max_few_rows=8)):
        assert cpu_choices.cpu_choices().max_few_rows == 8


def test_a_written_file_is_read_unchanged(use_file):
    calibration = Calibration(**HERE, values=CpuChoices(max_logits=2**23))
    config.write(calibration, use_file({}))
    assert active_calibration() == calibration


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"values": {"max_rows": 3}}, "calibration.values has an unknown field 'max_rows': "),
        ({"values": {"max_few_rows": 2.5}}, "calibration.values.max_few_rows=2.5 must be a whole number"),
        ({"values": {"max_few_rows": True}}, "calibration.values.max_few_rows=True must be a whole number"),
        ({"values": {"max_few_rows": 0}}, "max_few_rows=0 must be at least 1"),
        ({"values": {"linear_attention_chunk": 48}}, "linear_attention_chunk=48 must be a power of two"),
        ({"values": {"min_blockwise_queries": 2048}}, "min_blockwise_queries=2048 must be at most 1024"),
        ({"cpu": "x"}, "calibration has an unknown field 'cpu'"),
        ({"processor": "Intel Xeon"}, f"was measured with processor Intel Xeon, but this is {HERE['processor']}"),
        ({"jaxlib": "0.1.2"}, f"was measured with jaxlib 0.1.2, but this is {HERE['jaxlib']}"),
    ],
)
def test_an_invalid_file_is_an_error_that_names_the_file_and_the_fix(use_file, changes, message):
    path = use_file({**HERE, "values": {}, **changes})
    for function in (active_calibration, choices.linear_attention_chunk, checks.check_cpu_choices):
        error = error_of(function)
        assert error.startswith(f"{VARIABLE}={path}")
        assert message in error
        assert error.endswith(f"run jaxlm calibrate --output {path} on this machine, or unset {VARIABLE}")


def test_a_damaged_or_missing_file_is_an_error(use_file):
    path = use_file("{")
    assert f"{path} is not JSON or is damaged" in error_of(active_calibration)
    use_file("[]")
    assert "must hold a JSON object" in error_of(active_calibration)
    use_file({"values": {}})
    assert "calibration lacks the fields 'processor', 'cores', 'jaxlib', 'date'" in error_of(active_calibration)
    path.unlink()
    assert f"{VARIABLE}={path} is not a file: run jaxlm calibrate" in error_of(active_calibration, FileNotFoundError)


def test_all_processes_need_the_same_values(use_file, monkeypatch):
    use_file({**HERE, "values": {"max_few_rows": 64}})
    checks.check_cpu_choices()
    monkeypatch.setattr(processes, "call_in_first_process", lambda make: CpuChoices().changes())
    assert "this process has max_few_rows=64, but the first process has all defaults" in error_of(
        checks.check_cpu_choices
    )


def test_accelerators_do_not_read_the_file(use_file, monkeypatch):
    use_file("{")
    monkeypatch.setattr(choices.sharding, "platform", lambda: "gpu")
    assert choices.linear_attention_chunk() == choices.LINEAR_ATTENTION_CHUNK_ACCELERATOR
    assert choices.max_logits() == choices.MAX_LOGITS_ACCELERATOR
