"""Tests of the measurements of ``jaxlm calibrate``."""

import dataclasses
import itertools
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import cli, host
from jaxlm.nn import calibration, cpu_choices
from jaxlm.nn.calibration import MEASUREMENTS, Measurement, Program, Result
from jaxlm.nn.cpu_choices import VARIABLE, CpuChoices
from jaxlm.testing.helpers import assert_trees_close


def test_every_field_has_a_measurement_whose_candidates_are_valid_and_contain_the_default():
    defaults = dataclasses.asdict(CpuChoices())
    assert set(MEASUREMENTS) == set(defaults)
    for name, (candidates, _) in MEASUREMENTS.items():
        assert defaults[name] in candidates
        assert list(candidates) == sorted(set(candidates))
        for candidate in candidates:
            CpuChoices(**{name: candidate})  # raises if the value is invalid


@pytest.mark.thorough
@pytest.mark.parametrize("name", MEASUREMENTS)
def test_neighbouring_candidates_give_different_programs(name):
    """Otherwise, their times would say nothing about the value. The first program is the one of ``--quick``."""
    candidates, make_programs = MEASUREMENTS[name]
    values = CpuChoices()
    different = set()
    for number, program in enumerate(make_programs()):
        settings = [dataclasses.replace(values, **{name: candidate}) for candidate in candidates]
        texts = [text for text, _ in calibration.lower(program, settings)]
        different |= {index for index, (one, two) in enumerate(itertools.pairwise(texts)) if one != two}
        if number == 0:
            assert different
    assert different == set(range(len(candidates) - 1))


def result(*rounds, default=2):
    return Result("field", default, (1, 2, 4), {"program": np.array(rounds)})


def test_the_chosen_value_is_clearly_faster_in_both_halves_of_the_rounds():
    assert result([1.0, 1.0, 0.9], [1.0, 1.0, 0.9]).chosen == 4
    assert result([1.0, 1.0, 0.96], [1.0, 1.0, 0.96]).chosen == 2, "not faster by 5 %"
    assert result([1.0, 1.0, 0.5], [1.0, 1.0, 1.0]).chosen == 2, "only in the first half"
    assert result([0.8, 1.0, 0.5], [0.8, 1.0, 1.0]).chosen == 1
    slow_machine = [30.0, 30.0, 20.0]  # the times are compared within a round
    assert result([1.0, 1.0, 0.7], slow_machine, [1.0, 1.0, 0.7], slow_machine).chosen == 4


def test_of_equally_fast_values_the_nearest_to_the_default_is_chosen():
    times = np.array([[0.5, 0.505, 1.0, 2.0]] * 4)
    assert Result("field", 4, (1, 2, 4, 8), {"program": times}).chosen == 2


def test_programs_count_equally_whatever_their_times_are():
    fast, slow = np.array([[1.0, 2.0]] * 4), np.array([[300.0, 200.0]] * 4)
    relative = Result("field", 1, (1, 2), {"fast": fast, "slow": slow}).relative_times()
    np.testing.assert_allclose(relative, [1.0, (2.0 * 2.0 / 3.0) ** 0.5])


def test_equal_programs_do_not_count():
    """A limit changes only the programs whose size is between the default and the candidate."""
    different, equal = np.array([[0.9, 1.0, 1.2]] * 4), np.array([[0.3, 0.3, 0.3]] * 4)
    result = Result("field", 2, (1, 2, 4), {"a": different, "b": equal, "c": equal})
    np.testing.assert_allclose(result.relative_times(), [0.9, 1.0, 1.2])
    assert result.chosen == 1


def test_the_fastest_value_is_the_one_with_the_smallest_mean_over_all_programs():
    first, second = np.array([[0.9, 1.0, 1.0]] * 4), np.array([[0.8, 0.8, 1.0]] * 4)
    result = Result("field", 4, (1, 2, 4), {"first": first, "second": second})
    np.testing.assert_allclose(result.relative_times(), [0.72**0.5, 0.8, 1.0])
    assert result.chosen == 1


