"""Readers of labelled and paired texts, and their errors for bad files."""

import csv
import gzip
import json
import re

import numpy as np
import pytest

from jaxlm.data import corpora
from jaxlm.data.examples import (
    Examples,
    Rejected,
    label_ids,
    read_jsonl,
    read_labelled,
    read_labelled_lines,
    read_pairs,
    read_table,
)

FIELDS = {"text": "sentence", "label": "label"}


def write(path, text, encoding="utf-8"):
    data = text.encode(encoding)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("name", ["a.tsv", "a.tsv.gz"])
def test_quotes_are_special_in_csv_but_not_in_tsv(tmp_path, name):
    tsv = write(tmp_path / name, '\ufefflabel\tsentence\n1\t"a" fine, film\r\n0\t" bad\n')
    assert read_table(tsv, FIELDS).rows == [{"text": '"a" fine, film', "label": "1"}, {"text": '" bad', "label": "0"}]
    path = write(tmp_path / "a.csv", 'sentence,label\n"a ""fine"", film",1\n')
    assert read_table(path, FIELDS).rows == [{"text": 'a "fine", film', "label": "1"}]


def test_quoted_fields_can_contain_line_ends_and_errors_have_line_numbers_of_the_file(tmp_path):
    fields = {"text": "text", "label": "label"}
    path = write(tmp_path / "a.csv", 'text,label\r\n"a\r\n\r\nb",1\r\nc,2,3\r\n"d\ne\n",\r\nf,4')
    examples = read_table(path, fields, on_error="report")
    assert examples.rows == [{"text": "a\n\nb", "label": "1"}, {"text": "f", "label": "4"}]
    assert [line.line for line in examples.rejected] == [5, 6]
    unclosed = write(tmp_path / "c.csv", 'label,text\n1,a\n2,"b\n3,c\n4,d\n')
    for on_error in ("raise", "report"):
        with pytest.raises(ValueError, match=r"c.csv, line 3: the row that begins here has a quote that is not closed"):
            read_table(unclosed, fields, on_error=on_error)
    swallowed = read_table(write(tmp_path / "s.csv", 'label,text\n1,"a\n2,b\n3,"c"\n4,d\n'), fields, on_error="report")
    assert swallowed.column("text") == ["d"]
    assert swallowed.rejected == (Rejected(2, "not CSV: ',' expected after '\"' (lines 2 to 4)"),)
    with pytest.raises(ValueError, match="h.csv, line 1: not CSV"):
        read_labelled(write(tmp_path / "h.csv", '"text"x,label\na,1\n'))
    with pytest.raises(ValueError, match="r.csv, line 2: not CSV: new-line character"):
        read_table(write(tmp_path / "r.csv", "text,label\na\rb,1\n"), fields)
    tsv = write(tmp_path / "r.tsv", "text\tlabel\na\rb\t1")
    assert read_table(tsv, fields).rows == [{"text": "a\rb", "label": "1"}]


def test_csv_fields_may_be_longer_than_the_limit_of_the_csv_module(tmp_path):
    text, limit = "a" * 200_000, csv.field_size_limit()
    examples = read_table(write(tmp_path / "a.csv", f"text,label\n{text},1\n"), {"text": "text"})
    assert examples.column("text") == [text]
    assert csv.field_size_limit() == limit


def test_lines_json_and_parallel_files_are_read(tmp_path):
    """Lines ``label text``, JSON lines with renamed fields, and parallel files are read."""
    lines = write(tmp_path / "a.all", "0 caf\xe9 noir \n1 b\n", "latin-1")
    assert read_labelled_lines(lines, encoding="latin-1").rows[0] == {"label": "0", "text": "caf\xe9 noir"}
    objects = [json.dumps({"t": "x", "s": ["y"]}), "", "  ", json.dumps({"t": "z", "s": []})]
    jsonl = write(tmp_path / "a.jsonl", "\n".join(objects))
    assert read_jsonl(jsonl, {"source": "t", "target": "s"}).column("source") == ["x", "z"]
    source, target = write(tmp_path / "a.en", "one\ntwo\n"), write(tmp_path / "a.de.gz", "eins\nzwei\n")
    assert read_pairs(source, target)[1] == {"source": "two", "target": "zwei"}


