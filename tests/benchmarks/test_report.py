"""The measured part of the benchmark page, generated from result files."""

import json

import pytest

from benchmarks import all as all_benchmarks
from benchmarks import harness, report, shapes
from benchmarks.baselines import JaxImplementation
from benchmarks.worker import find
from jaxlm.plan.planning import ACCURACY

PAGE = f"# Benchmarks\n\n{report.BEGIN}\nold text\n{report.END}\n\nMore text.\n"


def row(op="lstm forward", shape="T128 B32 H512", implementation="jaxlm", median=0.1, ratio=1.0):
    return {
        "op": op, "shape": shape, "implementation": implementation, "ratio": ratio, "work": {}, "seconds": [median],
        "median": median, "peak_percent": 5 / median, "facts": {"peak_process_bytes": 3e9},
    }  # fmt: skip


def write_results(
    directory, rows, name="a.json", program="recurrence", time="2026-01-02", peaks="9 GFLOP/s", versions="jax 1"
):
    directory.mkdir(parents=True, exist_ok=True)
    machine = {"time": time, "load": "0.1", "versions": versions, "commit": 40 * "a", "peaks": peaks}
    (directory / name).write_text(json.dumps({"program": program, "machine": machine, "rows": rows}))


ROWS = [
    row(), row(implementation="torch", median=0.2, ratio=2.0),
    row(shape="T512 B32 H512", median=0.5), row(shape="T512 B32 H512", implementation="torch", median=0.4, ratio=0.8),
    row(shape="T128 B1 H650", median=0.01), row(shape="T128 B1 H650", implementation="torch", median=0.001, ratio=0.1),
]  # fmt: skip


def write_page(directory):
    """Run the command on ``directory/results`` and return its exit status and the page."""
    page = directory / "page.md"
    page.write_text(PAGE)
    options = ["--results", str(directory / "results"), "--page", str(page)]
    return report.main(options), page.read_text()


def test_the_page_has_a_section_per_processor_with_the_newest_first(tmp_path):
    results = tmp_path / "results"
    write_results(results / "old", ROWS, time="2025-01-02")
    write_results(results / "new", ROWS[:2])
    (results / report.TITLES_FILE).write_text(json.dumps({"old": "Old processor"}))
    status, page = write_page(tmp_path)
    assert status == 0
    assert page.startswith("# Benchmarks")
    assert page.endswith("More text.\n")
    assert "old text" not in page
    assert page.index("### new") < page.index("### Old processor")
    new, old = page.split("### Old processor")
    assert "jaxlm is faster in 1 of 1 comparisons with baselines." in new
    assert "slower" not in new
    assert "jaxlm is faster in 1 of 3 comparisons with baselines." in old
    lowest_first = (
        old.index("T128 B1 H650: 0.10 times as fast as torch"),
        old.index("T512 B32 H512: 0.80 times as fast"),
    )
    assert lowest_first == tuple(sorted(lowest_first))
    assert "| lstm forward | T128 B32 H512 | torch | 200 | 2.00 | 25.0 | 3.00 |" in new
    assert "aaaaaaaaaa |" in new
    for line in page.splitlines():
        if line.startswith("!["):
            assert (tmp_path / line.split("(")[1].rstrip(")")).read_text().count("<svg") == 1
    assert {path.name for path in (tmp_path / report.PICTURES).iterdir()} == {
        "old_recurrence.svg", "new_recurrence.svg", "old_lengths.svg",
    }  # fmt: skip
    assert write_page(tmp_path)[1] == page


def test_numbers_are_at_the_end_of_a_bar_or_to_the_right_of_the_line(tmp_path):
    write_results(tmp_path, [*ROWS, row(op="gru-before forward")])
    left, right = report.draw(report.read(tmp_path)).axes
    assert [(text.get_text(), text.xy[0]) for text in left.texts] == [("2.00", 2.0), ("0.80", 1.0), ("0.10", 1.0)]
    assert len(right.patches) == 3, "a shape without a baseline has no bar"
    assert (left.get_xscale(), left.patches[0].get_x()) == ("linear", 0.0)


def test_ratios_above_eight_have_a_logarithmic_axis(tmp_path):
    write_results(tmp_path, [row(), row(implementation="torch", median=0.9, ratio=9.0)])
    left, _ = report.draw(report.read(tmp_path)).axes
    assert (left.get_xscale(), left.patches[0].get_x(), left.patches[0].get_width()) == ("log", 1.0, 8.0)


