"""Docstrings of installed packages as examples for summarization."""

import subprocess
import sys

import pytest

from jaxlm.data.docstrings import docstrings, split_docstring

SOURCE = '''
"""Reads and writes boxes.

A box is a file with a header of eight bytes and any number of records, each with its own length.
"""

raise RuntimeError("this file must not be imported")


class Box:
    """An open box with its records.

    The records are read when they are asked for, never before, so that large boxes need little memory.

    Args:
        path: the file.
    """

    def close(self):
        """Close the file.

        Short.
        """

    async def read(self):
        """Return the next record of
        the open box.

        After the last record there is nothing to return, and the caller gets an empty value instead of an error.

        >>> box.read()
        """
'''


def test_docstrings_with_surrogates_are_removed(tmp_path):
    (tmp_path / "good.py").write_text(SOURCE)
    (tmp_path / "odd.py").write_text(SOURCE.replace("box", "\\ud800"))
    packages = docstrings([tmp_path], min_words=1).column("package")
    assert "good" in packages
    assert not any("\ud800" in row["text"] + row["summary"] for row in docstrings([tmp_path], min_words=1).rows)


@pytest.fixture
def site(tmp_path):
    for name in ("box", "other", "box/tests"):
        (tmp_path / name).mkdir()
    (tmp_path / "box" / "files.py").write_text(SOURCE)
    (tmp_path / "box" / "tests" / "test_files.py").write_text(SOURCE.replace("box", "crate"))
    (tmp_path / "other" / "copied.py").write_text(SOURCE)
    (tmp_path / "other" / "old.py").write_text("print 'python 2'\n")
    (tmp_path / "single.py").write_text(SOURCE.replace("box", "trunk").replace("records", "items"))
    return tmp_path


def test_examples_have_text_summary_package_and_name(site):
    examples = docstrings([site])
    assert [(row["package"], row["name"], row["summary"]) for row in examples] == [
        ("box", "module", "Reads and writes boxes."),
        ("box", "Box", "An open box with its records."),
        ("box", "Box.read", "Return the next record of the open box."),
        ("single", "module", "Reads and writes trunkes."),
        ("single", "Box", "An open trunk with its items."),
    ]  # the other texts are duplicates
    assert examples[1]["text"] == (
        "The records are read when they are asked for, never before, so that large boxes need little memory."
    )


def test_files_that_are_not_python_are_reported(site):
    (site / "dangling.py").symlink_to(site / "nowhere.py")
    dangling, old = docstrings([site]).rejected
    assert (dangling.line, old.line) == (2, 4)
    assert "dangling.py" in dangling.reason
    assert "old.py" in old.reason
    with pytest.raises(TypeError, match="directories must be a sequence of directories: pass"):
        docstrings(str(site))


def test_definitions_in_handlers_and_cases_are_found(tmp_path):
    text = "A text with twelve words or more, because shorter texts are not used as examples here."
    function = f'    def f():\n        """Return the sum.\n\n        {text}\n        """\n'
    (tmp_path / "a.py").write_text("try:\n    import b\nexcept ImportError:\n" + function)
    assert [(row["name"], row["text"]) for row in docstrings([tmp_path])] == [("f", text)]


def test_limits_of_numbers_and_lengths(site):
    assert len(docstrings([site], max_per_package=1)) == 2
    assert {row["name"] for row in docstrings([site], max_words=19)} == {"Box"}
    assert {row["name"] for row in docstrings([site], max_summary_words=4)} == {"module"}
    assert {row["package"] for row in docstrings([site], max_files=1)} == {"box", "single"}
    with pytest.raises(ValueError, match="no docstring with a summary and a text was found"):
        docstrings([site], min_words=1000, max_words=2000)
    with pytest.raises(ValueError, match="max_files=0 must be at least 1"):
        docstrings([site], max_files=0)
    with pytest.raises(FileNotFoundError, match="nowhere is not a directory"):
        docstrings([site / "nowhere"])


def test_the_order_does_not_depend_on_the_process(site):
    code = f"from jaxlm.data.docstrings import docstrings; print(list(docstrings([{str(site)!r}])))"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout.strip() == str(list(docstrings([site])))


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("One line.", None),
        ("First line.\n\nArgs:\n    x: a number", None),
        ("First line.\n\nText.\n\nParameters\n----------\nx : int", ("Text.", "First line.")),
        ("First line.\n\nText\nhere.\n\nMore.\n\n:param x: a number", ("Text here.\nMore.", "First line.")),
        (":param x: a number\n\nText.", None),
        ("-----\n\nText.", None),
        ("Returns\n-------\ndict\n\nText.", None),
        ("First line.\n\nAttributes:\n    x: a number", None),
        ("First line.\n\nText.\n\nKeyword arguments:\n    x: a number", ("Text.", "First line.")),
        ("First line.\n \nText.", ("Text.", "First line.")),
    ],
)
def test_split_docstring_returns_text_and_summary(docstring, expected):
    assert split_docstring(docstring) == expected
