"""Configuration of the documentation site. Build: ``python -m sphinx -W --keep-going -b html docs build/site``."""

import importlib.util
import shutil
import sys
from pathlib import Path

from sphinx.application import Sphinx

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS), str(DOCS.parent)]

import api_pages  # noqa: E402
import repository_pages  # noqa: E402

import jaxlm  # noqa: E402

project = "jaxlm"
author = "The jaxlm authors"
copyright = author
release = version = jaxlm.__version__

extensions = [
    "myst_nb",  # Markdown and notebooks
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
]
source_suffix = {".rst": "restructuredtext", ".md": "myst-nb", ".ipynb": "myst-nb"}
exclude_patterns = ["_build"]

# Markdown
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 4  # headings down to level 4 have the same anchors as on GitHub
myst_dmath_double_inline = True
nb_execution_mode = "off"  # tests run the notebooks
copybutton_prompt_text = "$ "
copybutton_only_copy_prompt_lines = True

# API reference
autodoc_member_order = "bysource"
autodoc_mock_imports = [name for name in ("chess", "lm_eval", "pytest") if importlib.util.find_spec(name) is None]
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
default_role = "code"
maximum_signature_line_length = 100
napoleon_numpy_docstring = False
napoleon_use_ivar = True
python_display_short_literal_types = True
toc_object_entries_show_parents = "hide"

# HTML
html_theme = "sphinx_book_theme"
html_title = "jaxlm"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False
html_theme_options = {
    "use_download_button": False,
    "navbar_persistent": [],  # the search button is in the sidebar
    "footer_content_items": [],
    "home_page_in_toc": True,
    "show_navbar_depth": 1,
    "show_toc_level": 2,
}
nb_ipywidgets_js: dict[str, dict[str, str]] = {}  # no notebook has widgets; the default is loaded from a CDN
mathjax_path = "mathjax.js"


def copy_mathjax(app: Sphinx, _: object) -> None:
    """Copy MathJax to the site, so that equations need no network."""
    if app.builder.format == "html":
        package = importlib.util.find_spec("mathjax")  # django-static-mathjax; Django is not needed
        if package is None or package.origin is None:
            raise ModuleNotFoundError("MathJax is not installed: pip install -e '.[docs]'")
        source = Path(package.origin).parent / "static/mathjax/es5/tex-svg-full.js"
        shutil.copyfile(source, Path(app.outdir, "_static", mathjax_path))


def setup(app: Sphinx) -> None:
    """Connect the functions that generate pages and copy MathJax."""
    app.connect("build-finished", copy_mathjax)
    api_pages.setup(app)
    repository_pages.setup(app)
