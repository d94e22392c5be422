"""The HTML page that is generated from result files."""

import json
import re

from benchmarks import report


def row(op="lstm forward", shape="T128 B32 H512", peer="jaxlm", median=0.1, ratio=1.0):
    return {
        "op": op, "shape": shape, "peer": peer, "ratio": ratio, "work": {},
        "median": median, "p10": 0.9 * median, "p90": 1.2 * median,
        "tokens_per_second": 128 / median, "roof_percent": 5 / median, "compile_seconds": 0.5,
    }  # fmt: skip


def write_results(directory, rows, name="a.json", **record):
    path = directory / name
    path.write_text(json.dumps({"program": "recurrence", "machine": {"cpu": "<some> CPU"}, "rows": rows, **record}))
    return path


ROWS = [
    row(), row(peer="torch", median=0.2, ratio=2.0),
    row(shape="T512 B32 H512", median=0.5), row(shape="T512 B32 H512", peer="torch", median=0.4, ratio=0.8),
    row(shape="T128 B1 H650", median=0.01), row(shape="T128 B1 H650", peer="torch", median=0.001, ratio=0.1),
]  # fmt: skip


def test_the_page_lists_the_rows_where_jaxlm_is_slower(tmp_path, capsys):
    output = tmp_path / "page.html"
    assert report.main([str(write_results(tmp_path, ROWS)), "--output", str(output)]) == 0
    assert str(output) in capsys.readouterr().out
    page = output.read_text()
    slower_section = page[page.index("Where jaxlm is slower") : page.index("Share of the peak")]
    assert re.findall(r"<td class=slower>([\d.]+)</td>", slower_section) == ["0.10", "0.80"]  # the lowest ratio first
    assert re.findall(r"<td class=slower>", page[: page.index("Where jaxlm is slower")]) == ["<td class=slower>"] * 2
    assert "2.00" not in slower_section
    assert "&lt;some&gt; CPU" in page
    assert "<script" not in page
    assert page.count("<svg") == 2  # the fraction of the peak, and the time as a function of T


def test_the_page_says_if_no_row_is_slower(tmp_path):
    assert "In none of these rows" in report.page(report.read([write_results(tmp_path, ROWS[:2])]))


def test_each_curve_has_rows_that_differ_in_one_size():
    curves = report.rows_by_size([{**result, "file": "a.json"} for result in ROWS])
    assert list(curves) == [("a.json", "lstm forward, T ... B32 H512", "T")]
    (lines,) = curves.values()
    assert {implementation: [size for size, _ in line] for implementation, line in lines.items()} == {
        "jaxlm": [128, 512],
        "torch": [128, 512],
    }
    assert report.sizes("gpt2 B2 T512 heads=8") == {"B": 2, "T": 512, "heads": 8}


def test_other_files_print_an_error(tmp_path, capsys):
    assert report.main([str(tmp_path / "none.json")]) == 2
    assert "none.json is not a file that a benchmark wrote" in capsys.readouterr().err
    (tmp_path / "b.json").write_text("[1]")
    assert report.main([str(tmp_path / "b.json")]) == 2
    assert "b.json is not a file that a benchmark wrote" in capsys.readouterr().err
    assert report.main([str(write_results(tmp_path, [{"quantity": "loss"}]))]) == 2
    assert "the files have no timed rows" in capsys.readouterr().err
    assert report.main([]) == 2
    assert "there are no result files" in capsys.readouterr().err
