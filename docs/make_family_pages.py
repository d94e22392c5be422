"""Write the generated parts of the pages in docs/families, from the code.

    python docs/make_family_pages.py

A generated part is between the lines ``<!-- NAME -->`` and ``<!-- end -->``. The parts of a page are

    config      the fields of the family's ``Config``, with the docstrings that ``--help`` shows
    variants    the names for ``get_model``, with the number of parameters (computed from the specs)
    files       the classes of transformers that jaxlm reads and writes
    fidelity    the row of the family in the table of differences in docs/families/index.md

``index.md`` has the part ``shared``: the fields of the base classes of all configs.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxlm.interop import formats
from jaxlm.models import FAMILIES, common, get_model
from jaxlm.models.registry import family

PAGES = Path(__file__).parent / "families"
COMMAND = "python docs/make_family_pages.py"
PART = re.compile(r"<!-- (\w+) -->\n.*?<!-- end -->", re.DOTALL)
MAX_DEFAULT = 60
"""A tuple with more characters than this is shortened in a table. Other default values are never shortened."""


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [head, ("---",) * len(head), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def docstrings(owner: type) -> dict[str, str]:
    """The docstring of each field that a class defines, on one line."""
    (tree,) = ast.parse(inspect.getsource(owner)).body
    assert isinstance(tree, ast.ClassDef)
    texts: dict[str, str] = {}
    for field, text in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
            texts[field.target.id] = " ".join(ast.literal_eval(text.value).split())
    return texts


def fields(config: type) -> Iterator[tuple[type, str, Any, str]]:
    """For each field of a config: the most derived class that defines the field, its name, default and docstring."""
    owners = [(owner, docstrings(owner)) for owner in config.__mro__ if dataclasses.is_dataclass(owner)]
    for field in dataclasses.fields(config):
        owner, texts = next((owner, texts) for owner, texts in owners if field.name in texts)
        yield owner, field.name, field.default, texts[field.name]


def default_text(value: Any) -> str:
    """A default value as code; a long tuple without its inner entries."""
    text = repr(value)
    if len(text) > MAX_DEFAULT and isinstance(value, tuple):
        return f"`({value[0]!r}, ..., {value[-1]!r})`, {len(value)} entries"
    return f"`{text}`"


def field_rows(config: type, *, shared: bool) -> list[tuple[str, ...]]:
    """Rows with fields of a config.

    Args:
        shared: True: the fields that the classes in ``jaxlm.models.common`` define. False: all other fields.
    """
    return [
        (f"`{name}`", default_text(default), text.replace("``", "`"))
        for owner, name, default, text in fields(config)
        if (owner.__module__ == common.__name__) == shared
    ]


def config_part(name: str) -> str:
    config, head = family(name).Config, ("field", "default", "meaning")
    shared = ", ".join(f"`{field}`" for owner, field, *_ in fields(config) if owner.__module__ == common.__name__)
    link = f"The fields {shared} are [those of all families](index.md#fields-of-every-config).\n"
    return table(head, field_rows(config, shared=False)) + "\n" + link


def variants_part(name: str) -> str:
    variants = [(variant, get_model(variant).num_parameters) for variant in family(name).VARIANTS]
    return table(("name", "parameters"), [(f"`{variant}`", f"{count:,}") for variant, count in variants])


def files_part(name: str) -> str:
    classes: dict[str, list[str]] = {}
    for item in formats.of(name):
        classes.setdefault(item.model_type, []).extend(item.architectures)
    if not classes:
        return "The family has no published format. Its files have jaxlm's own names of tensors and config fields.\n"
    rows = [(f"`{kind}`", ", ".join(f"`{architecture}`" for architecture in found)) for kind, found in classes.items()]
    note = (
        "\nIf no class can represent a model, for example because no class has a config field for one of its settings, "
        "the files\nhave jaxlm's own names of tensors and config fields.\n"
    )
    return table(("`model_type`", "classes"), rows) + note


def fidelity_part(name: str) -> str:
    index = (PAGES / "index.md").read_text(encoding="utf-8")
    section = index.split("\n## Differences in float32\n")[1].split("\n## ")[0]
    (head,) = re.findall(r"^\| family (\|.*)$", section, re.MULTILINE)
    (row,) = re.findall(rf"^\| \[?`{name}`[^|]* (\|.*)$", section, re.MULTILINE)
    return f"{head}\n{re.sub(r'[^|]+', ' --- ', head).rstrip()}\n{row}\n"


def shared_part(name: str) -> str:
    return table(("field", "default", "meaning"), field_rows(common.TransformerConfig, shared=True))


WRITERS = {
    "config": config_part,
    "variants": variants_part,
    "files": files_part,
    "fidelity": fidelity_part,
    "shared": shared_part,
}


def updated(name: str, page: str) -> str:
    """The text of a page with its generated parts written again."""

    def write(part: re.Match[str]) -> str:
        return f"<!-- {part[1]} -->\n\n{WRITERS[part[1]](name)}\n<!-- end -->"

    return PART.sub(write, page)


def main() -> None:
    """Rewrite the pages, and print the names of those that change."""
    for name in (*FAMILIES, "index"):
        path = PAGES / f"{name}.md"
        page = path.read_text(encoding="utf-8")
        new = updated(name, page)
        if new != page:
            path.write_text(new, encoding="utf-8")
            print(path)


if __name__ == "__main__":
    main()
