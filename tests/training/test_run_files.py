"""The files of a run directory, the plot of its losses, and its HTML report."""

import html.parser
import math
import re
import sys

import numpy as np
import pytest

from jaxlm.metrics import Score
from jaxlm.training import plots, report
from jaxlm.training.html_report import SHOWN_SAMPLES, write_report
from jaxlm.training.report import AttentionMap, Board, MetricsFile, draw_losses, metric_curve, read_metrics

# --------------------------------------------------------------------------------------------- metrics.jsonl


def write_metrics(path, steps=3):
    file = MetricsFile(path)
    for step in range(1, steps + 1):
        file.write(step=step, loss=3.0 / step, learning_rate=1e-3, gradient_norm=1.0, tokens_per_second=None)
    file.write(step=steps, validation_loss=1.5, validation_accuracy=0.75)
    return path


def test_an_incomplete_last_line_is_ignored_and_then_removed(tmp_path):
    path = write_metrics(tmp_path / "metrics.jsonl")
    records = read_metrics(path)
    with path.open("a") as file:
        file.write('{"step": 99, "lo')
    assert read_metrics(path) == records
    MetricsFile(path).write(event="resumed", step=3)
    assert read_metrics(path) == [*records, {"event": "resumed", "step": 3}]


@pytest.mark.parametrize(("line", "message"), [('{"step": 9,', "line 5: not JSON"), ("[1]", "line 5: list instead of")])
def test_a_damaged_line_raises_an_error_with_its_line_number(tmp_path, line, message):
    path = write_metrics(tmp_path / "metrics.jsonl")
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=f"metrics.jsonl, {message}"):
        read_metrics(path)


def test_a_curve_uses_the_last_record_of_a_step_and_null_becomes_nan():
    records = [{"step": 2, "loss": 5.0}, {"step": 1, "loss": None}, {"step": 2, "loss": 4.0}, {"event": "resumed"}]
    steps, values = metric_curve(records, "loss")
    assert steps == [1, 2]
    assert math.isnan(values[0])
    assert values[1] == 4.0


def test_a_curve_has_no_steps_that_a_rollback_discarded():
    records = [{"step": step, "loss": float(step)} for step in range(1, 6)]
    records += [{"step": 5, "event": "rollback", "to_step": 2}, {"step": 4, "loss": 0.5}]
    assert metric_curve(records, "loss") == ([1, 2, 4], [1.0, 2.0, 0.5])
    records = [{"step": 3, "validation_loss": 1.0, "validation_accuracy": 0.5}]
    assert plots.training_panels([*records, {"step": 4, "event": "rollback", "to_step": 2}]) == []
    assert plots.training_panels([{"validation_accuracy": 0.5}]) == []  # a record without a step


def test_a_curve_has_no_steps_after_the_checkpoint_of_a_resume():
    records = [{"step": step, "loss": float(step)} for step in (10, 20, 30)]
    records += [{"step": 15, "event": "resumed"}, {"step": 16, "loss": 0.5}]
    assert metric_curve(records, "loss") == ([10, 16], [10.0, 0.5])
    assert metric_curve(records[:-1], "loss") == ([10], [10.0])
    records += [{"step": 0, "event": "started"}, {"step": 1, "loss": 2.0}]  # a new run in the same directory
    assert metric_curve(records, "loss") == ([1], [2.0])


def test_each_panel_has_the_loss_or_one_validation_metric(tmp_path):
    records = read_metrics(write_metrics(tmp_path / "metrics.jsonl"))
    loss, accuracy = plots.training_panels(records)
    assert [line.label for line in loss.series] == ["training (last 1.000)", "validation (last 1.500, best 1.500)"]
    assert accuracy.ylabel == "validation accuracy"
    assert list(accuracy.series[0].values) == [0.75]
    # tokens_per_second is null in all records, time is not drawn, and events are not metrics.
    records += [{"step": 4, "time": 9.0, "auxiliary_loss": 0.1}, {"event": "resumed", "step": 4}]
    panels = plots.optimization_panels(records)
    assert [panel.ylabel for panel in panels] == ["learning rate", "gradient norm", "auxiliary loss"]


def test_many_training_losses_get_a_running_mean():
    records = [{"step": step, "loss": None if step == 100 else 1.0 + step % 2} for step in range(1, 201)]
    ((raw, smooth),) = (panel.series for panel in plots.training_panels(records))
    assert raw.faint
    assert not smooth.faint
    assert smooth.label == "training (mean of 5 records)"
    assert smooth.values[-1] == pytest.approx(4 / 3)  # the mean of 1, 2 and 1: the last window has only three records
    assert math.isnan(smooth.values[99])


