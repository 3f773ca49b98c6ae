"""How the site is made of these pages: ``sphinx-build -W docs build/site``.

The pages are written for two readers, a browser of the repository and Sphinx, so they link to each
other's files, and what only Sphinx can do is done here.
"""

from __future__ import annotations

import re
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform

DOCS = Path(__file__).parent
ROOT = DOCS.parent

project = "beanie_session_scope"
release = version = version_of(project)
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = project
html_static_path = ["_static"]
html_css_files = ["site.css"]

# The anchors of the repository's browser, so that one link serves both.
myst_heading_anchors = 4

default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say what the arguments are
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

COPIES = {
    "readme": "README.md",
    "reference/changelog": "CHANGELOG.md",
    "contributing": "CONTRIBUTING.md",
    "security": "SECURITY.md",
}
"""Pages whose text is that of a file of the repository."""

LINK_OUT = re.compile(r"\]\((?P<up>(?:\.\./)*)\.\./(?P<file>[A-Z]+)\.md")
LINK_TO_DIRECTORY = re.compile(r"\[(?P<text>[^\]]*)\]\((?P<path>\.\./[^)#\s]*)\)")
LINK_IN = re.compile(r"\]\((?!https?:|mailto:|#|\.\./)(?P<path>[^)\s]+)\)")


def read_source(app: Sphinx, docname: str, source: list[str]) -> None:
    """Put the files of the repository in, and let links to them lead to their pages."""
    here = (DOCS / docname).parent
    copied = COPIES.get(docname)
    if copied is None:
        text = LINK_OUT.sub(lambda link: f"]({link['up']}{_page(link['file'])}", source[0])
    else:
        up = "../" * docname.count("/")
        text = (ROOT / copied).read_text(encoding="utf-8")
        text = LINK_IN.sub(lambda link: f"]({_from_root(link['path'], up)})", text)
    source[0] = LINK_TO_DIRECTORY.sub(lambda link: _unless_directory(link, here), text)


def _unless_directory(link: re.Match[str], here: Path) -> str:
    """Leave the text of a link to a directory: only the repository's browser shows one."""
    return link["text"] if (here / link["path"]).is_dir() else link[0]


def _page(file: str) -> str:
    return next(page for page, copied in COPIES.items() if copied == f"{file}.md") + ".md"


def _from_root(path: str, up: str) -> str:
    """Say a path that was written for the root of the repository, for a page of the site."""
    if path in {"docs", "docs/"}:
        return f"{up}index.md"
    if path.startswith("docs/"):
        return up + path.removeprefix("docs/")
    file, hash_, anchor = path.partition("#")
    if file in COPIES.values():
        return up + _page(file.removesuffix(".md")) + hash_ + anchor
    return f"{up}../{path}"


class Diagrams(SphinxPostTransform):
    """Put the diagrams into the page itself, where they take the colours of its theme."""

    default_priority = 5  # before the builder looks for images to copy
    formats = ("html",)

    def run(self, **kwargs: Any) -> None:
        """Replace each image that is a diagram."""
        for image in list(self.document.findall(nodes.image)):
            file = DOCS / image["uri"]
            if not file.is_file() or file.suffix != ".svg":
                continue
            text = file.read_text(encoding="utf-8")
            if 'class="diagram"' in text:
                image.replace_self(nodes.raw("", text, format="html"))


def setup(app: Sphinx) -> None:
    """Let Sphinx know of the above."""
    app.connect("source-read", read_source)
    app.add_post_transform(Diagrams)
