"""The site, built: its links lead somewhere, and so does the link that each error ends with.

Not collected with the tests, because it needs what the `docs` extra installs; `tox run -e docs`
names it. ``SITE`` names a directory to build into, for those who want to look at it afterwards.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import beanie_session_scope
from beanie_session_scope import SessionScopeError, with_session
from beanie_session_scope.errors import DOCUMENTATION

DOCS = Path(__file__).parents[1] / "docs"
MODULES = ["", ".asgi", ".migration", ".telemetry", ".testing"]
PUBLIC = [
    f"{module.__name__}.{name}"
    for module in (import_module(f"beanie_session_scope{each}") for each in MODULES)
    for name in module.__all__
]


def errors() -> list[type[SessionScopeError]]:
    """Return the errors that are public names."""
    found = []
    for name in PUBLIC:
        module, _, attribute = name.rpartition(".")
        each = getattr(import_module(module), attribute)
        if isinstance(each, type) and issubclass(each, SessionScopeError):
            found.append(each)
    return found


class Page(HTMLParser):
    """The anchors and the links of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors = {""}
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" and value:
                self.anchors.add(value)
            elif name in {"href", "src"} and value and tag != "use":
                self.links.append(value)


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built without a warning."""
    target = Path(os.environ.get("SITE") or tmp_path_factory.mktemp("site"))
    command = [sys.executable, "-m", "sphinx", "-E", "-W", "--keep-going", "-q"]
    done = subprocess.run(
        [*command, DOCS, target], capture_output=True, encoding="utf-8", timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    return target


@pytest.fixture(scope="session")
def pages(site: Path) -> dict[Path, Page]:
    """Every page of the site."""
    return {path: Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}


class TestSite:
    def test_every_page_of_the_documentation_is_in_it(self, pages: dict[Path, Page]) -> None:
        built = {path.stem for path in pages}

        assert {page.stem for page in DOCS.glob("**/*.md")} <= built

    def test_every_link_inside_it_leads_to_a_file_and_an_anchor(
        self, pages: dict[Path, Page]
    ) -> None:
        broken = [
            f"{page.name}: {link}"
            for page, content in pages.items()
            for link in content.links
            if not urlsplit(link).scheme and not leads_somewhere(page, link, pages)
        ]

        assert broken == []

    def test_every_public_name_is_in_the_reference(self, pages: dict[Path, Page]) -> None:
        anchors = set().union(*(page.anchors for page in pages.values()))

        assert [name for name in PUBLIC if name not in anchors] == []


def leads_somewhere(page: Path, link: str, pages: dict[Path, Page]) -> bool:
    target = urlsplit(link)
    path = (page.parent / unquote(target.path)).resolve() if target.path else page
    if path not in pages:
        return path.is_file()
    return unquote(target.fragment) in pages[path].anchors


@pytest.mark.parametrize("error", errors())
class TestErrors:
    def test_its_message_ends_with_a_link_to_its_explanation(
        self, error: type[SessionScopeError], site: Path, pages: dict[Path, Page]
    ) -> None:
        message, link = str(error.__new__(error, "What happened.")).split("\n")

        assert message == "What happened."
        page, _, anchor = link.removeprefix(f"{DOCUMENTATION}/").partition("#")
        assert anchor == error.__name__.lower()
        assert anchor in pages[site / page].anchors

    def test_it_is_explained(self, error: type[SessionScopeError]) -> None:
        text = (DOCS / "reference" / "errors.md").read_text(encoding="utf-8")
        section = re.split(r"^## ", text, flags=re.M)
        (found,) = (part for part in section if part.startswith(f"{error.__name__}\n"))

        assert "**What it means.**" in found
        assert "**What to do.**" in found


class TestMessages:
    def test_an_error_that_is_raised_ends_with_its_link(self) -> None:
        with pytest.raises(SessionScopeError) as raised:
            with_session(collections=[int])  # type: ignore[list-item]

        assert str(raised.value).endswith("/reference/errors.html#modelnotscopederror")

    def test_an_error_derived_from_one_has_the_link_of_that(self) -> None:
        class NoSuchBike(beanie_session_scope.ModelNotScopedError):
            pass

        assert str(NoSuchBike("No.")).endswith("#modelnotscopederror")
