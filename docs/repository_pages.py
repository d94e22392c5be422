"""Pages of the site for files of the repository that are not in docs/, and links to these files.

Links in the pages of docs/ are relative paths, which work on GitHub. Sphinx only knows the files of docs/. So
``write_pages`` makes a page for each file or directory outside docs/ to which a page links, and ``RepositoryLinks``
changes the links.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

DOCS = Path(__file__).parent
ROOT = DOCS.parent
GENERATED = "_generated"
"""Directory in docs/ of all generated pages."""
NAVIGATION = ("CONTRIBUTING.md", "CHANGELOG.md")
"""Files that have a page in the navigation, even if no page links to them."""
LANGUAGES = {".py": "python", ".toml": "toml", ".json": "json", ".sh": "bash", ".cff": "yaml"}
LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")


def docname(path: Path) -> str:
    """The name of the Sphinx document for a file or directory of the repository that is not in docs/."""
    name = path.relative_to(ROOT).as_posix()
    return f"{GENERATED}/{name.removesuffix('.md').lower()}" if name in NAVIGATION else f"{GENERATED}/files/{name}.page"


def page_of(target: Path) -> str | None:
    """The name of the Sphinx document for the target of a link.

    None if the target does not exist, is not in the repository, or is in docs/ but has no page (pictures).
    """
    if not target.exists() or not target.is_relative_to(ROOT):
        return None
    if not target.is_relative_to(DOCS):
        return docname(target)
    if target.is_dir():
        target /= "index.md"
    if target.suffix not in (".md", ".ipynb") or not target.is_file():
        return None
    return target.relative_to(DOCS).with_suffix("").as_posix()


def sources() -> dict[str, Path]:
    """The files and directories from which documents are made, by the name of the document."""
    paths = [path for path in (*DOCS.rglob("*.md"), *DOCS.rglob("*.ipynb")) if GENERATED not in path.parts]
    documents = {path.relative_to(DOCS).with_suffix("").as_posix(): path for path in paths}
    todo = [*paths, *(ROOT / name for name in NAVIGATION)]
    for path in todo:  # the loop also reaches the files that it appends
        if not path.is_relative_to(DOCS):
            documents[docname(path)] = path
        if path.suffix not in (".md", ".ipynb"):
            continue
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".ipynb":
            text = "\n".join(
                "".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown"
            )
        for link in LINK.findall(text):
            target = Path(os.path.normpath(path.parent / link))
            is_outside = not target.is_relative_to(DOCS) and target.is_relative_to(ROOT)
            if is_outside and target.exists() and target not in todo:
                todo.append(target)
    return documents


def content(path: Path) -> str:
    """The Markdown of the page of a file or directory."""
    name = path.relative_to(ROOT).as_posix()
    if path.is_dir():
        files = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
        return f"# {name}\n\nThis directory of the repository has these files:\n\n" + "".join(
            f"- `{file}`\n" for file in files if "__pycache__" not in file
        )
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return text
    return f"# {name}\n\n~~~~~~{LANGUAGES.get(path.suffix, 'text')}\n{text.rstrip()}\n~~~~~~\n"


def write_if_changed(path: Path, text: str) -> None:
    """Write a text file unless it has this content, so that Sphinx only reads changed files again."""
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def write_pages(app: Sphinx) -> None:
    """Write the generated pages, and delete those of earlier builds to which no page links any more."""
    app.env.repository_sources = sources()  # type: ignore[attr-defined]
    written = set()
    for document, path in app.env.repository_sources.items():  # type: ignore[attr-defined]
        if document.startswith(f"{GENERATED}/"):
            page = DOCS / f"{document}.md"
            is_orphan = document.startswith(f"{GENERATED}/files/")
            write_if_changed(page, ("---\norphan: true\n---\n\n" if is_orphan else "") + content(path))
            written.add(page)
    for page in DOCS.joinpath(GENERATED, "files").rglob("*.md"):
        if page not in written:
            page.unlink()


class RepositoryLinks(SphinxTransform):
    """Make relative links refer to the documents of their targets, and pictures outside docs/ to their files."""

    default_priority = 5

    def apply(self) -> None:
        source = self.env.repository_sources.get(self.env.docname)  # type: ignore[attr-defined]
        if source is None:
            return
        for node in list(self.document.findall(lambda node: isinstance(node, nodes.Element))):
            if isinstance(node, (addnodes.pending_xref, addnodes.download_reference)) and node["reftype"] == "myst":
                self.change_link(node, source)
            elif isinstance(node, nodes.image) and not source.is_relative_to(DOCS):
                target = Path(os.path.normpath(source.parent / node["uri"]))
                if target.is_relative_to(DOCS):
                    node["uri"] = f"/{target.relative_to(DOCS).as_posix()}"

    def change_link(self, node: nodes.Element, source: Path) -> None:
        """Let a link refer to the document of a file or directory, if MyST found none in docs/."""
        link, _, anchor = node["reftarget"].partition("#")
        if node["refdomain"] == "doc":
            if link in self.env.found_docs:
                return
            # MyST removed the suffix of a Markdown file that is not in docs/.
            link, anchor = f"{link}.md", node["reftargetid"]
        page = page_of(Path(os.path.normpath(source.parent / link))) if link else None
        if page is not None:
            reference = addnodes.pending_xref(
                refdomain="doc", reftarget=page, reftargetid=anchor or None, refdoc=self.env.docname, reftype="myst",
                refexplicit=node["refexplicit"],
            )  # fmt: skip
            reference.source, reference.line = node.source, node.line
            reference += node.children
            node.replace_self(reference)


def setup(app: Sphinx) -> None:
    """Connect the functions of this module."""
    app.connect("builder-inited", write_pages)
    app.add_transform(RepositoryLinks)
