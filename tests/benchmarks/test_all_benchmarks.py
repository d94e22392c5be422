"""The command that runs all benchmarks: it resumes, continues after failures, and checks its options."""

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import all as all_benchmarks
from benchmarks import harness, report


@pytest.fixture
def started_commands(monkeypatch):
    """Record the commands of the benchmarks instead of running them. A command with "decode" in its options fails."""
    commands = []

    def start(command, *, stdout, **options):
        commands.append(command[2:])
        stdout.write("a log line\n")
        path = Path(command[command.index("--json") + 1])
        machine = {"time": "2026-01-01", "load": "", "versions": "", "commit": None}
        rows = [
            {
                "op": command[2],
                "shape": "T4",
                "implementation": implementation,
                "ratio": 1.5,
                "seconds": [1],
                "median": 1,
                "peak_percent": 9,
            }
            for implementation in ("jaxlm", "torch")
        ]
        program = command[2].removeprefix("benchmarks.")
        path.write_text(json.dumps({"program": program, "machine": machine, "rows": rows}))
        return SimpleNamespace(returncode=int("decode" in command))

    # Do not replace subprocess.run itself: matplotlib uses it to find fonts on a machine without a font cache.
    monkeypatch.setattr(harness, "check_packages", lambda *arguments: None)  # torch need not be installed
    monkeypatch.setattr(all_benchmarks, "subprocess", SimpleNamespace(run=start, STDOUT=subprocess.STDOUT))
    return commands


def test_it_continues_after_a_failure_and_resumes(started_commands, tmp_path, capsys):
    output = tmp_path / "results" / "cpu"
    arguments = ["--full", "--only", "attention", "--output", str(output), "--against", "torch"]
    assert all_benchmarks.main(arguments) == 1
    assert [command[0] for command in started_commands] == ["benchmarks.attention"] * 2
    assert all(command[-4:-2] == ["--against", "torch"] for command in started_commands)
    captured = capsys.readouterr()
    assert "1 of 2 benchmarks failed" in captured.err
    assert "attention_decode.log" in captured.err
    assert f"[{'':20}] 1/2 attention · 0 min, about 23 min left\n" in captured.out  # the sum of the expected minutes
    assert f"[{18 * '#':20}] 2/2 attention_decode · 0 min, about 0 min left\n" in captured.out
    assert (output / "attention.json").exists()
    assert not (output / "attention_decode.json").exists()
    assert (output / "attention.log").read_text() == "a log line\n"
    started_commands.clear()
    assert all_benchmarks.main(arguments) == 1
    assert len(started_commands) == 1  # only the failed one
    page = tmp_path / "page.md"
    page.write_text(f"{report.BEGIN}\n{report.END}\n")
    arguments = ["--full", "--only", "scans", "--output", str(output), "--page", str(page)]
    assert all_benchmarks.main(arguments) == 0
    assert "### cpu" in page.read_text()


