"""The API reference: one page per module, generated from the public names of the modules and their docstrings.

An object is on the page of the shortest module path from which it can be imported: ``generate`` is documented as
``jaxlm.decoding.generate``, and the page of ``jaxlm.decoding.sample`` links there.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from docutils import nodes

import jaxlm
from repository_pages import GENERATED, write_if_changed
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.ext.autodoc.mock import mock
from sphinx.pycode import ModuleAnalyzer
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util import logging
from sphinx.util.nodes import make_refnode

logger = logging.getLogger(__name__)

API = f"{GENERATED}/api"
PRIVATE = {"jaxlm.__main__", "jaxlm.cli", "jaxlm.command_line", "jaxlm.json_files", "jaxlm.stderr_relay"}
"""Modules (with their submodules) of the commands, whose functions are not meant to be called from Python."""
HISTORY = {f"{GENERATED}/changelog", "labbook"}
"""Pages that may name objects that no longer exist."""
NAME = re.compile(r"jaxlm(\.\w+)+")
MODULE_FILE = re.compile(r"(jaxlm/)?\w+(/\w+)*\.py")
SECTION = re.compile(r"(Args|Attributes|Example|Examples|Raises|Returns|Yields|Note|Notes|Warning|References):?$")


def module_names() -> list[str]:
    """All modules of the API reference."""
    names = [found.name for found in pkgutil.walk_packages(jaxlm.__path__, "jaxlm.")]
    return ["jaxlm", *(name for name in sorted(names) if not any(f"{name}.".startswith(f"{p}.") for p in PRIVATE))]


def import_annotations(module: ModuleType) -> None:
    """Run the imports under ``if TYPE_CHECKING:``, so that all annotations can be evaluated."""
    for statement in ast.parse(inspect.getsource(module)).body:
        if isinstance(statement, ast.If) and ast.unparse(statement.test).endswith("TYPE_CHECKING"):
            exec(compile(ast.Module(statement.body, []), str(module.__file__), "exec"), vars(module))


def is_object(value: Any) -> bool:
    """Whether a value is a class or a function, which has a docstring of its own."""
    return inspect.isclass(value) or inspect.isroutine(value)


def own_names(module: ModuleType) -> dict[str, str]:
    """The public names that a module defines or exports, in the order of the source, with their docstrings."""
    analyzer = ModuleAnalyzer.for_module(module.__name__)
    analyzer.analyze()
    # Docstrings of constants and type aliases
    docs = {name: "\n".join(lines) for (scope, name), lines in analyzer.attr_docs.items() if scope == ""}
    exported = getattr(module, "__all__", ())
    for name, value in vars(module).items():
        if is_object(value) and (value.__module__ == module.__name__ or name in exported):
            docs[name] = inspect.getdoc(value) or ""
        elif name in exported:
            docs.setdefault(name, "")
    names = sorted(docs, key=lambda name: (analyzer.tagorder.get(name, 10**6), name))
    return {name: docs[name] for name in names if not name.startswith("_")}


def shortest_paths(modules: dict[str, ModuleType], names: dict[str, dict[str, str]]) -> dict[int, str]:
    """For the id of each class and function, the module with the shortest path from which it can be imported."""
    found: dict[int, str] = {}
    for module in sorted(modules, key=lambda module: (module.count("."), module)):
        for name in names[module]:
            value = getattr(modules[module], name)
            if is_object(value):
                found.setdefault(id(value), module)
    return found


def directive(module: ModuleType, name: str, docs: str) -> list[str]:
    """The directive that documents a public name."""
    value = getattr(module, name)
    if inspect.isclass(value):
        return [f".. autoclass:: {name}", "   :members:", "   :show-inheritance:", ""]
    if inspect.isroutine(value):
        return [f".. autofunction:: {name}", ""]
    return [f".. autodata:: {name}" if docs else f".. py:data:: {name}", ""]


def summary(docs: str) -> str:
    """The first sentence of a docstring."""
    paragraph = " ".join(docs.strip().split("\n\n")[0].split()).removesuffix("::")
    for end in re.finditer(r"[.:] |$", paragraph):
        if paragraph.count("``", 0, end.start()) % 2 == 0:
            return paragraph[: end.start()].rstrip(".:")
    return paragraph


def table(rows: list[tuple[str, str]]) -> list[str]:
    """A table of names and summaries."""
    lines = [".. list-table::", "   :class: summary", "   :widths: auto", ""]
    for name, text in rows:
        lines += [f"   * - {name}", f"     - {text}"]
    return [*lines, ""]


def page(
    modules: dict[str, ModuleType], names: dict[str, str], paths: dict[int, str], module: ModuleType, submodules: list[str]
) -> str:
    """The page of a module."""
    title = module.__name__
    parent, _, last = title.rpartition(".")
    lines = [title, "=" * len(title), "", f".. automodule:: {title}"]
    # A function with the name of its module, such as ``jaxlm.nn.scan.mlstm``, has the entry of this name in the index.
    lines += ["   :no-index:", ""] if is_object(getattr(modules.get(parent), last, None)) else [""]
    elsewhere = {name: path for name in names if (path := paths.get(id(getattr(module, name)), title)) != title}
    here = [name for name in names if name not in elsewhere]
    if submodules:
        lines += [".. toctree::", "   :hidden:", "", *(f"   {name}" for name in submodules), ""]
        rows = [(f":doc:`{name}`", summary(inspect.getdoc(modules[name]) or "")) for name in submodules]
        lines += [".. rubric:: Modules", "", *table(rows)]
    if elsewhere:
        links = ", ".join(f":py:obj:`{path}.{name}`" for name, path in elsewhere.items())
        lines += [f"Documented at the path from which users import it: {links}.", ""]
    if len(here) > 1:
        rows = [(f":py:obj:`~{title}.{name}`", summary(names[name])) for name in here]
        lines += [".. rubric:: Contents", "", *table(rows)]
    for name in here:
        lines += directive(module, name, names[name])
    return "\n".join(lines)


def write_pages(app: Sphinx) -> None:
    """Write the pages of all modules."""
    with mock(app.config.autodoc_mock_imports):
        modules = {name: importlib.import_module(name) for name in module_names()}
        for module in modules.values():
            import_annotations(module)
    names = {name: own_names(module) for name, module in modules.items()}
    paths = shortest_paths(modules, names)
    app.env.api_aliases = {  # type: ignore[attr-defined]
        f"{module}.{name}": f"{path}.{name}"
        for module in modules
        for name in names[module]
        if (path := paths.get(id(getattr(modules[module], name)), module)) != module
    }
    directory = Path(app.srcdir, API)
    for name, module in modules.items():
        submodules = [other for other in modules if other.rpartition(".")[0] == name]
        write_if_changed(directory / f"{name}.rst", page(modules, names[name], paths, module, submodules))
    for path in directory.glob("*.rst"):
        if path.stem not in modules:
            path.unlink()


def ancestors(node: nodes.Node) -> Iterator[nodes.Node]:
    """The nodes that contain a node."""
    while node.parent is not None:
        node = node.parent
        yield node


class NameLinks(SphinxPostTransform):
    """Let names and files of jaxlm in the text, such as ``jaxlm.nn.attention``, refer to the API reference."""

    default_priority = 5

    def run(self, **kwargs: Any) -> None:
        objects = self.env.domains.python_domain.objects
        for node in list(self.document.findall(nodes.literal)):
            name = node.astext()
            if any(isinstance(parent, (nodes.reference, addnodes.pending_xref, nodes.title)) for parent in ancestors(node)):
                continue
            if is_file := bool(MODULE_FILE.fullmatch(name)):
                name = name.removeprefix("jaxlm/").removesuffix(".py").removesuffix("/__init__").replace("/", ".")
                name = f"jaxlm.{name}"
            elif not NAME.fullmatch(name):
                continue
            entry = objects.get(name) or objects.get(self.env.api_aliases.get(name, ""))  # type: ignore[attr-defined]
            if entry is not None:
                node.replace_self(
                    make_refnode(self.app.builder, self.env.docname, entry.docname, entry.node_id, node.deepcopy())
                )
            elif not is_file and self.env.docname not in HISTORY and not any(f"{name}.".startswith(f"{private}.") for private in PRIVATE):
                logger.warning("%r is not in the API reference", name, location=node, type="jaxlm", subtype="name")


def mark_literal_blocks(app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """Mark indented blocks of a docstring (equations, layouts of arrays) as literal blocks."""
    marked: list[str] = []
    previous = ""  # the last line that is not empty
    in_block = False
    for line in lines:
        indentation = len(line) - len(line.lstrip())
        if line.strip():
            previous_indentation = len(previous) - len(previous.lstrip())
            is_start = (
                not in_block
                and marked
                and not marked[-1].strip()
                and indentation >= previous_indentation + 4
                and not SECTION.match(previous.strip())
                and not previous.strip().startswith((">>>", "..", "- ", "* "))
                and not line.strip().startswith(">>>")
            )
            if is_start:
                marked += [" " * previous_indentation + "::", ""]
                in_block, block_indentation = True, indentation
            elif in_block and indentation < block_indentation:
                in_block = False
            previous = line
        marked.append(line)
    lines[:] = marked


def skip_member(app: Sphinx, what: str, name: str, value: Any, skip: bool, options: Any) -> bool | None:
    """Skip the fields of a named tuple that have no docstring."""
    return True if str(getattr(value, "__doc__", "")).startswith("Alias for field number") else None


def setup(app: Sphinx) -> None:
    """Connect the functions of this module."""
    app.connect("builder-inited", write_pages)
    app.connect("autodoc-process-docstring", mark_literal_blocks, priority=400)  # before napoleon
    app.connect("autodoc-skip-member", skip_member)
    app.add_post_transform(NameLinks)
