"""The benchmark harness: statistics, checks, tables and worker processes. No framework is measured here."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import (
    attention,
    decoding,
    fidelity,
    harness,
    recurrence,
    scan_baselines,
    scans,
    shapes,
    texts,
    training,
)
from benchmarks.baselines import JaxSampled, Sampled
from benchmarks.harness import Failure, Row, UserError, Worker
from benchmarks.worker import Implementation, find
from jaxlm import get_model
from jaxlm.plan import flops


class Dummy(Implementation):
    """An implementation that counts its repetitions.

    ``fault`` makes it fail: in "setup", by a missing "package", in "run", or by "death". "slow read": reading a result
    takes a second.
    """

    def __init__(self, start: int, fault: str = "") -> None:
        print("a library greets")
        self.count, self.fault = start, fault
        if fault == "setup":
            raise ValueError("no such size")
        if fault == "package":
            raise ModuleNotFoundError("No module named 'torch'")

    def run(self) -> Any:
        print("a library talks\n{}")
        if self.fault == "run":
            raise RuntimeError("out of luck")
        if self.fault == "death":
            print("the last words", file=sys.stderr, flush=True)
            os._exit(3)
        self.count += 1
        return self.count

    def read(self, result: Any) -> Any:
        if self.fault == "slow read":
            time.sleep(1.0)
        return result

    def facts(self) -> dict[str, Any]:
        return {"count": self.count, "environment": os.environ.get("JAXLM_TEST")}


DUMMY = f"{__name__ if __name__.startswith('tests.') else 'tests.benchmarks.' + __name__}:Dummy"


def start(directory: Path, **arguments: Any) -> contextlib.closing[Worker]:
    return contextlib.closing(Worker("dummy", DUMMY, directory / "log", **arguments))


class FakeWorker:
    """A fake worker. It returns times from a list and appends its name to ``calls`` at each run."""

    platform = "cpu"

    def __init__(self, name: str, calls: list[str], seconds: list[float], value: Any) -> None:
        self.name, self.calls, self.seconds, self.value = name, calls, iter(seconds), value

    def run(self) -> tuple[float, Any]:
        self.calls.append(self.name)
        return next(self.seconds), self.value

    def facts(self) -> dict[str, Any]:
        return {"peak_process_bytes": 2_500_000_000, "platform": self.platform}


WORK = shapes.Work(tokens=100, amount=6e12, unit="FLOP", formula="6*N*tokens")


@pytest.fixture
def calls() -> list[str]:
    return []


@pytest.fixture
def rows(calls: list[str]) -> list[Row]:
    """Rows of a measurement with two warm-up repetitions and three rounds. First repetitions and round 3 are slow."""
    implementations: dict[str, Any] = {
        "jaxlm": FakeWorker("jaxlm", calls, [5.0, 2.0, 9.0, 1.0, 9.0, 2.0, 9.0, 20.0], 1.0),
        "torch": FakeWorker("torch", calls, [4.0, 4.0, 9.0, 3.0, 9.0, 4.0, 9.0, 40.0], 1.0),
    }
    machine: Any = FakeWorker("machine", calls, [1.0] * 6, {"FLOP": 12e12, "B": 1e9})
    return harness.measure("op", "B1", WORK, machine, implementations, warm_up=2, rounds=3, check=lambda values: None)


def test_implementations_alternate_and_each_round_starts_with_another(rows: list[Row], calls: list[str]) -> None:
    assert calls[:4] == ["jaxlm", "jaxlm", "torch", "torch"]
    assert calls[4::2] == calls[5::2]  # one repetition for warm-up and one that is measured
    assert calls[4::2] == ["machine", "jaxlm", "torch", "machine", "torch", "jaxlm", "machine", "jaxlm", "torch"]


def test_fast_runs_have_more_warm_up_repetitions(calls: list[str]) -> None:
    worker: Any = FakeWorker("jaxlm", calls, [0.2, 0.05, 0.1, 7.0], 1.0)
    assert harness.run_after_warm_up(worker) == (7.0, 1.0)


def test_a_row_has_statistics_of_its_rounds(rows: list[Row]) -> None:
    record = rows[0].record()
    assert (record["n"], record["median"], record["tokens_per_second"]) == (3, 2.0, 50.0)
    assert (record["p10"], record["p90"]) == pytest.approx((1.2, 16.4))
    assert (record["rate"], record["peak_percent"]) == (3e12, 25.0)
    assert record["compile_seconds"] == 3.0
    assert record["seconds"] == [1.0, 2.0, 20.0]
    assert rows[1].record()["compile_seconds"] == 0.0


def test_ratios_are_computed_per_round(rows: list[Row]) -> None:
    assert [row.ratio for row in rows] == [1.0, 2.0]
    assert harness.paired_ratio([3.0, 1.0, 20.0], [1.0, 1.0, 10.0]) == 2.0
    with pytest.raises(ValueError, match="zip"):
        harness.paired_ratio([1.0], [1.0, 2.0])


def test_the_check_receives_all_warm_up_values_and_runs_before_the_rounds(calls: list[str]) -> None:
    implementations: dict[str, Any] = {"jaxlm": FakeWorker("jaxlm", calls, [1.0] * 9, 7)}

    def check(values: dict[str, list[Any]]) -> None:
        raise Failure(f"saw {values}")

    machine: Any = FakeWorker("machine", calls, [1.0], {})
    with pytest.raises(Failure, match=r"saw \{'jaxlm': \[7, 7, 7\]\}"):
        harness.measure("op", "B1", WORK, machine, implementations, warm_up=3, rounds=3, check=check)
    assert calls == ["jaxlm"] * 3


def test_implementations_on_different_devices_are_not_compared(calls: list[str]) -> None:
    implementations: dict[str, Any] = {name: FakeWorker(name, calls, [1.0] * 9, 7) for name in ("jaxlm", "torch")}
    implementations["jaxlm"].platform = "gpu"
    with pytest.raises(Failure, match="different devices, {'jaxlm': 'gpu', 'torch': 'cpu'}"):
        harness.measure(
            "op", "B1", WORK, implementations["jaxlm"], implementations, warm_up=2, rounds=1, check=lambda values: None
        )
    assert calls == []


def test_speed_table_has_statistics_and_ratio(rows: list[Row]) -> None:
    lines = harness.speed_table(rows).splitlines()
    assert lines[0] == "op, float32, B1, 3 rounds"
    assert lines[1].split("  ")[0] == "implementation"
    assert lines[2].split() == ["jaxlm", "2", "1.2", "16.4", "50.0", "3", "25.0", "3.0", "n/a", "2.50", "n/a"]
    assert len({len(line) for line in lines[1:4]}) == 1
    assert WORK.formula in lines[4]
    assert lines[-1] == "jaxlm is 2.00x as fast as torch"


def test_bytes_are_shown_as_gb_per_second(rows: list[Row]) -> None:
    row = dataclasses.replace(rows[0], work=shapes.Work(1, 4e9, "B", "bytes"), peak=8e9)
    assert "GB/s" in harness.speed_table([row])
    assert harness.speed_table([row]).splitlines()[2].split()[5:7] == ["2", "25.0"]


def test_write_json_writes_arguments_machine_and_rows(rows: list[Row], tmp_path: Path) -> None:
    options = training.Training(length=512, json=tmp_path / "out.json")
    harness.write_json(options.json, "training", options, {"device": "cpu"}, [row.record() for row in rows])
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["arguments"]["length"] == 512
    assert record["machine"] == {"device": "cpu"}
    assert record["rows"][1]["seconds"] == [3.0, 4.0, 40.0]
    assert record["rows"][1]["work"]["formula"] == WORK.formula


def test_describe_machine_has_versions_cores_and_flags() -> None:
    description = harness.describe_machine()
    assert "jax " in description["versions"]
    assert description["cores"] >= 1
    assert "xla_force_host_platform_device_count=8" in description["flags"]


# ---------------------------------------------------------------------------------------------------- checks


def test_losses_must_agree() -> None:
    tolerances = ((0, 1e-4), (1, 1e-3))
    harness.check_losses({"jaxlm": [10.0, 5.0], "torch": [10.0009, 5.004]}, tolerances)
    with pytest.raises(Failure, match=r"after 0 updates differ by 1.1e-04 \(allowed 1e-04\): jaxlm 10.0"):
        harness.check_losses({"jaxlm": [10.0, 5.0], "torch": [10.0011, 5.0]}, tolerances)
    with pytest.raises(Failure, match="after 1 updates"):
        harness.check_losses({"jaxlm": [10.0, 5.0], "torch": [10.0, 5.006]}, tolerances)
    for name in ("jaxlm", "torch"):
        with pytest.raises(Failure, match="nan"):
            harness.check_losses({"jaxlm": [1.0], "torch": [1.0], name: [float("nan")]}, ((0, 1.0),))


def test_tokens_must_be_the_same() -> None:
    tokens = [[1, 2], [3, 4]]
    harness.check_same({"jaxlm": [tokens, tokens], "torch": [tokens, tokens]})
    with pytest.raises(Failure, match="torch and jaxlm generated different tokens, starting at token 1 of row 1"):
        harness.check_same({"jaxlm": [tokens], "torch": [tokens, [[1, 2], [3, 5]]]})
    with pytest.raises(Failure, match="starting at token 1 of row 0"):
        harness.check_same({"jaxlm": [[[1]]], "torch": [[[1, 2]]]})


def test_choose_selects_implementations_and_reports_missing_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(harness.choose_implementations("", training.IMPLEMENTATIONS)) == ["jaxlm"]
    with pytest.raises(Failure, match=r"unknown baseline 'tensorflow': choose from .*torch-compile"):
        harness.choose_implementations("tensorflow", training.IMPLEMENTATIONS)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "torch" else object())
    assert list(harness.choose_implementations("flax, jaxlm", decoding.IMPLEMENTATIONS)) == ["jaxlm", "flax"]
    with pytest.raises(Failure, match=r"torch needs torch: pip install -e '\.\[reference\]' in"):
        harness.choose_implementations("torch", decoding.IMPLEMENTATIONS)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "transformers" else object())
    assert list(harness.choose_implementations("flax", recurrence.IMPLEMENTATIONS)) == ["jaxlm", "flax"]
    with pytest.raises(Failure, match="flax needs transformers"):
        harness.choose_implementations("flax", decoding.IMPLEMENTATIONS)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in ("jla", "fla") else object())
    for name, extra in (("jla", "jla"), ("fla", "reference")):
        with pytest.raises(
            Failure, match=rf"{name} needs {name}: pip install -e '\.\[{extra}\]' in .*leave {name} out"
        ):
            harness.choose_implementations(name, scans.IMPLEMENTATIONS)


def test_repeated_values_of_an_option_are_rejected() -> None:
    assert harness.names("variants", "bias, plain", ("plain", "bias")) == ["bias", "plain"]
    with pytest.raises(UserError, match="--variants has plain more than once: give it once"):
        harness.names("variants", "plain,bias,plain", ("plain", "bias"))
    with pytest.raises(UserError, match="--lengths has 8 more than once"):
        harness.parse_numbers("lengths", "8,16,8")


def test_a_user_error_prints_one_line_with_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert training.main(["--against", "nobody"]) == 2
    assert capsys.readouterr().err.startswith("benchmarks.training: unknown baseline 'nobody'")
    assert fidelity.main(["--batch", "1"]) == 2
    assert "at least 2" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        fidelity.main(["--model", "llama-tiny"])
    assert "invalid choice 'llama-tiny'" in capsys.readouterr().err


def test_fidelity_uses_float32_matmuls_on_accelerators(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import jax

    before = jax.config.jax_default_matmul_precision
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    try:
        with pytest.raises(FileNotFoundError):  # the directory has no model
            fidelity.jaxlm_results(tmp_path, np.ones((1, 2), int), np.ones((1, 2), int))
        assert jax.config.jax_default_matmul_precision == "float32"
    finally:
        jax.config.update("jax_default_matmul_precision", before)


def test_differences_are_relative_to_the_largest_value() -> None:
    assert fidelity.difference(np.array([1.0, 4.0]), np.array([1.5, -5.0])) == 9.0 / 5.0
    assert fidelity.difference(np.array([np.nan]), np.array([1.0])) == float("inf")
    with pytest.raises(Failure, match="shapes"):
        fidelity.difference(np.ones(2), np.ones((2, 1)))


def test_the_gradient_with_the_largest_difference_is_listed() -> None:
    exact = {name: np.ones(2) for name in ("hidden", "logits", "loss", "a.weight", "b.weight")}
    jaxlm_results = {**exact, "b.weight": np.array([1.0, 1.5])}
    rows = fidelity.compare("case", jaxlm_results, exact, exact)
    assert [row["result"] for row in rows] == ["hidden", "logits", "loss", "b.weight"]
    assert (rows[-1]["jaxlm_torch"], rows[-1]["torch_float64"]) == (0.5, 0.0)
    with pytest.raises(Failure, match=r"\['c.weight'\]"):
        fidelity.compare("case", {**jaxlm_results, "c.weight": np.ones(1)}, exact, exact)


def test_sampled_results_must_agree() -> None:
    results = {"output": [1.0, -4.0], "bias": [2.0, 0.0]}
    harness.check_samples(
        {"jaxlm": [results, results], "torch": [results, None, {**results, "output": [1.0001, -4.0]}]}, 1e-4
    )
    with pytest.raises(Failure, match="output of torch differs from jaxlm by 2.5e-03 of the largest sampled element"):
        harness.check_samples({"jaxlm": [results], "torch": [results, {**results, "output": [1.01, -4.0]}]}, 1e-4)
    with pytest.raises(Failure, match="bias of torch differs from jaxlm by nan"):
        harness.check_samples({"jaxlm": [results], "torch": [{**results, "bias": [float("nan"), 0.0]}]}, 1e-4)
    with pytest.raises(Failure, match=r"torch computes \['output'\], jaxlm \['bias', 'output'\]"):
        harness.check_samples({"jaxlm": [results], "torch": [{"output": [1.0, -4.0]}]}, 1e-4)


@pytest.mark.thorough
def test_attention_is_measured_in_every_variant(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.json"
    arguments = [
        "--quick",
        "--against",
        "",
        "--rounds",
        "1",
        "--variants",
        "plain,bias,relative,decode",
        "--json",
        str(path),
    ]
    assert attention.main(arguments) == 0
    rows = json.loads(path.read_text())["rows"]
    both_ways = {f"{variant} {passes}" for variant in ("plain", "bias", "relative") for passes in ("forward", "both")}
    assert {row["op"] for row in rows} == {*both_ways, "decode forward"}
    assert all(row["median"] > 0 for row in rows)
    assert "/plain" in capsys.readouterr().out
    assert attention.main(["--variants", "flash"]) == 2
    assert "--variants 'flash' is unknown: choose from plain, bias, relative, decode" in capsys.readouterr().err
    assert attention.main(["--rounds", "0"]) == 2
    assert "--rounds 0 must be from 1 to" in capsys.readouterr().err
    assert attention.main(["--lengths", "1k"]) == 2
    assert "--lengths '1k' must be whole numbers" in capsys.readouterr().err


def test_invalid_recurrence_options_print_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--layers", "lstm,rnn"], "--layers 'rnn' is unknown: choose from lstm, gru, gru-before"),
        (["--passes", "backward"], "--passes 'backward' is unknown: choose from forward, both"),
        (["--sizes", "128x32"], "--sizes '128x32' must be steps x rows x width, such as 128x32x512"),
        (["--sizes", "4x1x8,4x1x8"], "--sizes has T4 B1 H8 more than once: give it once"),
    ):
        assert recurrence.main(arguments) == 2
        assert message in capsys.readouterr().err


def test_the_recurrence_table_has_times_per_step(rows: list[Row]) -> None:
    lstm_rows = [dataclasses.replace(row, op="lstm forward", shape="T100 B1 H8") for row in rows]
    lines = recurrence.recurrence_table(lstm_rows).splitlines()
    assert lines[2].split() == [
        "lstm",
        "forward",
        "T100",
        "B1",
        "H8",
        "jaxlm",
        "2000",
        "1200",
        "1.64e+04",
        "25.0",
        "2e+04",
    ]
    assert lines[3].split()[-4:] == ["0.50", "0.37", "0.50", "4e+04"]  # statistics of 1/3, 2/4 and 20/40


@pytest.mark.thorough
def test_quick_recurrences_run_without_a_baseline(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    arguments = ["--quick", "--against", "", "--layers", "gru-before", "--rounds", "1", "--json", str(path)]
    assert recurrence.main(arguments) == 0
    assert re.search("gru-before both +T6 B2 H8 +jaxlm", capsys.readouterr().out)
    assert [row["op"] for row in json.loads(path.read_text())["rows"]] == ["gru-before forward", "gru-before both"]


# ------------------------------------------------------------------------------------------------------ work


def test_recurrence_work_counts_the_matrix_products() -> None:
    work = shapes.recurrence_work(shapes.Recurrence(10, 2, 8), "gru", "forward")
    assert (work.tokens, work.amount) == (20, 20 * 2 * (8 * 24 + 8 * 24))
    assert shapes.recurrence_work(shapes.Recurrence(10, 2, 8), "gru", "both").amount == 3 * work.amount


def test_work_counts_the_flops_and_the_bytes_of_each_array() -> None:
    def numbers(program: str, op: str, shape: str) -> tuple[float | None, float | None]:
        work = shapes.work_of(program, op, shape)
        return work.flops, work.bytes

    array = 4 * 10 * 2 * 3  # bytes of [10, 2, 3]
    assert numbers("attention", "plain forward", "B1 T10 H2 K3") == (2 * 10**2 * 2 * 3, 4 * array)
    assert numbers("attention", "bias both", "B1 T10 H2 K3") == (7 * 10**2 * 2 * 3, 12 * array)
    assert numbers("attention", "decode forward", "B1 T10 of 40 H2 K3") == (4 * 10 * 2 * 3, 2 * array)
    array, weights = 4 * 10 * 2 * 8, 4 * 2 * 3 * 8 * 8
    assert numbers("recurrence", "gru forward", "T10 B2 H8")[1] == 2 * array + weights
    assert numbers("recurrence", "gru both", "T10 B2 H8")[1] == 6 * array + 3 * weights
    array = 4 * 5 * 10 * 2 * 3
    for op, num_inputs in (("linear_attention", 4), ("generalized_delta_rule", 6)):
        shape = "B5 T10 H2 K3 decays=3"
        assert numbers("scans", f"{op}, forward", shape)[1] == (num_inputs + 1) * array
        assert numbers("scans", f"{op}, forward and backward", shape)[1] == (3 * num_inputs + 2) * array
    assert numbers("scans", "gated_delta_rule, forward", "B5 T10 H2 K3")[1] == 4 * array + 2 * array / 3
    assert numbers("scans", "linear_scan, forward and backward", "B5 T10 D6") == (5 * 300, 8 * array)
    assert numbers("scans", "depthwise_convolution, forward", "B5 T10 C6 taps=4") == (8 * 300, 2 * array)


def test_training_work_of_gpt2_124m() -> None:
    counted = flops.training_flops(get_model("gpt2"), 2, 512)
    assert counted is not None
    known = {"batch": 2, "length": 512, "training_flops": counted.amount, "formula": counted.formula}
    work = shapes.training_work("step", known)
    assert (work.tokens, shapes.training_work("forward", known).amount) == (1024, work.amount / 3)
    matmul = 6 * (12 * 12 * 768**2 + 50257 * 768) * 1024
    attention = (
        3 * 2 * 12 * 4 * 12 * 512**2 * 64 / 2
    )  # 3 passes, rows, layers, 2 products of 2 FLOPs, heads, T**2, head size, causal half
    assert work.amount == pytest.approx(matmul + attention, rel=2e-3)  # the formula also counts biases and norms


def test_decoding_work_does_not_grow_with_rows() -> None:
    one_row, eight_rows = (shapes.decoding_work(B, 64, {"weight_bytes_per_step": 400}) for B in (1, 8))
    assert (one_row.amount, eight_rows.amount) == (400 * 64, 400 * 64)
    assert (one_row.tokens, eight_rows.tokens) == (64, 512)


def test_scan_work_counts_each_array_once() -> None:
    scan, attention, convolution = (
        next(case for case in shapes.SCANS if case.op == op)
        for op in ("linear_scan", "linear_attention", "depthwise_convolution")
    )
    array = 8 * 2048 * 1024 * 4
    assert [shapes.scan_work(scan, backward).amount for backward in (False, True)] == [3 * array, 8 * array]
    array = 4 * 1024 * 512 * 4
    assert [shapes.scan_work(convolution, backward).amount for backward in (False, True)] == [2 * array, 5 * array]
    work = shapes.scan_work(attention, True)
    assert (work.unit, work.amount) == ("FLOP", 3 * 4 * 2 * 1024 * 8 * 64 * 64)
    assert scan.shown == "B8 T2048 D1024"
    quick = [dict(case.quick().sizes) for case in shapes.SCANS if case.op == "linear_attention"]
    assert quick == [{"B": 2, "T": 33, "H": 2, "K": 4, "decays": decays} for decays in (1, 4)]


# --------------------------------------------------------------------------------------------------- workers


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    with start(tmp_path_factory.mktemp("worker"), start=5) as worker:
        yield worker


def test_a_worker_works_although_its_implementation_prints(worker: Worker) -> None:
    initial_count = worker.facts()["count"]
    runs = [worker.run() for _ in range(3)]
    assert [value for _, value in runs] == [initial_count + 1, initial_count + 2, initial_count + 3]
    assert all(0.0 < seconds < 10.0 for seconds, _ in runs)
    facts = worker.facts()
    assert facts["count"] == initial_count + 3
    assert facts["peak_process_bytes"] > 1_000_000


def test_help_that_cannot_be_written_has_a_status(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class FullDisk(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(sys, "stdout", FullDisk())
    assert training.main(["--help"]) == 1
    assert capsys.readouterr().err.startswith("benchmarks.training: No space left on device")


@pytest.mark.thorough
def test_a_setup_error_is_reported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="dummy: ValueError: no such size"):
        start(tmp_path, start=0, fault="setup")
    with pytest.raises(UserError, match="dummy: ModuleNotFoundError: No module named 'torch'"):
        start(tmp_path, start=0, fault="package")


@pytest.mark.thorough
def test_reading_a_result_is_not_measured(tmp_path: Path) -> None:
    with start(tmp_path, start=0, fault="slow read") as worker:
        seconds, value = worker.run()
    assert seconds < 1.0
    assert value == 1


def test_a_worker_has_the_environment_of_the_device_and_continues_after_a_failed_run(tmp_path: Path) -> None:
    assert harness.DEVICES["any"] == {}
    environment = {"JAX_PLATFORMS": "cpu", "JAXLM_TEST": "here"}
    arguments: dict[str, Any] = {"start": 0, "fault": "run"}
    with contextlib.closing(Worker("dummy", DUMMY, tmp_path / "log", environment, **arguments)) as worker:
        assert worker.facts()["environment"] == "here"
        with pytest.raises(Failure, match="dummy: RuntimeError: out of luck"):
            worker.run()
        assert worker.facts()["count"] == 0
        assert worker.process.poll() is None
    assert worker.process.poll() is not None, "closing ends the process"
    assert "Traceback" in (tmp_path / "log").read_text()


def test_a_dead_worker_is_reported(tmp_path: Path) -> None:
    with start(tmp_path, start=0, fault="death") as worker:
        with pytest.raises(Failure, match=r"dummy ended unexpectedly \(exit status 3\): the last words"):
            worker.run()
        with pytest.raises(Failure, match="dummy ended unexpectedly"):
            worker.run()


def test_importing_the_benchmarks_imports_no_framework() -> None:
    code = (
        "import sys, benchmarks.attention, benchmarks.decoding, benchmarks.fidelity, benchmarks.recurrence\n"
        "import benchmarks.scans, benchmarks.training\n"
        "sys.exit(' '.join({'jax', 'torch', 'transformers', 'flax'} & set(sys.modules)) or 0)"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=harness.ROOT, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr


class Square(JaxSampled):
    """Squares the numbers 0, 1, 2, ... in an array."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        import jax

        self.jitted = jax.jit(lambda x: x * x)
        self.arguments = (np.arange(np.prod(shape), dtype=np.float32).reshape(shape),)

    def name_results(self, results: Any) -> dict[str, Any]:
        return {"square": results}