def test_a_failed_benchmark_does_not_change_the_estimated_time(tmp_path, monkeypatch, capsys):
    """The first job takes twice its expected time, and the second fails at once."""
    clock = [0.0]
    jobs = [all_benchmarks.Job(name, ("scans",), 10) for name in ("slow", "broken", "next")]

    def run(job, directory, options):
        clock[0] += {"slow": 20, "broken": 0, "next": 1}[job.name] * 60
        return job.name != "broken"

    monkeypatch.setattr(all_benchmarks, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(all_benchmarks, "_run_job", run)
    assert all_benchmarks._run_all(jobs, tmp_path, all_benchmarks.All(full=True)) == ["broken"]
    output = capsys.readouterr().out
    assert "1/3 slow · 0 min, about 30 min left\n" in output
    assert "2/3 broken · 20 min, about 40 min left\n" in output
    assert "3/3 next · 20 min, about 20 min left\n" in output


def test_the_progress_bar_has_the_share_of_the_expected_minutes(tmp_path, monkeypatch, capsys):
    jobs = [all_benchmarks.Job("long", ("scans",), 15, quick_minutes=1), all_benchmarks.Job("short", ("scans",), 5, 3)]
    monkeypatch.setattr(all_benchmarks, "_run_job", lambda *arguments: True)
    for options, bar, minutes in ((all_benchmarks.All(full=True), 15, 20), (all_benchmarks.All(quick=True), 5, 4)):
        all_benchmarks._run_all(jobs, tmp_path, options)
        first, second = capsys.readouterr().out.splitlines()
        assert first == f"[{'':20}] 1/2 long · 0 min, about {minutes} min left"
        assert second.startswith(f"[{bar * '#':20}] 2/2 short")


def test_the_jobs_measure_all_sections_of_the_page(started_commands, tmp_path):
    """Both commands have every benchmark of the page, the losses, and XLNet with eight rows."""
    for option in ("--full", "--quick"):
        started_commands.clear()
        all_benchmarks.main([option, "--output", str(tmp_path / option)])
        assert {command[0].removeprefix("benchmarks.") for command in started_commands} == set(report.SECTIONS)
        options = [" ".join(command) for command in started_commands]
        assert all("--passes step,forward" in text for text in options if text.startswith("benchmarks.training"))
        assert any("--model xlnet-base-cased --tokens 16 --batch 1,8" in text for text in options)


def test_classification_needs_the_files_of_the_user(started_commands, tmp_path, capsys):
    model, file = tmp_path / "model", tmp_path / "sentences.txt"
    model.mkdir()
    (model / "config.json").write_text("{}")
    file.write_text("A sentence.")
    arguments = ["--full", "--only", "texts", "--output", str(tmp_path / "results"), "--against", ""]
    assert all_benchmarks.main(arguments) == 0
    assert "give --classifier DIRECTORY and --texts FILE" in capsys.readouterr().out
    assert [command[:1] for command in started_commands] == [["benchmarks.texts"]]
    assert all_benchmarks.main([*arguments, "--classifier", str(model), "--texts", str(file)]) == 0
    assert "give --classifier" not in capsys.readouterr().out
    assert started_commands[1][:5] == ["benchmarks.texts", "--classifier", str(model), "--texts", str(file)]


def test_each_benchmark_gets_the_baselines_that_it_knows(started_commands, tmp_path):
    assert all_benchmarks.main(["--full", "--output", str(tmp_path), "--against", "flax, lax.scan"]) == 1
    without_baselines = ("benchmarks.speculative", "benchmarks.plans")
    compared = [command for command in started_commands if command[0] not in without_baselines]
    assert len(compared) == len(started_commands) - len(without_baselines)
    against = {command[0]: command[command.index("--against") + 1] for command in compared}
    names = {"attention": "", "recurrence": "flax", "scans": "lax.scan", "training": "flax", "decoding": "flax"}
    names["texts"] = ""
    assert against == {f"benchmarks.{name}": baselines for name, baselines in names.items()}


def test_every_job_has_valid_options(started_commands, tmp_path, monkeypatch):
    """Each command line is parsed by its benchmark."""
    assert all_benchmarks.main(["--quick", "--output", str(tmp_path)]) == 1
    assert len(started_commands) == len(all_benchmarks.JOBS)
    for module, *options in started_commands:
        benchmark = __import__(module, fromlist=["main"])
        parsed = []
        monkeypatch.setattr(benchmark, "run", parsed.append)
        assert benchmark.main(options) == 0
        assert parsed[0].quick


def test_wrong_options_print_an_error(tmp_path, capsys):
    (tmp_path / "source").mkdir()
    page, no_page = tmp_path / "page.md", tmp_path / "no_page.md"
    page.write_text(f"{report.BEGIN}\n{report.END}\n")
    no_page.write_text("")
    for arguments, message in (
        (["--full", "--only", "scans", "--against", "flax"], "unknown baseline 'flax': choose from lax.scan,"),
        (["--full", "--page", str(tmp_path)], f"--page {tmp_path} is not a file"),
        (["--full", "--page", str(no_page)], f"{no_page} has no lines"),
        (
            ["--full", "--page", str(page)],
            f"--page shows all directories in {tmp_path}. {tmp_path / 'source'} has no result files",
        ),
        ([], "give one of the options --full and --quick"),
        (["--full", "--quick"], "give one of the options --full and --quick"),
        (["--quick", "--page", "x.md"], "--page x.md needs --full"),
        (["--full", "--only", "chess"], "no benchmark has 'chess' in its name"),
        (["--full", "--texts", "x.txt"], "--texts x.txt needs the directory of a model: give --classifier too"),
        (["--full", "--classifier", str(tmp_path)], "classification needs a file of sentences"),
        (["--quick", "--classifier", "x"], "--quick trains a tiny translator: leave out --classifier x"),
    ):
        assert all_benchmarks.main([*arguments, "--output", str(tmp_path / "results")]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "results").exists()