def test_earlier_versions_of_jaxlm_are_named(tmp_path):
    rows = [dict(item, peak=peak, work={"unit": "FLOP"}) for item, peak in zip(ROWS[:4], (4e9, 4e9, 6e9, 6e9))]
    write_results(tmp_path, rows[:2], "old.json", time="2025-01-02", versions="jax 1")
    write_results(tmp_path, rows[2:], "new.json", versions="jaxlm 0.3.0 jax 1")
    measured = report.read(tmp_path)
    text = report.section("cpu", "A processor", measured, tmp_path)
    assert "Rows of the tables: 2 from jaxlm 0.1.0, 2 from jaxlm 0.3.0." in text
    assert "ran at 4 to 6 GFLOP/s during these measurements (median 5)." in text
    assert "speed and share of the limit" in text
    (axes,) = report.draw_processors({"cpu": [item for item in measured if item.implementation == "torch"]}).axes
    assert [text.get_text() for text in axes.texts] == ["0.80", "2.00 (jaxlm 0.1.0)"]


def test_only_programs_with_a_baseline_have_a_bar_chart(tmp_path):
    training = [row(op="training step"), row(op="training step", implementation="torch", median=0.2, ratio=2.0)]
    write_results(tmp_path / "results" / "ours", training[:1], program="training")
    status, page = write_page(tmp_path)
    assert status == 0
    assert "No baseline was measured." in page
    assert "| training step | T128 B32 H512 | jaxlm | 100 |" in page
    assert not any((tmp_path / report.PICTURES).iterdir())
    write_results(tmp_path / "results" / "both", training, program="training")
    assert write_page(tmp_path)[0] == 0
    names = {path.name for path in (tmp_path / report.PICTURES).iterdir()}
    assert names == {"both_training.svg", "both_memory.svg", "training.svg"}


PLAN = {
    "case": "gpt2, train, 4 x 512", "planned_bytes": 5 * 2**30, "measured_bytes": 6 * 2**30, "memory_ratio": 1.2,
    "argument_bytes": 9, "flops": 9, "seconds": 0.5, "bound": 0.4,
}  # fmt: skip


def test_plans_have_a_table(tmp_path):
    results = tmp_path / "results" / "cpu"
    write_results(results, [PLAN | {"bound": 0.1}], "old.json", "plans", "2026-01-01")
    write_results(results, [PLAN], "new.json", "plans", "2026-01-02", peaks="156 GFLOP/s matmul, 28.0 GB/s sum")
    status, page = write_page(tmp_path)
    assert status == 0
    table = page.split("#### Plans: cpu")[1]
    assert "| step | planned GiB | measured GiB | measured / planned | ms | bound ms | bound / time |" in table
    assert "| gpt2, train, 4 x 512 | 5.000 | 6.000 | 1.20 | 500.0 | 400.0 | 80% |" in table
    assert "156 GFLOP/s matmul, 28.0 GB/s sum" in table  # the conditions
    assert not any((tmp_path / report.PICTURES).iterdir())


def test_a_plan_without_a_field_is_an_error(tmp_path, capsys):
    write_results(tmp_path / "results" / "cpu", [{key: PLAN[key] for key in PLAN if key != "bound"}], program="plans")
    assert write_page(tmp_path)[0] == 2
    assert "a.json is not a file that a benchmark wrote with --json: KeyError('bound')" in capsys.readouterr().err


def test_the_memory_chart_has_a_bar_for_each_training_step(tmp_path):
    rows = [row("training step"), row("training step", implementation="torch"), row("loss", implementation="torch")]
    for measured, gigabytes in zip(rows, (3.0, 4.0, 5.0), strict=True):
        measured["facts"] = {"peak_process_bytes": gigabytes * 1e9}
    write_results(tmp_path, rows, program="training")
    page = report.section("cpu", "A processor", report.read(tmp_path), tmp_path)
    assert f"![Training steps of whole models: peak memory]({report.PICTURES}/cpu_memory.svg)" in page
    texts = (tmp_path / "cpu_memory.svg").read_text()
    assert ">3.0<" in texts
    assert ">4.0<" in texts
    assert ">5.0<" not in texts