def test_the_programs_run_in_turn_and_equal_programs_are_measured_once(monkeypatch):
    compiled = []

    class Lowered:
        def __init__(self, value):
            self.value = value

        def compile(self):
            compiled.append(self.value)
            return lambda: time.sleep(0.001 * self.value)

    calls = lambda program, settings: [(str(x), Lowered(x)) for x in (min(s.max_few_rows, 2) for s in settings)]  # noqa: E731
    monkeypatch.setattr(calibration, "lower", calls)
    monkeypatch.setattr(calibration, "MIN_RUN_SECONDS", 1e-9)
    programs = lambda: iter([Program("a", None, ()), Program("b", None, ())])  # noqa: E731
    monkeypatch.setitem(MEASUREMENTS, "max_few_rows", Measurement((1, 2, 32), programs))
    quick = calibration.measure("max_few_rows", CpuChoices(), quick=True)
    assert list(quick.seconds) == ["a"]
    assert compiled == [1, 2]
    (times,) = quick.seconds.values()
    assert times.shape == (calibration.QUICK_ROUNDS, 3)
    np.testing.assert_array_equal(times[:, 1], times[:, 2])
    assert (times[:, 0] >= 0.001).all()
    assert (times[:, 1] >= 0.002).all()
    monkeypatch.setattr(calibration, "SECONDS", 0.0)
    full = calibration.measure("max_few_rows", CpuChoices())
    assert [x.shape for x in full.seconds.values()] == [(calibration.MIN_ROUNDS, 3)] * 2


@pytest.fixture
def small_measurement(monkeypatch):
    """One measurement of a small program. Replaces the real ones, which take minutes."""
    monkeypatch.setattr(host, "keep_freed_memory", lambda: True)

    def programs():
        function = lambda x: x @ jnp.full((4, cpu_choices.cpu_choices().max_few_rows), 2.0)  # noqa: E731
        yield Program("product", function, (jnp.ones((2, 4)),))

    monkeypatch.setattr(calibration, "MEASUREMENTS", {"max_few_rows": Measurement((8, 32), programs)})


def test_the_command_writes_a_file_that_the_variable_activates(small_measurement, tmp_path, monkeypatch, capsys):
    path = tmp_path / "with space" / "choices.json"
    monkeypatch.setenv(VARIABLE, "nowhere")  # calibrate ignores the variable
    cpu_choices._process_values.cache_clear()
    assert cli.main(["calibrate", "--quick", "--output", str(path)]) == 2
    assert "there is no directory" in capsys.readouterr().err
    path.parent.mkdir()
    assert cli.main(["calibrate", "--quick", "--output", str(path)]) == 0
    output = capsys.readouterr().out
    assert output.splitlines()[0].startswith(host.processor_model())
    assert "max_few_rows: default 32, " in output
    assert "| product " in output
    assert f"export {VARIABLE}='{path}'" in output
    content = json.loads(path.read_text())
    assert set(content["values"]) == {field.name for field in dataclasses.fields(CpuChoices)}
    content["values"]["max_few_rows"] = 8
    path.write_text(json.dumps(content))
    monkeypatch.setenv(VARIABLE, str(path))
    assert cpu_choices.active_calibration().values == CpuChoices(max_few_rows=8)
    assert cli.main(["doctor"]) == 0
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("cpu choices"))
    assert str(path) in line
    assert line.endswith(": max_few_rows=8")
    path.write_text("{")
    assert cli.main(["doctor"]) == 0
    assert f"ERROR: {VARIABLE}={path}: " in capsys.readouterr().out
    monkeypatch.delenv(VARIABLE)
    assert cli.main(["doctor"]) == 0
    assert f"defaults ({VARIABLE} is not set)" in capsys.readouterr().out


def test_the_default_file_is_in_the_home_directory(small_measurement, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cli.main(["calibrate", "--quick"]) == 0
    assert (tmp_path / ".config/jaxlm/choices.json").is_file()
    assert cli.main(["calibrate", "--quick"]) == 0  # replaces the file


@pytest.mark.thorough
def test_real_measurements_run(monkeypatch, tmp_path, capsys):
    """Those that take little time."""
    monkeypatch.setattr(host, "keep_freed_memory", lambda: True)
    chosen = {name: MEASUREMENTS[name] for name in ("max_loop_state", "decode_partial_sums", "max_few_rows")}
    monkeypatch.setattr(calibration, "MEASUREMENTS", chosen)
    assert cli.main(["calibrate", "--quick", "--output", str(tmp_path / "choices.json")]) == 0
    output = capsys.readouterr().out
    for name, (candidates, _) in chosen.items():
        assert f"{name}: default {getattr(CpuChoices(), name)}, " in output
        assert f"| {candidates[0]} " in output


@pytest.mark.thorough
@pytest.mark.parametrize("name", MEASUREMENTS)
def test_all_candidates_give_the_same_results(name):
    candidates, make_programs = MEASUREMENTS[name]
    program = next(make_programs())
    settings = [dataclasses.replace(CpuChoices(), **{name: candidate}) for candidate in candidates]
    different = dict(calibration.lower(program, settings))
    first, *others = (lowered.compile()(*program.arguments) for lowered in different.values())
    assert others
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(first))
    for results in others:
        assert_trees_close(results, first, 1e-5)