def test_read_labelled_finds_the_text_column(tmp_path):
    assert read_labelled(write(tmp_path / "a.tsv", "label\tcontent\n1\tx\n")).rows == [{"text": "x", "label": "1"}]
    # The name `sentence_id` only begins with the name of a text column.
    path = write(tmp_path / "b.tsv", "sentence_id\ttext\tlabel\n7\tx\t1\n")
    assert read_labelled(path).rows == [{"text": "x", "label": "1"}]
    assert read_labelled(write(tmp_path / "a.all", "1 x\n")).rows == [{"label": "1", "text": "x"}]
    for name in ("A.CSV", "a.Csv.gz"):
        path = write(tmp_path / name, "text,label\na fine film,1\n")
        assert read_labelled(path).rows == [{"text": "a fine film", "label": "1"}]


def test_read_labelled_reads_valid_lines_after_an_invalid_one(tmp_path):
    lines = [
        '{"id": 1}', '{"text": "b", "label": 1}', '{"text": "c", "label": true}', '{"text": "d", "label": NaN}',
        '{"text": "e\\ud83d", "label": 1}', '{"text": "f", "label": "\\udce9"}',
        '{"text": "g", "text": "", "label": 1}',
    ]  # fmt: skip
    examples = read_labelled(write(tmp_path / "a.jsonl", "\n".join(lines)), on_error="report")
    assert examples.rows == [{"text": "b", "label": 1}]
    assert [line.line for line in examples.rejected] == [1, 3, 4, 5, 6, 7]
    reasons = [line.reason for line in examples.rejected]
    assert reasons[1] == "label=True must be a string or a whole number"
    assert reasons[3] == r"character 1 of 'text', '\ud83d', is a surrogate and has no UTF-8 bytes"
    assert reasons[4] == r"character 0 of 'label', '\udce9', is a surrogate and has no UTF-8 bytes"
    assert reasons[5] == "not JSON: the key 'text' occurs twice"
    for name, text in (("b.tsv", "Text\tlabel\nx\t1\n"), ("b.jsonl", '{"Text": "x", "label": 1}')):
        message = r"no text column \(one of 'sentence', 'text', 'content'\): its columns are 'Text', 'label'"
        with pytest.raises(ValueError, match=message):
            read_labelled(write(tmp_path / name, text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("label\tsentence\tlabel\n1\tx\t0\n", "has 2 columns 'label': its columns are 'label', 'sentence', 'label'"),
        ("label\ttext\n1\tx\n", "has no column 'sentence': its columns are 'label', 'text'"),
        ("label\tsentence\n1\tx\n2\n", "line 3: the row has 1 columns, but the first line has 2"),
        ("label\tsentence\n1\t \n", "line 2: 'sentence' is empty"),
        ("label\tsentence\n", "has no examples"),
        ("", "is empty: the first line must name the columns"),
    ],
)
def test_errors_name_the_file_and_line_of_a_bad_table(tmp_path, text, message):
    path = write(tmp_path / "bad.tsv", text)
    with pytest.raises(ValueError, match=message) as error:
        read_table(path, FIELDS)
    assert str(path) in str(error.value)