def test_rows_that_are_slower_than_a_jax_baseline_are_listed(tmp_path, capsys):
    """torch is no JAX baseline, and a ratio of 0.97 is noise."""
    shapes_and_rows = [("T1", "flax", 0.9), ("T2", "jax.nn", 0.96), ("T3", "lax.scan", 0.97), ("T4", "torch", 0.5)]
    rows = [
        row(shape=shape, implementation=name, ratio=ratio)
        for shape, baseline, baseline_ratio in shapes_and_rows
        for name, ratio in (("jaxlm", 1.0), (baseline, baseline_ratio))
    ]
    write_results(tmp_path / "results" / "cpu", rows)
    status, page = write_page(tmp_path)
    assert status == 0
    listed = "- lstm forward, T1: 0.90 times as fast as flax\n- lstm forward, T2: 0.96 times as fast as jax.nn\n"
    rule = "(a row counts as slower if its ratio is below 0.97; a smaller difference is noise)."
    assert f"Slower than a JAX baseline: 2 of 3 rows {rule}\n\n{listed}\n" in page
    assert f"cpu: slower than a JAX baseline:\n{listed}" in capsys.readouterr().out
    write_results(tmp_path / "results" / "cpu", rows[4:])
    assert f"Slower than a JAX baseline: 0 of 1 rows {rule}\n\nRows of the tables: " in write_page(tmp_path)[1]
    assert "slower than a JAX baseline" not in capsys.readouterr().out


def test_every_baseline_that_runs_on_jax_is_a_jax_baseline():
    implementations = {name: target for job in all_benchmarks.JOBS for name, target in job.implementations.items()}
    jax_names = {name for name, target in implementations.items() if issubclass(find(target), JaxImplementation)}
    assert jax_names == {"jaxlm", *report.JAX_BASELINES}


def test_the_committed_page_is_up_to_date(tmp_path, monkeypatch):
    """If this fails, run ``python -m benchmarks.report``."""
    # The names of the charts are compared, not their contents. Drawing all charts takes several seconds.
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path, **options: path.touch())
    committed = harness.ROOT / "docs" / "benchmarks.md"
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "benchmarks.md"
    page.write_text(committed.read_text())
    options = [f"--{name}={harness.ROOT / 'benchmarks' / name}" for name in ("results", "estimates")]
    assert report.main([*options, "--page", str(page)]) == 0
    assert page.read_text() == committed.read_text()
    written, pictures = (
        {path.name for path in (folder / report.PICTURES).iterdir()} for folder in (page.parent, committed.parent)
    )
    assert written == pictures


def test_the_newest_measurement_of_a_shape_is_used(tmp_path):
    write_results(tmp_path, ROWS[:2], "b.json", time="2026-01-01")
    write_results(tmp_path, [row(median=0.3), row(implementation="torch", median=0.6, ratio=2.1)], "a.json")
    write_results(tmp_path, ROWS[2:4], "c.json", time="2025-01-01")
    measured = {(item.shape, item.implementation): item.ratio for item in report.read(tmp_path)}
    assert measured == {
        ("T128 B32 H512", "jaxlm"): 1.0, ("T128 B32 H512", "torch"): 2.1,
        ("T512 B32 H512", "jaxlm"): 1.0, ("T512 B32 H512", "torch"): 0.8,
    }  # fmt: skip


def test_each_curve_has_measurements_that_differ_only_in_the_length(tmp_path):
    write_results(tmp_path, ROWS)
    assert report.curves(report.read(tmp_path)) == {
        "lstm forward, T... B32 H512": {
            "jaxlm": [(128, pytest.approx(100.0)), (512, pytest.approx(500.0))],
            "torch": [(128, pytest.approx(200.0)), (512, pytest.approx(400.0))],
        }
    }


def test_a_roofline_has_a_point_per_row_and_a_roof_per_run(tmp_path):
    rows = [dict(item, peak=5e9, work={"unit": "FLOP"}) for item in ROWS[:4]]
    write_results(tmp_path, rows[:2], "a.json", peaks="9 GFLOP/s float32 GEMM, 2.0 GB/s copy, 1.0 GB/s read")
    write_results(tmp_path, rows[2:], "b.json", peaks="8 GFLOP/s float32 GEMM, 1.0 GB/s copy, 1.0 GB/s read")
    measured = report.read(tmp_path)
    assert measured[0].peaks == {"FLOP": 5e9, "B": 2e9}
    (axes,) = report.draw_rooflines(measured).axes
    *points, first_roof, second_roof = axes.get_lines()
    work = shapes.work_of("recurrence", "lstm forward", "T128 B32 H512")
    assert (points[1].get_xdata()[0], points[1].get_ydata()[0]) == (work.flops / work.bytes, work.flops / 0.2 / 1e9)
    assert len(points) == 4
    assert [point.get_marker() for point in points] == ["o", "o", "s", "s"]  # one marker for each shape
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "forward, T128 B32 H512",
        "forward, T512 B32 H512",
    ]
    assert (first_roof.get_xdata()[1], first_roof.get_ydata()[1]) == (2.5, 5.0)
    assert (second_roof.get_xdata()[1], second_roof.get_ydata()[1]) == (5.0, 5.0)
    report.section("cpu", "A processor", measured, tmp_path)
    assert (tmp_path / "cpu_recurrence_roofline.svg").exists()