def test_a_repetition_ends_before_samples_are_copied() -> None:
    import jax

    square = Square((50, 3, 4))
    results = square.run()
    assert isinstance(results["square"], jax.Array)
    assert square.read(results) == {"square": (shapes.samples(600).astype(np.float32) ** 2).tolist()}


@pytest.mark.live
def test_samples_of_a_tensor_are_those_of_an_array() -> None:
    import torch

    square = Square((50, 3, 4))
    results = square.run()
    tensor = torch.from_numpy(np.array(results["square"])).requires_grad_()
    assert Sampled.read(square, {"square": tensor}) == square.read(results)


@pytest.mark.parametrize("case", [scan_baselines.Jaxlm, pytest.param(scan_baselines.Torch, marks=pytest.mark.live)])
def test_the_backward_pass_of_a_convolution_also_computes_its_output(case: Any) -> None:
    results = []
    for backward in (False, True):
        measured = case("", "depthwise_convolution", {"B": 1, "T": 6, "C": 3, "taps": 2}, backward)
        measured.prepare()
        results.append(measured.read(measured.run()))
    forward, both = results
    assert list(both) == ["result 0", "result 1", "result 2"], "two gradients and the output"
    assert np.allclose(both["result 2"], forward["result 0"], atol=1e-6)


def check_agreement(program: Any, pass_name: str, **sizes: Any) -> None:
    """Compare the results of a baseline in JAX with those of jaxlm, as the benchmark does before it measures."""
    values = {}
    for name in {"jaxlm", "jax.nn", "flax"} & set(program.IMPLEMENTATIONS):
        measured = find(program.IMPLEMENTATIONS[name])(directory="", pass_name=pass_name, **sizes)
        values[name] = [measured.read(measured.run())]
    assert len(values) == 2
    harness.check_samples(values, program.TOLERANCE)


@pytest.mark.parametrize("variant", attention.VARIANTS)
def test_attention_of_jax_agrees(variant: str) -> None:
    pass_name = "forward" if variant == "decode" else "both"
    check_agreement(attention, pass_name, variant=variant, length=150, capacity=160, heads=2, width=4)


@pytest.mark.parametrize("layer", ["lstm", "gru"])
def test_recurrent_layers_of_flax_agree(layer: str) -> None:
    check_agreement(recurrence, "both", layer=layer, length=3, batch=2, width=5)


def test_every_implementation_has_a_class():
    programs = (attention, decoding, recurrence, scans, training)
    implementations = [program.IMPLEMENTATIONS for program in programs] + [texts.TRANSLATORS, texts.CLASSIFIERS]
    for target in [target for targets in implementations for target in targets.values()]:
        assert issubclass(find(target), Implementation)