def test_errors_for_other_bad_files(tmp_path):
    with pytest.raises(ValueError, match="line 2: not JSON"):
        read_jsonl(write(tmp_path / "a.jsonl", '{"a": "x"}\n{"a": \n'), {"text": "a"})
    with pytest.raises(ValueError, match="line 1: 'b' is null"):
        read_jsonl(write(tmp_path / "n.jsonl", '{"b": null}\n'), {"text": "b"})
    with pytest.raises(ValueError, match="line 1: no column 'b': the columns are 'a'"):
        read_jsonl(write(tmp_path / "b.jsonl", '{"a": "x"}\n'), {"text": "b"})
    with pytest.raises(ValueError, match="has 2 lines and .* has 1: line n of both must be a pair"):
        read_pairs(write(tmp_path / "a", "x\ny\n"), write(tmp_path / "b", "x\n"))
    with pytest.raises(ValueError, match=r"c is not UTF-8 text: byte 0xe9 at offset 5, line 1\..*latin-1"):
        read_labelled_lines(write(tmp_path / "c", "1 caf\xe9\n", "latin-1"))
    compressed = gzip.compress("".join(f"1 line {n} {n * n}\n" for n in range(2000)).encode())
    (tmp_path / "cut.gz").write_bytes(compressed[: len(compressed) // 2])
    with pytest.raises(ValueError, match="the gzip file is truncated or damaged"):
        read_labelled_lines(tmp_path / "cut.gz")
    with pytest.raises(ValueError, match=r"a.txt is neither a .tsv nor a .csv file: pass the delimiter"):
        read_table(write(tmp_path / "a.txt", "x"), FIELDS)
    with pytest.raises(ValueError, match=r"delimiter=';' is not supported: convert .*a.txt to TSV"):
        read_table(tmp_path / "a.txt", FIELDS, delimiter=";")
    for on_error in ("Raise", "ignore"):
        with pytest.raises(ValueError, match=f"on_error='{on_error}' must be 'raise' or 'report'"):
            read_jsonl(tmp_path / "b.jsonl", {"text": "b"}, on_error=on_error)
    deep = write(tmp_path / "deep.jsonl", "[" * 100_000 + '\n{"text": "x", "label": 1}')
    with pytest.raises(ValueError, match="deep.jsonl, line 1: not JSON: it is nested too deeply"):
        read_labelled(deep)
    assert read_labelled(deep, on_error="report").rejected == (Rejected(1, "not JSON: it is nested too deeply"),)
    with pytest.raises(FileNotFoundError, match="none.tsv is not a file"):
        read_table(tmp_path / "none.tsv", FIELDS)


def test_bad_lines_are_reported(tmp_path):
    path = write(tmp_path / "a.tsv", "label\tsentence\n1\tx\n1\n0\ty\n")
    examples = read_table(path, FIELDS, on_error="report")
    assert len(examples) == 2
    assert examples.rejected == (Rejected(3, "the row has 1 columns, but the first line has 2: ['1']"),)


def test_splits_keep_groups_together_and_all_examples():
    rows = [{"text": str(n), "group": n // 4} for n in range(80)]
    splits = Examples(rows).split(0.1, 0.2, seed=3, by="group")
    assert sorted(int(text) for subset in splits for text in subset.column("text")) == list(range(80))
    groups = [set(subset.column("group")) for subset in splits]
    assert [len(group) for group in groups] == [2, 4, 14]
    assert not groups[0] & groups[1]
    assert not groups[0] & groups[2]
    assert [subset.rows for subset in Examples(rows).split(0.1, 0.2, seed=3, by="group")] == [
        subset.rows for subset in splits
    ]
    by_values = Examples(rows).split(0.1, 0.2, seed=3, by=[n // 4 for n in range(80)])
    assert [subset.rows for subset in by_values] == [subset.rows for subset in splits]
    with pytest.raises(ValueError, match="each example needs one value: got 80 examples and 2 values"):
        Examples(rows).split(0.1, by=[0, 1])
    with pytest.raises(ValueError, match="1 groups in"):
        Examples(rows).split(0.1, by=[0] * 80)
    with pytest.raises(ValueError, match="their sum must be below 1"):
        Examples(rows).split(0.5, 0.5)
    with pytest.raises(ValueError, match="their sum must be below 1"):
        Examples(rows).split(0.7, 0.2, 0.1)  # the sum of the rounded numbers is 0.9999999999999999
    with pytest.raises(ValueError, match="too few for the fractions"):
        Examples(rows[:3]).split(0.01)


def test_every_example_is_in_one_test_fold():
    folds = Examples([{"n": n} for n in range(23)]).folds(5, seed=1)
    assert sorted(n for _, test in folds for n in test.column("n")) == list(range(23))
    assert all(set(training.column("n")).isdisjoint(test.column("n")) for training, test in folds)
    assert all(len(training) + len(test) == 23 for training, test in folds)


def test_folds_keep_groups_together():
    examples = Examples([{"n": n, "group": n % 7} for n in range(23)])
    folds = examples.folds(3, seed=1, by="group")
    assert sorted(n for _, test in folds for n in test.column("n")) == list(range(23))
    assert all(set(training.column("group")).isdisjoint(test.column("group")) for training, test in folds)
    assert [len(set(test.column("group"))) for _, test in folds] == [3, 2, 2]
    values = [n % 7 for n in range(23)]
    assert [test.rows for _, test in examples.folds(3, seed=1, by=values)] == [test.rows for _, test in folds]
    with pytest.raises(ValueError, match="8 folds of 7 different values of 'group': choose from 2 to the number of"):
        examples.folds(8, by="group")
    with pytest.raises(ValueError, match="each example needs one value: got 23 examples and 2 values"):
        examples.folds(2, by=[0, 1])


def test_folds_without_groups_are_those_of_the_permutation():
    """The examples of a fold, and their order, determine the results of a training with a fixed seed."""
    order = np.random.default_rng(1).permutation(23)
    chunks = np.array_split(order, 4)
    for folds in (Examples([{"n": n} for n in range(23)]).folds(4, seed=1, by=by) for by in (None, range(23))):
        assert [test.column("n") for _, test in folds] == [chunk.tolist() for chunk in chunks]
        assert [training.column("n") for training, _ in folds] == [
            np.concatenate(chunks[:fold] + chunks[fold + 1 :]).tolist() for fold in range(4)
        ]


def test_labels_are_sorted_numerically():
    examples = Examples([{"label": label} for label in (10, 9, "2")])
    assert examples.label_names() == ("2", "9", "10")
    assert label_ids(examples.column("label"), examples.label_names()).tolist() == [2, 1, 0]
    assert Examples([{"label": label} for label in ("1", "02", "2", "01")]).label_names() == ("01", "1", "02", "2")
    with pytest.raises(ValueError, match="example 0 of the examples has the label 'x': known labels are a, b"):
        label_ids(["x"], ["a", "b"])
    with pytest.raises(ValueError, match="example 1 of the examples has no field 'label'"):
        Examples([{"label": 1}, {}]).column("label")


@pytest.mark.parametrize("label", [None, 1.0, float("nan"), True, np.bool_(False), np.float32(1), ["1"]])
def test_other_labels_than_strings_and_integers_are_refused(label):
    examples = Examples([{"text": "a", "label": "1"}, {"text": "b", "label": label}], "a.tsv")
    message = "must be a string or a whole number; convert the labels, or leave the example out"
    message = re.escape(f"example 1 of a.tsv: label={label!r} {message}")
    with pytest.raises(ValueError, match=message):
        examples.label_names()
    with pytest.raises(ValueError, match=message):
        label_ids(examples.column("label"), ("1", str(label)), "a.tsv")
    examples = Examples([{"label": label} for label in (np.int64(2), np.str_("1"), 2)])
    assert examples.label_names() == ("1", "2")
    assert label_ids(examples.column("label"), ("1", "2")).tolist() == [1, 0, 1]


def test_included_examples():
    """The included verses and play passages have the documented number, content and length."""
    pairs = corpora.verses()
    assert len(pairs) == 5833
    assert pairs[0] == {
        "source": "In the beginning, God created the heavens and the earth.",
        "target": "EN el principio crió Dios los cielos y la tierra.",
    }
    passages = corpora.play_passages()
    assert set(passages.column("label")) == set(corpora.PLAYS)
    assert np.mean([len(text.split()) for text in passages.column("text")]) == pytest.approx(64, abs=5)
    words = " ".join(passages.column("text")).split()
    assert "stand:" in words  # the end of a spoken line
    assert "JULIET:" not in words  # a speaker


def test_an_index_error_of_a_source_does_not_end_the_examples():
    class Source:
        def __len__(self):
            return 3

        def __getitem__(self, index):
            return {"text": ["a", "b"][index]}

    examples = Examples.from_random_access(Source(), {"text": "text"})
    with pytest.raises(IndexError):
        examples.column("text")


def test_labelled_json_lines(tmp_path):
    """``read_labelled`` reads JSON lines, and names a missing text column and a line that is not JSON."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"label": 1, "content": "fine"}\n{"label": 0, "content": "bad"}\n')
    examples = read_labelled(path)
    assert examples.column("text") == ["fine", "bad"]
    assert examples.label_names() == ("0", "1")
    assert label_ids(examples.column("label"), ("0", "1")).tolist() == [1, 0]
    assert label_ids(examples.column("label"), (0, 1)).tolist() == [1, 0]
    path.write_text('{"label": 1, "words": "fine"}\n')
    with pytest.raises(ValueError, match=r"a.jsonl has no text column .one of 'sentence'"):
        read_labelled(path)
    path.write_text('fine\n{"label": 1, "text": "good"}\n')
    with pytest.raises(ValueError, match=r"a.jsonl, line 1: not JSON"):
        read_labelled(path)
    assert read_labelled(path, on_error="report").column("text") == ["good"]


def test_labelled_lines_are_not_json_and_have_no_tab(tmp_path):
    (tmp_path / "a.json").write_text('{"label": 1, "text": "fine"}\n')
    with pytest.raises(ValueError, match=r"a.json is a JSON file: convert it to .jsonl"):
        read_labelled(tmp_path / "a.json")
    (tmp_path / "a.txt").write_text("1\ta fine film\n")
    with pytest.raises(ValueError, match="line 1: the line must have a label, a space and a text"):
        read_labelled(tmp_path / "a.txt")
    with pytest.raises(ValueError, match="a.txt has no examples: all 1 lines are invalid, for example line 1"):
        read_labelled(tmp_path / "a.txt", on_error="report")