def test_the_work_of_stored_rows_follows_from_their_texts():
    checked = 0
    for file in (harness.ROOT / "benchmarks" / "results").glob("*/*.json"):
        record = json.loads(file.read_text())
        if record.get("program") in report.ROOFLINES:
            for stored in record["rows"]:
                work = shapes.work_of(record["program"], stored["op"], stored["shape"])
                assert (work.amount, work.unit) == (stored["work"]["amount"], stored["work"]["unit"])
                assert work.amount == (work.flops if work.unit == "FLOP" else work.bytes)
                checked += 1
    assert checked > 100


def test_rows_of_the_benchmark_of_texts_are_read(tmp_path):
    texts = {
        "task": "classification",
        "sentences": 7,
        "seconds": {"jaxlm": [1.0, 3.0, 2.0], "torch": [1.0]},
        "ratios": {"torch": 0.5},
    }
    write_results(tmp_path, [texts], program="texts")
    ours, torch = report.read(tmp_path)
    assert (ours.implementation, ours.seconds, ours.ratio, ours.label) == (
        "jaxlm",
        2.0,
        1.0,
        "classification, 7 sentences",
    )
    assert (torch.implementation, torch.ratio) == ("torch", 0.5)
    assert "![Texts: speed](" in report.section("cpu", "A processor", [ours, torch], tmp_path)


ESTIMATES = f"{report.BEGIN_ESTIMATES}\nold estimates\n{report.END_ESTIMATES}\n"
ESTIMATED = {
    "model": "GPT", "topology": "v9:2x2", "mesh": "data=4", "batch": 8, "sequence": 1024, "fits": False,
    "memory": {"total": 3 * 2**29}, "seconds": 0.1234, "mfu": 0.255, "mfu_with_communication": 0.25,
}  # fmt: skip


def write_estimates(directory, plan):
    """Run the command on measurements and on one plan, and return its exit status and the page."""
    write_results(directory / "results" / "cpu", ROWS[:2])
    (directory / "estimates").mkdir(exist_ok=True)
    run = {"command": "jaxlm plan", "time": "2026-01-02", "commit": "abc", "versions": "jax 1", "plans": [plan]}
    (directory / "estimates" / "v9.json").write_text(json.dumps({"title": "TPU v9", "runs": [run]}))
    page = directory / "page.md"
    page.write_text(PAGE + ESTIMATES)
    options = ["--results", str(directory / "results"), "--estimates", str(directory / "estimates")]
    return report.main([*options, "--page", str(page)]), page.read_text()


def test_estimates_have_sections_of_their_own(tmp_path):
    status, page = write_estimates(tmp_path, ESTIMATED)
    assert status == 0
    measured, estimates = page.split(report.END)
    assert "TPU v9" not in measured
    assert "old estimates" not in page
    assert "### TPU v9: estimated by the compiler, not measured" in estimates
    assert "| GPT | v9:2x2 | data=4 | 8 x 1,024 | 1.50 (does not fit) | 123 | 25.5 | 25.0 |" in estimates
    assert f"Accuracy: {ACCURACY['tpu']}." in estimates
    assert "| GPT | `jaxlm plan` | 2026-01-02 | jax 1 | abc |" in estimates
    picture = (tmp_path / report.PICTURES / "v9_estimates.svg").read_text()
    assert "estimated by the compiler, not measured" in picture
    assert "25.5 (does not fit into memory)" in picture


def test_an_estimate_without_a_field_is_an_error(tmp_path, capsys):
    status, page = write_estimates(tmp_path, {name: ESTIMATED[name] for name in ESTIMATED if name != "mfu"})
    assert status == 2
    assert "v9.json is not a file of estimates: KeyError('mfu')" in capsys.readouterr().err
    assert "old text" in page


def test_wrong_files_print_an_error(tmp_path, capsys):
    results = tmp_path / "results"
    for prepare, message in (
        (lambda: None, "results is not a directory"),
        (results.mkdir, "results has no directories"),
        ((results / "cpu").mkdir, "cpu has no result files"),
        (lambda: write_results(results / "cpu", ROWS, program="shootout"), "cpu has no results of training, decoding"),
        (lambda: (results / "cpu" / "b.json").write_text("[1]"), "b.json is not a file that a benchmark wrote"),
    ):
        prepare()
        assert write_page(tmp_path)[0] == 2
        assert message in capsys.readouterr().err
    page = tmp_path / "other.md"
    page.write_text("# Text")
    assert report.main(["--results", str(results), "--page", str(page)]) == 2
    assert "other.md has no lines" in capsys.readouterr().err
