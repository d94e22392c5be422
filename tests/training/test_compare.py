"""The table and the plot that compare runs."""

import pytest

from jaxlm.metrics import Score
from jaxlm.training.compare import compare_runs, draw_comparison
from jaxlm.training.html_report import write_report
from jaxlm.training.report import MetricsFile, write_results


def make_run(directory, losses, accuracies=(), **results):
    directory.mkdir(parents=True)
    file = MetricsFile(directory / "metrics.jsonl")
    for index, loss in enumerate(losses):
        accuracy_entry = {"validation_accuracy": accuracies[index]} if accuracies else {}
        file.write(step=100 * (index + 1), validation_loss=loss, **accuracy_entry)
    if results:
        write_results(directory, task="sentiment", **results)
    return directory


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_has_last_and_best_values_and_scores(tmp_path):
    scores = [Score("accuracy", 0.9048, 0.8835, 0.9226, 872)]
    bert = make_run(
        tmp_path / "bert", [0.5, 0.3, 0.4], [0.7, 0.9, 0.8], family="bert", parameters=22713986, minutes=41.26,
        scores=scores,
    )  # fmt: skip
    unfinished = make_run(tmp_path / "lstm", [None, 0.6])
    header, rule, first, second = compare_runs([bert, unfinished]).splitlines()
    assert cells(header) == [
        "run", "family", "parameters", "steps", "minutes", "validation loss (best)", "validation accuracy (best)",
        "accuracy",
    ]  # fmt: skip
    assert set(rule) == {"|", "-"}
    assert cells(first) == [
        "bert", "bert", "22,713,986", "300", "41.3", "0.4 (0.3)", "0.8 (0.9)", "0.905 [0.883, 0.923]",
    ]  # fmt: skip
    assert cells(second) == ["lstm", "-", "-", "200", "-", "0.6 (0.6)", "-", "-"]
    assert len({len(line) for line in (header, rule, first, second)}) == 1  # columns are aligned


def test_the_table_has_no_steps_that_a_resume_or_a_rollback_discarded(tmp_path):
    for name, record in (
        ("resumed", {"step": 150, "event": "resumed"}),
        ("rollback", {"step": 310, "event": "rollback", "to_step": 150}),
    ):
        directory = make_run(tmp_path / name, [0.5, 0.2, 0.4])
        file = MetricsFile(directory / "metrics.jsonl")
        file.write(**record)
        file.write(step=160, validation_loss=0.3)
        assert cells(compare_runs([directory]).splitlines()[2]) == [name, "-", "-", "160", "-", "0.3 (0.3)"]
        assert "<dt>steps</dt><dd>160</dd>" in write_report(directory).read_text()


def test_runs_with_equal_names_are_listed_with_their_paths(tmp_path):
    runs = [make_run(tmp_path / parent / "lstm", [1.0]) for parent in ("a", "b")]
    table = compare_runs(runs)
    assert all(str(run) in table for run in runs)


def test_the_plot_overlays_validation_curves(tmp_path, monkeypatch):
    from jaxlm.training import plots

    runs = [make_run(tmp_path / "a", [1.0, 0.8], [0.5, 0.6]), make_run(tmp_path / "b", [0.9, 0.7])]
    drawn_panels = []
    monkeypatch.setattr(plots, "save_png", lambda panels, path: drawn_panels.extend(panels))
    draw_comparison(runs, tmp_path / "unused.png")
    monkeypatch.undo()
    loss, accuracy = drawn_panels
    assert (loss.ylabel, accuracy.ylabel) == ("validation loss", "validation accuracy")
    assert [(line.label, list(line.values)) for line in loss.series] == [("a", [1.0, 0.8]), ("b", [0.9, 0.7])]
    assert [line.label for line in accuracy.series] == ["a"]
    assert loss.series[0].color != loss.series[1].color
    draw_comparison(runs, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_errors_name_a_directory_without_a_run(tmp_path):
    run = make_run(tmp_path / "run", [1.0])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty is not a run directory: it has neither metrics.jsonl nor results"):
        compare_runs([run, tmp_path / "empty"])
    with pytest.raises(FileNotFoundError, match="nowhere is not a directory"):
        draw_comparison([tmp_path / "nowhere"], tmp_path / "curves.png")
    with pytest.raises(ValueError, match="run is given more than once: give each run once"):
        draw_comparison([run, run], tmp_path / "curves.png")
    with pytest.raises(ValueError, match="there are no runs to compare"):
        compare_runs([])
    (tmp_path / "started").mkdir()
    MetricsFile(tmp_path / "started" / "metrics.jsonl").write(event="started")
    with pytest.raises(ValueError, match="there are no metrics to draw"):
        draw_comparison([tmp_path / "started"], tmp_path / "curves.png")
