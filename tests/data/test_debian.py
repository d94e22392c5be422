"""Descriptions of Debian packages, and the project of a package."""

import gzip
import json

import pytest

from jaxlm.data.debian import project_name, read_descriptions

RECORDS = """\
Package: libbox-dev
Source: boxes (1.2-3)
Version: 1.2-3
Description-en: library of boxes (headers)
 A box is a container:
  * it has a lid
  * it has a floor
 .
 This package has the headers.
Description-md5: 0123

Package: shelf
Version: 2
Description: board for boxes
Homepage: https://example.org

Package: table
Description: flat board on legs
 A table is where boxes are put.

Package: table
Description: flat board on legs
 A table in another version.
"""


@pytest.mark.parametrize("suffix", [".txt", ".txt.gz"])
def test_control_records_are_read(tmp_path, suffix):
    path = tmp_path / f"packages{suffix}"
    path.write_bytes(gzip.compress(RECORDS.encode()) if suffix.endswith("gz") else RECORDS.encode())
    examples = read_descriptions(path)
    assert list(examples) == [
        {
            "package": "libbox-dev", "project": "boxes", "summary": "library of boxes (headers)",
            "text": "A box is a container:\n * it has a lid\n * it has a floor\n\nThis package has the headers.",
        },
        {
            "package": "table", "project": "table", "summary": "flat board on legs",
            "text": "A table is where boxes are put.",
        },
    ]  # fmt: skip
    assert [(rejected.line, rejected.reason) for rejected in examples.rejected] == [
        (12, "the record needs a package name, a synopsis and a description"),
        (21, "package table is repeated"),
    ]


def test_json_lines_are_read(tmp_path):
    path = tmp_path / "synopses.jsonl"
    rows = [
        {"package": "libbox-dev", "text": "A box.", "summary": "box"},
        {"package": "empty", "text": "", "summary": "x"},
    ]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    examples = read_descriptions(path)
    assert list(examples) == [{**rows[0], "project": "box"}]
    assert [rejected.line for rejected in examples.rejected] == [2]


def test_json_lines_need_no_package(tmp_path):
    path = tmp_path / "own.JSONL"
    path.write_text('{"text": "A long text.", "summary": "Short."}\n{"text": "More text.", "summary": "More."}\n')
    examples = read_descriptions(path)
    assert examples.column("summary") == ["Short.", "More."]
    assert len(set(examples.column("project"))) == 2, "each text is a project"


def test_json_lines_with_other_values_than_texts_are_rejected(tmp_path):
    path = tmp_path / "synopses.jsonl"
    rows = [{"package": name, "text": "A box.", "summary": "box"} for name in ("a", 3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    examples = read_descriptions(path)
    assert [row["package"] for row in examples] == ["a"]
    assert [(rejected.line, rejected.reason) for rejected in examples.rejected] == [(2, "package=3 must be a string")]


def test_the_error_for_a_file_without_long_descriptions_has_a_command(tmp_path):
    path = tmp_path / "packages.txt"
    path.write_text("Package: shelf\nDescription: board for boxes\n")
    with pytest.raises(
        ValueError, match="has no description: use a .jsonl file .* or Debian records from apt-cache show"
    ):
        read_descriptions(path)


@pytest.mark.parametrize(
    "packages",
    [
        ("0ad", "0ad-data", "0ad-data-common"),
        ("libssl3", "libssl-dev", "libssl1.1-dbg"),
        ("python3-yaml", "libyaml-perl"),
    ],
)
def test_packages_of_one_project_have_equal_project_names(packages):
    assert len({project_name(name) for name in packages}) == 1


def test_an_indented_line_after_a_blank_line_does_not_continue_the_field_before(tmp_path):
    path = tmp_path / "packages.txt"
    path.write_text("Package: lid\nDescription: cover\n A cover.\n\n A line without a field.\n\nPackage: box\n")
    examples = read_descriptions(path)
    assert [example["package"] for example in examples] == ["lid"]
    assert [rejected.line for rejected in examples.rejected] == [5, 7]


def test_packages_of_different_projects_have_different_names():
    names = ("libreoffice-calc", "libreoffice-writer", "gcc-doc", "r-cran-abc", "r-cran-ggplot2", "python3", "perl-doc")
    assert len({project_name(name) for name in names}) == len(names)
