"""Sphinx builds the pages: ``sphinx-build -W docs build/docs``."""

import importlib.metadata
import os
import pathlib
import re
import sys
from typing import Any


DOCS = pathlib.Path(__file__).parent.resolve()
ROOT = DOCS.parent
sys.path.insert(0, str(ROOT))  # document this checkout, whatever is installed

project = "ant_jax"
author = "the ant_jax authors"
release = version = importlib.metadata.version("ant_jax")
# No intersphinx: it downloads inventories, and -W would make an error of every hiccup of the network.
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton", "sphinx_design"]
exclude_patterns = ["_build"]

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # docstrings tell types with their shapes and units
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

html_theme = "sphinx_book_theme"
html_title = f"ant_jax {release}"
html_static_path = ["_static"]
html_css_files = ["side_by_side.css"]
html_theme_options = {"show_toc_level": 2, "navigation_with_keys": False, "use_download_button": False}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

# Files of the repository that pages here include, and the pages.
INCLUDED = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "benchmarks.md",
    "benchmarks/results/README.md": "benchmark_notes.md",
    "benchmarks/results/compare-cpu.md": "benchmark_tables.md",
}


def relink(app: Any, path: pathlib.Path, page: str, content: list[str]) -> None:
    """Let the links of an included file, which are relative to that file, lead to the same places from here."""
    folder = (DOCS / path).parent

    def moved(match: re.Match[str]) -> str:
        target = (folder / match[1]).resolve()
        return "](" + INCLUDED.get(str(target.relative_to(ROOT)), os.path.relpath(target, DOCS))

    content[0] = re.sub(r"\]\((?!https?:|#)([^)#]+)", moved, content[0])


def setup(app: Any) -> None:
    """Register the hook; Sphinx calls this."""
    app.connect("include-read", relink)
