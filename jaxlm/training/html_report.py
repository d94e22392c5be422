"""A self-contained HTML report of a run: scores, curves, samples, confusion matrix, attention maps, chess boards.

The page needs no other file, no network and no script. It supports light and dark themes and small screens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm import extras, integrity, processes
from jaxlm.metrics import Score
from jaxlm.training import plots, report

SHOWN_SAMPLES = 20
"""Number of visible samples. All other samples are in a collapsed section."""

MAX_UNWRAPPED_LENGTH = 20
"""A column of the sample table has no line breaks in its cells if its longest cell has at most this many characters."""

MAX_COLUMNS_OF_LARGE_CELLS = 30
"""An attention map with more than this number of columns has small cells."""

MAX_TITLE = 200
"""Maximum length of the title of an attention map, in characters. Longer titles are cut."""

REPORT = "report.html"
CONFIG = "config.json"
_FIRST_COLUMNS = ("source", "reference", "output", "label", "score")


def write_report(run: str | Path) -> Path:
    """Write ``report.html`` to a run directory and return its path.

    The page has one section for each result file of the run (``jaxlm.training.report`` lists these files). With several
    processes, only the first process writes.

    Raises:
        FileNotFoundError: the directory does not exist.
        ValueError: the directory is not a run directory, or one of its files is damaged.
    """
    run = report.check_run(run)
    path = run / REPORT
    if processes.is_first():
        integrity.replace_text(path, _page(run))
    return path


def _page(run: Path) -> str:
    read = report.read_if_exists
    results = read(report.read_results, run, {})
    records = read(report.read_metrics, run / report.METRICS, [])
    names = [plots.readable_name(results[name]) for name in ("task", "family") if name in results]
    title = " · ".join(names) or run.resolve().name
    curves = plots.training_panels(records), plots.optimization_panels(records)
    contents: tuple[tuple[str, str, Callable[[Any], str], Any], ...] = (
        ("scores", "Scores", _scores, results.get("scores")),
        ("training", "Training", _curves, curves if any(curves) else None),
        ("samples", "Samples", _samples, read(report.read_samples, run, [])),
        ("confusion", "Confusion matrix", _confusion, read(report.read_confusion, run, None)),
        ("attention", "Attention", _attention, read(report.read_attention, run, [])),
        ("boards", "Boards", _boards, read(report.read_boards, run, [])),
    )
    sections = [(name, heading, to_html(content)) for name, heading, to_html, content in contents if content]
    links = "".join(f'<a href="#{name}">{escape(heading)}</a>' for name, heading, _ in sections)
    body = "".join(
        f'<section id="{name}"><h2>{escape(heading)}</h2>{html}</section>' for name, heading, html in sections
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body><main>"
        f'<header><h1>{escape(title)}</h1><p class="path">{escape(run.resolve().name)}</p></header>'
        f"{_summary(results, records)}{_configuration(run)}<nav>{links}</nav>{body}{_footer(results)}"
        "</main></body></html>\n"
    )


# --------------------------------------------------------------------------------------------- header and footer


def _summary(results: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> str:
    """An HTML list: the last step, and the entries of ``results.json`` except task, family, scores and versions."""
    entries = {name: value for name, value in results.items() if name not in ("task", "family", "scores", "versions")}
    steps = [record["step"] for record in report.valid_records(records) if "step" in record]
    if steps:
        entries = {"steps": 0} | entries | {"steps": max(steps)}  # the steps come first
    items = "".join(
        f"<div><dt>{escape(plots.readable_name(name))}</dt><dd>{_value_html(value)}</dd></div>"
        for name, value in entries.items()
    )
    return f'<dl class="facts">{items}</dl>' if entries else ""


def _value_html(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    if value is None:
        return "none"
    return escape(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def _configuration(run: Path) -> str:
    path = run / CONFIG
    if not path.exists():
        return ""
    text = path.read_text(encoding="utf-8").strip()
    return f"<details><summary>Configuration</summary><pre>{escape(text)}</pre></details>"


def _footer(results: Mapping[str, Any]) -> str:
    versions = results.get("versions", {})
    text = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"<footer>{escape(text)}</footer>" if text else ""


# --------------------------------------------------------------------------------------------- scores and curves


def _scores(scores: Sequence[Score]) -> str:
    header = "<th>metric</th><th>value</th><th>95 % interval</th><th>examples</th><th>method</th>"
    rows = (
        f'<th scope="row">{escape(score.name)}</th><td class="value">{score.value_text}</td>'
        f'<td class="number">{score.interval_text or "-"}</td>'
        f'<td class="number">{"-" if score.count is None else f"{score.count:,}"}</td>'
        f'<td class="detail">{escape(score.detail).replace("|", "|<wbr>")}</td>'
        for score in scores
    )
    return f'<div class="wide">{_table("scores", header, rows)}</div>'


def _table(css_class: str, header: str, rows: Iterable[str]) -> str:
    """An HTML table from the cells of its header and the cells of each row."""
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f'<table class="{css_class}"><thead><tr>{header}</tr></thead><tbody>{body}</tbody></table>'


def _curves(panels: tuple[list[plots.Panel], list[plots.Panel]]) -> str:
    main, details = panels
    html = _figures(main, "curve")
    if details:
        html += f"<details><summary>Optimization</summary>{_figures(details, 'optimization')}</details>"
    return html


def _figures(panels: Sequence[plots.Panel], prefix: str) -> str:
    figures = "".join(f"<figure>{plots.svg(panel, f'{prefix}-{index}')}</figure>" for index, panel in enumerate(panels))
    return f'<div class="figures">{figures}</div>'


# --------------------------------------------------------------------------------------------- samples


def _samples(rows: list[dict[str, str]]) -> str:
    names = dict.fromkeys(name for row in rows for name in row)
    columns = [name for name in _FIRST_COLUMNS if name in names]
    columns += [name for name in names if name not in columns]
    short = {name for name in columns if max(len(row.get(name, "")) for row in rows) <= MAX_UNWRAPPED_LENGTH}
    header = "".join(f"<th>{escape(name)}</th>" for name in columns)
    cells = ["".join(_sample_cell(row, name, name in short) for name in columns) for row in rows]
    html = _table("samples", header, cells[:SHOWN_SAMPLES])
    if len(rows) > SHOWN_SAMPLES:
        table = _table("samples", header, cells[SHOWN_SAMPLES:])
        html += f"<details><summary>{len(rows) - SHOWN_SAMPLES:,} more samples</summary>{table}</details>"
    return html


def _sample_cell(row: Mapping[str, str], name: str, is_short: bool) -> str:
    """A cell of the column ``name``. In a short column, the cells have no line breaks."""
    is_wrong = name == "output" and "label" in row and row.get("output") != row["label"]
    mark = ' <span class="wrong">wrong</span>' if is_wrong else ""
    css_class = "short" if is_short else "text"
    return f'<td data-name="{escape(name)}" class="{css_class}" dir="auto">{escape(row.get(name, ""))}{mark}</td>'


# --------------------------------------------------------------------------------------------- heat maps


def _confusion(labels_and_counts: tuple[list[str], np.ndarray]) -> str:
    labels, counts = labels_and_counts
    totals = counts.sum(axis=1)
    rows = (
        f'<th scope="row">{escape(label)}</th>'
        + "".join(
            _heat_cell(fraction, f"{count:,}<small>{fraction:.0%}</small>", f"{label} predicted as {other}")
            for other, count, fraction in zip(labels, row, row / max(total, 1), strict=True)
        )
        + f'<td class="total">{total:,}</td>'
        for label, row, total in zip(labels, counts, totals, strict=True)
    )
    is_vertical = len(labels) > 6 or max(map(len, labels), default=0) > 14
    header = f'<td></td>{_column_names(map(escape, labels), is_vertical)}<th class="total">all</th>'
    caption = "Rows are labels, columns are predictions. The shade is the count divided by the total of the row."
    return f'<p class="note">{caption}</p><div class="wide">{_table("heat confusion", header, rows)}</div>'


def _attention(maps: Sequence[report.AttentionMap]) -> str:
    caption = "The token of a row attends to the tokens of the columns. A stronger color is a larger weight." + _SCALE
    figures = "".join(
        f'<figure class="wide"><figcaption>{_title(item.title)}</figcaption>{_attention_table(item)}</figure>'
        for item in maps
    )
    return f'<p class="note">{caption}</p><div class="maps">{figures}</div>'


def _title(text: str) -> str:
    """The text on one line, escaped for HTML and cut to :data:`MAX_TITLE` characters."""
    line = " ".join(text.split())
    return escape(line if len(line) <= MAX_TITLE else line[: MAX_TITLE - 4] + " ...")


def _attention_table(item: report.AttentionMap) -> str:
    rows = (
        f'<th scope="row">{_token(row)}</th>'
        + "".join(
            _heat_cell(weight, "", f"{row} → {column}: {weight:.2f}")
            for column, weight in zip(item.columns, weights, strict=True)
        )
        for row, weights in zip(item.rows, np.asarray(item.weights, np.float64), strict=True)
    )
    header = f"<td></td>{_column_names(map(_token, item.columns), max(map(len, item.columns)) > 1)}"
    small = " small" if len(item.columns) > MAX_COLUMNS_OF_LARGE_CELLS else ""
    return _table(f"heat map{small}", header, rows)


def _heat_cell(fraction: float, text: str, title: str) -> str:
    shade = min(max(float(fraction), 0.0), 1.0)
    strong = " strong" if shade > 0.55 else ""
    return f'<td class="cell{strong}" style="--shade:{shade:.3f}" title="{escape(title)}">{text}</td>'


def _column_names(names: Iterable[str], is_vertical: bool) -> str:
    """Header cells with the column names, which are HTML."""
    css_class = ' class="upright"' if is_vertical else ""
    return "".join(f'<th scope="col"{css_class}><span>{name}</span></th>' for name in names)


def _token(token: str) -> str:
    """A token as visible HTML text. Each line break becomes ⏎.

    If a token has only other white space, each of its characters becomes ␣. An empty token becomes one ␣. Without these
    replacements, the labels of such tokens would look empty."""
    text = token.replace("\n", "⏎")
    return escape(text) if text.strip() else "␣" * max(len(text), 1)


_SCALE = '<span class="scale" aria-hidden="true"><i>0</i><b></b><i>1</i></span>'


# --------------------------------------------------------------------------------------------- chess


def _boards(boards: Sequence[report.Board]) -> str:
    figures = "".join(
        f"<figure><figcaption>{escape(board.title)}</figcaption>{_board_html(board, index)}"
        f'<p class="note">{escape(board.text)}</p></figure>'
        for index, board in enumerate(boards)
    )
    return f'<div class="boards">{figures}</div>'


def _board_html(board: report.Board, index: int) -> str:
    try:
        import chess
        import chess.svg
    except ImportError:
        note = f"To see the board, run {extras.install_command('chess')}, and write the report again."
        return f"<p><code>{escape(board.fen)}</code></p><p class='note'>{note}</p>"
    try:
        position = chess.Board(board.fen)
        move = None if board.last_move is None else chess.Move.from_uci(board.last_move)
    except ValueError as error:
        raise ValueError(f"board {board.title!r} in {report.BOARDS}: {error}") from error
    checked_king = position.king(position.turn) if position.is_check() else None
    drawing = chess.svg.board(position, lastmove=move, check=checked_king)
    return plots.inline_svg(drawing, f"board-{index}", label=f"chess position {board.fen}")


_STYLE = """
:root{--page:#fff;--text:#1d2329;--soft:#5d6773;--line:#d9dee3;--panel:#f5f7f9;--accent:0,100,170;--wrong:#b3261e;
--series-0:#0072b2;--series-1:#d55e00;--series-2:#009e73;--series-3:#b0578d;--series-4:#3b93c4;--series-5:#b97d00;
--series-6:#555;color-scheme:light dark}
@media (prefers-color-scheme:dark){:root{--page:#14181c;--text:#e4e8ec;--soft:#9aa5b1;--line:#333b44;--panel:#1d2329;
--accent:77,166,232;--wrong:#ff8a80;--series-0:#4da6e8;--series-1:#ff8f4d;--series-2:#35c49a;--series-3:#e39bc4;
--series-4:#8fd0f5;--series-5:#f0b95a;--series-6:#aaa}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--text);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif;-webkit-text-size-adjust:100%}
main{max-width:1080px;margin:0 auto;padding:24px 20px 48px}
h1{margin:0;font-size:1.75rem;line-height:1.2}
h2{margin:0 0 12px;font-size:1.2rem}
section{margin-top:36px}
.path,.note,footer{color:var(--soft);font-size:.875rem}
.path{margin:2px 0 0;overflow-wrap:anywhere}
.note{margin:0 0 10px}
footer{margin-top:40px;padding-top:10px;border-top:1px solid var(--line)}
.facts{display:flex;flex-wrap:wrap;gap:10px 32px;margin:18px 0}
.facts div{max-width:100%}
dt{color:var(--soft);font-size:.8rem}
dd{margin:0;overflow-wrap:anywhere}
nav{display:flex;flex-wrap:wrap;gap:4px 18px;margin-top:16px;padding:8px 0;border-block:1px solid var(--line)}
a{color:var(--series-0)}
summary{cursor:pointer;color:var(--soft);padding:6px 0}
pre{margin:0;padding:12px;background:var(--panel);border-radius:6px;overflow-x:auto;font-size:.8rem}
table{border-collapse:collapse}
th{font-weight:600;text-align:left}
.wide{overflow-x:auto;max-width:100%}
.scores,.samples{width:100%}
.scores th,.scores td,.samples th,.samples td{padding:7px 14px 7px 0;border-bottom:1px solid var(--line);
vertical-align:top}
thead th{color:var(--soft);font-size:.8rem;font-weight:500}
.number,.value{font-variant-numeric:tabular-nums;white-space:nowrap}
.value{font-weight:700}
.detail{color:var(--soft);font-size:.78rem;overflow-wrap:anywhere}
.samples{font-size:.92rem;table-layout:auto}
.samples .short{white-space:nowrap;font-variant-numeric:tabular-nums}
.samples .text{white-space:pre-wrap;overflow-wrap:anywhere}
.wrong{color:var(--wrong);border:1px solid currentColor;border-radius:4px;padding:0 5px;font-size:.72rem}
figure{margin:0;min-width:0}
figure svg{display:block;width:100%;height:auto}
figure svg text{font-family:inherit!important}
figcaption{font-weight:600;margin-bottom:6px;overflow-wrap:anywhere}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(340px,100%),1fr));gap:20px}
.figures figure{max-width:560px}
.boards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(260px,100%),1fr));gap:24px}
.boards .note{margin-top:6px}
.maps{display:flex;flex-wrap:wrap;gap:28px 40px}
.maps figcaption{width:0;min-width:100%}
.heat{font-size:.85rem;border-collapse:separate;border-spacing:2px}
.heat th{font-weight:500;padding:2px 8px 2px 0;white-space:nowrap}
.heat thead th{color:var(--text);font-size:inherit;text-align:center;padding:0 6px 4px;vertical-align:bottom}
.heat tbody th{position:sticky;left:0;background:var(--page);text-align:right;z-index:1}
.heat .upright{padding:0 0 6px}
.upright span{writing-mode:vertical-rl;transform:rotate(180deg);white-space:nowrap}
.cell{background:rgba(var(--accent),var(--shade));border-radius:3px;text-align:center;
box-shadow:inset 0 0 0 1px var(--line)}
.cell small{display:block;font-size:.72rem;opacity:.8}
.confusion .cell{min-width:64px;padding:8px 10px;font-variant-numeric:tabular-nums}
.strong{color:#fff}
.total{color:var(--soft);padding-left:10px;text-align:right}
.map .cell{width:26px;min-width:26px;height:26px;padding:0}
.map thead th{padding:0 0 4px}
.map.small{font-size:.72rem}.map.small .cell{width:19px;min-width:19px;height:19px}
.scale{display:inline-flex;align-items:center;gap:5px;margin-left:12px}
.scale i{font-style:normal}
.scale b{width:90px;height:11px;border-radius:3px;box-shadow:inset 0 0 0 1px var(--line);
background:linear-gradient(90deg,transparent,rgb(var(--accent)))}
@media (prefers-color-scheme:dark){.strong{color:#0b0f13}}
@media (max-width:640px){main{padding:16px 14px 32px}
.scores thead,.scores tbody{display:block}
.scores tr{display:grid;grid-template-columns:4fr 3fr 5fr 3fr;padding:5px 0;border-bottom:1px solid var(--line)}
.scores tr>:nth-child(n){padding:2px 8px 2px 0;border:0}
.scores .detail{grid-column:1/-1}.scores thead th:last-child{display:none}
.samples thead{display:none}.samples,.samples tbody,.samples tr,.samples td{display:block}
.samples tr{border:1px solid var(--line);border-radius:8px;padding:8px 12px;margin-bottom:10px}
.samples td{border:0;padding:3px 0}
.samples td.short{display:inline-block;margin-right:24px}
.map .cell{width:18px;min-width:18px;height:20px}.map{font-size:.78rem}
.samples td::before{content:attr(data-name);display:block;color:var(--soft);font-size:.75rem}}
@media print{details{display:none}.figures{grid-template-columns:1fr 1fr}}
"""