def test_draw_losses_writes_a_png_file(tmp_path):
    path = write_metrics(tmp_path / "metrics.jsonl")
    draw_losses(path, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    path.write_text('{"event": "resumed"}\n')
    with pytest.raises(ValueError, match="no metrics to draw"):
        draw_losses(path, tmp_path / "loss.png")


@pytest.mark.parametrize(
    ("name", "expected"), [("validation_loss", 1.0), ("validation_bits_per_character", 1.0), ("validation_BLEU", 3.0)]
)
def test_the_best_value_depends_on_the_metric(name, expected):
    records = [{"step": step, name: value} for step, value in enumerate([3.0, math.nan, 1.0, 2.0])]
    assert report.best_value(records, name) == expected
    assert math.isnan(report.best_value(records[1:2], name))


@pytest.mark.parametrize(("metric", "mode", "expected"), [("wer", "min", 1.0), ("bits_saved", "max", 3.0)])
def test_the_best_value_of_the_best_metric_depends_on_its_mode(metric, mode, expected):
    name, mode_of_metric = f"validation_{metric}", {"best_metric": metric, "best_mode": mode}
    records = [{"step": step, name: value, **mode_of_metric} for step, value in enumerate([3.0, 1.0, 2.0])]
    assert report.best_value(records, name) == expected
    _, panel = plots.training_panels([{"step": 0, "validation_loss": 2.0}, *records])
    assert panel.series[0].label == f"last 2, best {expected:g}"
    assert [panel.ylabel for panel in plots.optimization_panels(records)] == []


# --------------------------------------------------------------------------------------------- other files


def test_read_results_returns_scores_processor_and_versions(tmp_path):
    scores = [Score("BLEU", 38.2, 37.1, 39.3, 1000, "case:mixed|tok:13a"), Score("perplexity", 12.5)]
    details = {"data": "test_2016_flickr", "versions": {"jaxlm": "9"}}
    report.write_results(
        tmp_path, task="translation", family="t5", parameters=123, minutes=1.2345, scores=scores, **details
    )
    results = report.read_results(tmp_path)
    assert results["scores"] == scores
    assert (results["parameters"], results["minutes"], results["data"]) == (123, 1.23, "test_2016_flickr")
    assert results["versions"] == {"jaxlm": "9"}  # given versions replace the versions of this machine
    assert results["processor"]


def test_values_that_are_not_json_are_rejected(tmp_path):
    scores = [Score("loss", 1.0), Score("f1", math.nan)]
    for values, error, message in (
        ({"scores": scores}, ValueError, r"results.json\['scores'\]\[1\]\['value'\] is nan: JSON has no such number"),
        ({"scores": [], "data": {"a": ({1},)}}, TypeError, r"results.json\['data'\]\['a'\]\[0\] is \{1\} of type set"),
    ):
        with pytest.raises(error, match=message):
            report.write_results(tmp_path, task="t", family="f", parameters=1, minutes=1.0, **values)
    with pytest.raises(TypeError, match="sample 1: score is float: it must be a string"):
        report.write_samples(tmp_path, [{"score": "0.5"}, {"score": 0.5}])
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("counts", [[[1, 2]], [[1, -1], [0, 1]], [[0.5, 0.5], [0, 1]]])
def test_confusion_counts_must_match_their_labels(tmp_path, counts):
    with pytest.raises(ValueError, match=r"must be integers >= 0 of shape \[2, 2\]"):
        report.write_confusion(tmp_path, ["a", "b"], counts)
    with pytest.raises(ValueError, match=r"labels=\[0, 1\] must be strings"):
        report.write_confusion(tmp_path, [0, 1], [[1, 0], [0, 1]])


def test_attention_weights_must_match_their_tokens():
    with pytest.raises(ValueError, match=r"'x': weights \[1, 2\] must be \[2 rows, 2 columns\]"):
        AttentionMap("x", ["a", "b"], ["c", "d"], [[0.5, 0.5]])
    with pytest.raises(ValueError, match=r"weights must be in \[0, 1\]"):
        AttentionMap("x", ["a"], ["c", "d"], [[-1.0, 2.0]])
    with pytest.raises(ValueError, match=r"weights must be in \[0, 1\]"):
        AttentionMap("x", ["a"], ["c"], [[math.nan]])
    with pytest.raises(ValueError, match="'x': rows is empty: leave out"):
        AttentionMap("x", [], ["c"], np.zeros((0, 1)))


# --------------------------------------------------------------------------------------------- report.html


class Page(html.parser.HTMLParser):
    """Parse a page. Collect ids, text and references to other files; assert that its elements are nested."""

    VOID = ("meta", "wbr", "br")

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.references, self.text = [], [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)
        self._attributes(attrs)

    def handle_startendtag(self, tag, attrs):
        self._attributes(attrs)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.text += data

    def _attributes(self, attrs):
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            elif name in ("src", "href", "xlink:href", "data") or "url(" in (value or ""):
                self.references.append(value)


FEN = "r1bqkb1r/pppp1Qpp/2n2n2/4p3/2B1P3/8/PPPP1PPP/RNB1K1NR b KQkq - 0 4"


@pytest.fixture(scope="module")
def complete_run(tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    write_metrics(run / "metrics.jsonl", 80)
    (run / "config.json").write_text('{"model": "<b>gpt</b>"}')
    scores = [Score("accuracy", 0.9048, 0.8835, 0.9226, 872, "a|b"), Score("loss", 1.5)]
    report.write_results(
        run, task="chess", family="attention_rnn", parameters=1234567, minutes=60, scores=scores, data="<held out>",
        steps=40,
    )  # fmt: skip
    rows = [{"source": f"source {index}", "output": "yes", "label": "yes"} for index in range(SHOWN_SAMPLES + 5)]
    rows[1]["output"] = "no"
    rows[2] = {"source": "<script>alert('x')</script> & more", "output": "yes", "label": "yes", "score": "0.5"}
    report.write_samples(run, rows)
    report.write_confusion(run, ["no", "y&s"], [[30, 10], [0, 0]])
    report.write_attention(run, [AttentionMap("A <map>", ["ein", " "], ["a", "</s>"], [[0.9, 0.1], [0.2, 0.8]])])
    report.write_boards(run, [Board("Mate", FEN, "h5f7", "Qxf7#"), Board("Again", FEN)])
    return run, write_report(run).read_text(encoding="utf-8")


def test_the_report_is_one_valid_file_without_scripts(complete_run):
    run, text = complete_run
    page = Page(text)
    assert len(page.ids) == len(set(page.ids))
    fragments = set()
    for reference in page.references:
        fragments |= set(re.findall(r"#([^)\"';]+)", reference))
        assert reference.startswith("#") or "url(#" in reference, reference
    assert fragments <= set(page.ids)
    assert "<script" not in text
    assert "@import" not in text
    assert "prefers-color-scheme:dark" in text
    assert not re.search(r"#0[123]0[0-9a-f]0[0-9a-f]", text)  # CSS variables have replaced all placeholder colors
    assert write_report(run).read_text(encoding="utf-8") == text  # the same bytes: no dates, no random ids


def test_the_report_shows_the_content_of_every_file(complete_run):
    _, text = complete_run
    page = Page(text)
    for section in ("scores", "training", "samples", "confusion", "attention", "boards"):
        assert section in page.ids
    for words in (
        "chess · attention rnn", "1,234,567", "<held out>", '"model": "<b>gpt</b>"', "0.905", "[0.883, 0.923]", "872",
        "training (mean of 5 records)", "learning rate", "<script>alert('x')</script> & more", "5 more samples",
        "A <map>", "ein", "</s>", "Qxf7#",
    ):  # fmt: skip
        assert words in page.text, words
    assert "<dt>steps</dt><dd>80</dd>" in text, "the last step, although results.json has an earlier one"
    assert page.text.count("wrong") == 1
    assert len(re.findall("<svg", text)) == 2 + 2 + 2  # 2 training plots, 2 optimization plots, 2 boards
    assert "y&amp;s" in text
    # Shades of the confusion matrix are fractions of a row: 30 / 40, 10 / 40, and 0 without counts.
    # Shades of the attention map are its weights.
    shades = [float(shade) for shade in re.findall(r"--shade:([\d.]+)", text)]
    assert shades == [0.75, 0.25, 0.0, 0.0, 0.9, 0.1, 0.2, 0.8]


def test_large_attention_maps_have_small_cells_and_short_titles(tmp_path):
    report.write_results(
        tmp_path, task="chess", family="gpt", parameters=1, minutes=1.0, scores=[], no_answer_threshold=None
    )
    letters = list("abcdefghijklmnopqrstuvwxyz01234")
    maps = [
        AttentionMap("word\n" * 60, letters, letters, np.eye(31).tolist()),
        AttentionMap("short", ["\n"], ["long", "b"], [[0.5, 0.5]]),
    ]
    report.write_attention(tmp_path, maps)
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert re.findall(r'<table class="heat (map[ \w]*)">', text) == ["map small", "map"]
    assert text.count('class="upright"') == 2  # both names of the second map, because one of them is long
    assert re.findall(r"<figcaption>(.*?)</figcaption>", text) == [(" ".join(["word"] * 60))[:196] + " ...", "short"]
    assert '<th scope="row">⏎</th>' in text
    assert "<dt>no answer threshold</dt><dd>none</dd>" in text


def test_the_report_omits_the_sections_of_missing_files(tmp_path):
    write_metrics(tmp_path / "metrics.jsonl")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "lo')
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert re.findall(r'<section id="(\w+)"', text) == ["training"]
    assert f"<h1>{tmp_path.name}</h1>" in text
    (tmp_path / "metrics.jsonl").unlink()
    with pytest.raises(ValueError, match="is not a run directory"):
        write_report(tmp_path)
    report.write_results(tmp_path, task="t", family="f", parameters=1, minutes=1.0, scores=[])
    assert "<section" not in write_report(tmp_path).read_text(encoding="utf-8")


def test_without_the_chess_package_the_report_shows_positions_as_text(tmp_path, monkeypatch):
    report.write_results(tmp_path, task="chess", family="gpt", parameters=1, minutes=1.0, scores=[])
    report.write_boards(tmp_path, [Board("Mate", FEN, "h5f7")])
    monkeypatch.setitem(sys.modules, "chess", None)
    text = Page(write_report(tmp_path).read_text(encoding="utf-8")).text
    assert FEN in text
    assert "pip install -e '.[chess]' in" in text


def test_an_invalid_chess_position_raises_an_error(tmp_path):
    report.write_results(tmp_path, task="chess", family="gpt", parameters=1, minutes=1.0, scores=[])
    report.write_boards(tmp_path, [Board("First", "not a position")])
    with pytest.raises(ValueError, match=r"board 'First' in boards.json: "):
        write_report(tmp_path)


def test_written_files_can_be_read(complete_run):
    run, _ = complete_run
    labels, counts = report.read_confusion(run)
    assert labels == ["no", "y&s"]
    np.testing.assert_array_equal(counts, [[30, 10], [0, 0]])
    assert report.read_attention(run)[0].rows == ["ein", " "]
    assert report.read_boards(run)[0] == Board("Mate", FEN, "h5f7", "Qxf7#")
    assert report.read_samples(run)[1] == {"source": "source 1", "output": "no", "label": "yes"}


def test_errors_name_the_damaged_file(tmp_path):
    (tmp_path / "boards.json").write_text("[")
    with pytest.raises(ValueError, match=r"boards.json is not JSON or is damaged"):
        report.read_boards(tmp_path)
    (tmp_path / "attention.json").write_text('[{"title": "x", "rows": []}]')
    with pytest.raises(ValueError, match=r"attention.json, entry 0 lacks the fields 'columns', 'weights'"):
        report.read_attention(tmp_path)
    (tmp_path / "confusion.json").write_text('{"labels": []}')
    with pytest.raises(ValueError, match=r"confusion.json: its keys must be labels and counts, got labels"):
        report.read_confusion(tmp_path)


DAMAGED_VALUES = {
    ("results.json", "[]"): "results.json must hold a JSON object",
    ("results.json", '{"minutes": "long"}'): "results.json: minutes='long' must be a finite number",
    ("results.json", '{"parameters": "many"}'): "results.json: parameters='many' must be a whole number",
    ("results.json", '{"family": 3}'): "results.json: family=3 must be a string",
    ("results.json", '{"scores": [{"name": "a", "value": "b"}]}'): r"scores, entry 0.value='b' must be a finite number",
    ("results.json", '{"scores": 3}'): "results.json: scores must be a list",
    ("metrics.jsonl", '{"step": null}\n'): "metrics.jsonl, line 1: step=None must be a whole number",
    ("metrics.jsonl", '{"step": 1}\n{"step": 2, "validation_loss": [1]}\n'): r"line 2: validation_loss=\[1\] must be",
    ("metrics.jsonl", "[" * 100_000 + "\n"): "metrics.jsonl, line 1: not JSON",
    ("samples.jsonl", '{"source": 3}\n'): "samples.jsonl, line 1: source=3 must be a string",
    ("confusion.json", '{"labels": 3, "counts": []}'): "labels=3 must be a tuple in which each entry is a string",
    ("confusion.json", '{"labels": ["a"], "counts": [[1], []]}'): "confusion.json: ",
    ("boards.json", '[{"title": 1, "fen": "x"}]'): "boards.json, entry 0.title=1 must be a string",
    (
        "attention.json",
        '[{"title": "t", "rows": [1], "columns": ["a"], "weights": [[1]]}]',
    ): "rows=.* must be a tuple in which each entry is a string",
    ("attention.json", '[{"title": "t", "rows": ["a"], "columns": ["a"], "weights": {}}]'): "attention.json, entry 0",
}


@pytest.mark.parametrize(("name", "content"), DAMAGED_VALUES)
def test_a_wrong_value_in_a_file_of_a_run_names_the_file(tmp_path, name, content):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "validation_loss": 2.0}\n')
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=DAMAGED_VALUES[name, content]) as error:
        write_report(tmp_path)
    assert name in str(error.value)


def test_a_file_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n\xff\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl is not UTF-8"):
        report.read_metrics(tmp_path / "metrics.jsonl")
