"""The API reference: one page per module, generated from the public names of the modules and their docstrings.

An object is on the page of the shortest module path from which it can be imported. For example, ``generate`` is
documented as ``jaxlm.decoding.generate``, and the page of ``jaxlm.decoding.sample`` links there.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from docutils import nodes
from repository_pages import GENERATED, write_if_changed
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.domains.python import ObjectEntry
from sphinx.ext.autodoc.mock import mock
from sphinx.pycode import ModuleAnalyzer
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util import logging
from sphinx.util.nodes import make_refnode

import jaxlm

logger = logging.getLogger(__name__)

API = f"{GENERATED}/api"
PRIVATE = {
    "jaxlm.__main__", "jaxlm.cli", "jaxlm.command_line", "jaxlm.extras", "jaxlm.json_files", "jaxlm.stderr_relay"
}  # fmt: skip
"""Modules without pages: the commands and helpers that are not for users. Their submodules have no pages either."""
HISTORY = {f"{GENERATED}/changelog", "labbook"}
"""Pages that may name objects that no longer exist."""
DOTTED_NAME = re.compile(r"(?!.*NAME)jaxlm(\.\w+)+")
"""A dotted name of jaxlm. A text with the placeholder ``NAME`` does not match."""
MODULE_FILE = re.compile(r"(jaxlm/)?\w+(/\w+)*\.py")
PathOfObject = dict[tuple[str, int], str]
"""The module path of each public object, by its :func:`key`."""
SECTION = re.compile(r"(Args|Attributes|Example|Examples|Raises|Returns|Yields|Note|Notes|Warning|References):?$")


def is_private(name: str) -> bool:
    """Whether a name is one of the ``PRIVATE`` modules, or in one of them."""
    return any(f"{name}.".startswith(f"{module}.") for module in PRIVATE)


def module_names() -> list[str]:
    """All modules of the API reference."""
    names = [found.name for found in pkgutil.walk_packages(jaxlm.__path__, "jaxlm.")]
    return ["jaxlm", *(name for name in sorted(names) if not is_private(name))]


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


def key(name: str, value: Any) -> tuple[str, int]:
    """The key of a public object in ``PathOfObject``: ("", id) for a class or function, (name, id) for other values."""
    return ("" if is_object(value) else name, id(value))


def shortest_paths(modules: dict[str, ModuleType], names: dict[str, dict[str, str]]) -> PathOfObject:
    """For each public object, the shortest path of a module from which the object can be imported."""
    found: PathOfObject = {}
    for module in sorted(modules, key=lambda module: (module.count("."), module)):
        for name in names[module]:
            found.setdefault(key(name, getattr(modules[module], name)), module)
    return found


def directive(module: ModuleType, name: str, docs: str) -> list[str]:
    """The directive that documents a public name."""
    value = getattr(module, name)
    if inspect.isclass(value):
        return [f".. autoclass:: {name}", "   :members:", "   :show-inheritance:", ""]
    if inspect.isroutine(value):
        return [f".. autofunction:: {name}", ""]
    if ("", name) in ModuleAnalyzer.for_module(module.__name__).attr_docs:
        return [f".. autodata:: {name}", ""]
    shown = f"   :value: {str(value).replace('typing.', '')}"
    return [f".. py:data:: {name}", shown, "", *(f"   {line}" for line in docs.splitlines()), ""]


def summary(docs: str) -> str:
    """The first sentence of a docstring, without its period."""
    paragraph = " ".join(docs.strip().split("\n\n")[0].split()).removesuffix("::")
    for end in re.finditer(r"(?<!al)(?<!eq)(?<!sec)\. (?=[A-Z`])", paragraph):
        if paragraph.count("``", 0, end.start()) % 2 == 0:
            return paragraph[: end.start()]
    return paragraph.rstrip(".")


def table(rows: list[tuple[str, str]]) -> list[str]:
    """A table of names and summaries."""
    lines = [".. list-table::", "   :class: summary", "   :widths: auto", ""]
    for name, text in rows:
        lines += [f"   * - {name}", f"     - {text}"]
    return [*lines, ""]


def page(title: str, modules: dict[str, ModuleType], names: dict[str, str], paths: PathOfObject) -> str:
    """The page of the module with the name ``title``."""
    module = modules[title]
    submodules = [name for name in modules if name.rpartition(".")[0] == title]
    parent, _, last = title.rpartition(".")
    lines = [title, "=" * len(title), "", f".. automodule:: {title}"]
    # If a function and its module have the same path (``jaxlm.nn.scan.mlstm``), only the function is in the index.
    lines += ["   :no-index:", ""] if is_object(getattr(modules.get(parent), last, None)) else [""]
    elsewhere = {name: path for name in names if (path := paths[key(name, getattr(module, name))]) != title}
    here = [name for name in names if name not in elsewhere]
    if submodules:
        lines += [".. toctree::", "   :hidden:", ""]
        lines += [*(f"   {name.rpartition('.')[2]} <{name}>" for name in submodules), ""]
        rows = [(f":doc:`{name}`", summary(inspect.getdoc(modules[name]) or "")) for name in submodules]
        lines += [".. rubric:: Modules", "", *table(rows)]
    if elsewhere:
        links = ", ".join(f":py:obj:`{path}.{name}`" for name, path in elsewhere.items())
        lines += [f"Documented at the paths from which users import them: {links}.", ""]
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
        for imported in modules.values():
            import_annotations(imported)
    names = {name: own_names(module) for name, module in modules.items()}
    paths = shortest_paths(modules, names)
    # The docstring of a constant that a package exports is in the module that defines the constant.
    docs = {key(name, getattr(modules[m], name)): text for m in modules for name, text in names[m].items() if text}
    for module in modules:
        names[module] = {
            name: text or docs.get(key(name, getattr(modules[module], name)), "")
            for name, text in names[module].items()
        }
    aliases = {
        f"{module}.{name}": f"{path}.{name}"
        for module in modules
        for name in names[module]
        if (path := paths[key(name, getattr(modules[module], name))]) != module
    }
    counts = Counter(name for module in modules for name in names[module] if f"{module}.{name}" not in aliases)
    ambiguous = {name for name, count in counts.items() if count > 1}
    vars(app.env).update(api_paths=paths, api_aliases=aliases, api_ambiguous=ambiguous)
    directory = Path(app.srcdir, API)
    for name in modules:
        write_if_changed(directory / f"{name}.rst", page(name, modules, names[name], paths))
    for path in directory.glob("*.rst"):
        if path.stem not in modules:
            path.unlink()


def ancestors(node: nodes.Node) -> Iterator[nodes.Node]:
    """The nodes that contain a node."""
    while node.parent is not None:
        node = node.parent
        yield node


class NamesInModules(SphinxPostTransform):
    """Replace a name in an annotation or a docstring by the path of the object with this name in the module."""

    default_priority = 5

    def run(self, **kwargs: Any) -> None:
        for node in list(self.document.findall(addnodes.pending_xref)):
            name, module = node["reftarget"], sys.modules.get(node.get("py:module") or "")
            if node.get("refdomain") == "py" and hasattr(module, name):
                path = self.env.api_paths.get(key(name, getattr(module, name)))  # type: ignore[attr-defined]
                if path is not None:
                    node["reftarget"] = f"{path}.{name}"
                else:  # not in the API reference: Sphinx would link to any object with this name
                    node.replace_self(node.children)
            elif node.get("refdomain") == "py" and name in self.env.api_ambiguous:  # type: ignore[attr-defined]
                node.replace_self(node.children)


class NameLinks(SphinxPostTransform):
    """Let names and files of jaxlm in the text, such as ``jaxlm.nn.attention``, refer to the API reference."""

    default_priority = 5

    def run(self, **kwargs: Any) -> None:
        for node in list(self.document.findall(nodes.literal)):
            if any(isinstance(parent, (nodes.reference, addnodes.pending_xref)) for parent in ancestors(node)):
                continue
            text = node.astext()
            if MODULE_FILE.fullmatch(text):
                module = text.removeprefix("jaxlm/").removesuffix(".py").removesuffix("/__init__").replace("/", ".")
                entry, must_exist = self.entry(f"jaxlm.{module}"), False
            elif DOTTED_NAME.fullmatch(text):
                entry, must_exist = self.entry(text), self.env.docname not in HISTORY
            else:
                continue
            if entry is not None:
                target = (entry.docname, entry.node_id, node.deepcopy())
                node.replace_self(make_refnode(self.app.builder, self.env.docname, *target))
            elif must_exist and not is_private(text):
                logger.warning("%r is not in the API reference", text, location=node, type="jaxlm", subtype="name")

    def entry(self, name: str) -> ObjectEntry | None:
        """The entry of a module, class, function, method or attribute in the API reference; None if there is none."""
        owner, _, attribute = name.rpartition(".")
        aliases = self.env.api_aliases  # type: ignore[attr-defined]
        candidates = (name, aliases.get(name), f"{aliases.get(owner)}.{attribute}")
        objects = self.env.domains.python_domain.objects
        return next((objects[candidate] for candidate in candidates if candidate in objects), None)


def mark_literal_blocks(app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """Mark indented blocks of a docstring (equations, layouts of arrays) as literal, except in sections (``Args:``)."""
    marked: list[str] = []
    if what in ("attribute", "data", "property"):
        marked += ["..", ""]  # an empty comment: napoleon reads text before a colon in the first line as a type
    in_section = in_block = False
    for line in lines:
        if line.strip() and not line.startswith(" "):
            in_section, in_block = bool(SECTION.match(line)), False
        is_block = line.startswith("    ") and not line.strip().startswith((">>>", "- ", "* "))
        if is_block and not in_section and not in_block and (not marked or not marked[-1].strip()):
            marked += [".. code-block:: text", ""]
            in_block = True
        marked.append(line)
    lines[:] = marked


def skip_member(app: Sphinx, what: str, name: str, value: Any, skip: bool, options: Any) -> bool | None:
    """Skip fields of named tuples without a docstring, and the method ``replace`` that Flax adds to its dataclasses."""
    is_field = str(getattr(value, "__doc__", "")).startswith("Alias for field number")
    return True if is_field or name == "replace" else None


def setup(app: Sphinx) -> None:
    """Connect the functions of this module."""
    app.connect("builder-inited", write_pages)
    app.connect("autodoc-process-docstring", mark_literal_blocks, priority=400)  # before napoleon
    app.connect("autodoc-skip-member", skip_member)
    app.add_post_transform(NamesInModules)
    app.add_post_transform(NameLinks)
