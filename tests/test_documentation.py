"""The Python blocks of the README and the documentation, run against a real server.

The blocks of a file run in order and share their names, as if they were typed one after the
other into ``python -m asyncio``; what they ``assert`` has to hold. ``client`` is there. A
comment in the line before a block says more about it::

    <!-- beanie: 1 -->              runs only with Beanie 1
    <!-- file: conftest.py -->      part of this file; pytest then runs all files so made

Both may stand in one comment, with a comma between them.
"""

from __future__ import annotations

import ast
import asyncio
import inspect
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent
from types import ModuleType
from typing import Any
from uuid import uuid4

import pytest
import pytest_asyncio
from beanie import Document
from clients import close

import beanie_session_scope
from beanie_session_scope.drivers import DRIVER

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
MAJOR = "2" if hasattr(Document, "get_pymongo_collection") else "1"

# What a reader would replace, and the tests do.
READERS_URI = "mongodb://localhost:27017/?replicaSet=rs0"
READERS_DATABASE = '"shop"'

BLOCK = re.compile(
    r"^(?:<!-- (?P<tags>[^\n]*) -->\n)?(?P<indent>[ ]*)```python\n(?P<code>.*?)^(?P=indent)```$",
    re.M | re.S,
)
FENCE = re.compile(r"^[ >]*(?:```|~~~)[ ]*(\S+).*$", re.M)
LINK = re.compile(r"\]\((?!https?://|mailto:|#)([^)#]+)")
LANGUAGES = {"python", "console", "text"}
DIRECTIVES = {"{eval-rst}", "{toctree}"}


@dataclass
class Block:
    """A Python block of a page."""

    page: Path
    line: int
    code: str
    tags: dict[str, str]

    @property
    def applies(self) -> bool:
        """Whether it is for the Beanie that is installed, and starts no server in vain."""
        named = os.environ.get("MONGODB_URI")
        return self.tags.get("beanie", MAJOR) == MAJOR and not (
            named and "ReplicaSet(" in self.code
        )

    async def run(self, names: dict[str, Any], replaced: dict[str, str]) -> None:
        """Run it at the top level; a traceback shows the line of the page."""
        source = "\n" * self.line + self.code
        for theirs, ours in replaced.items():
            source = source.replace(theirs, ours)
        flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        code = compile(source, self.page, "exec", flags=flags, dont_inherit=True)
        awaitable = eval(code, names)
        if inspect.isawaitable(awaitable):
            await awaitable


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return list(_blocks(page, text))


def _blocks(page: Path, text: str) -> Iterator[Block]:
    for match in BLOCK.finditer(text):
        tags = dict(tag.split(": ") for tag in (match["tags"] or "").split(", ") if tag)
        yield Block(page, text.count("\n", 0, match.start("code")), dedent(match["code"]), tags)


@pytest.fixture
def page_module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module that the classes of a page belong to."""
    module = ModuleType(f"page_{uuid4().hex}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


@pytest_asyncio.fixture
async def reader(server_uri: str, page_module: ModuleType) -> AsyncIterator[dict[str, str]]:
    """Give a page its ``client``, and what to replace in it; clean up after it."""
    client: Any = DRIVER.client_class(server_uri)
    database = f"beanie_session_scope_docs_{uuid4().hex[:8]}"
    page_module.client = client  # type: ignore[attr-defined]
    yield {READERS_URI: server_uri, READERS_DATABASE: f'"{database}"'}
    await client.drop_database(database)
    # Not a set: two clients of one server are equal.
    for each in [client] if page_module.client is client else [client, page_module.client]:
        await close(each)


def marked(page: Path) -> Any:
    """Mark the page about testing: all its code is about servers that it starts."""
    starting = [pytest.mark.starts_servers] if page.name == "testing.md" else []
    return pytest.param(page, id=str(page.relative_to(ROOT)), marks=starting)


@pytest.mark.parametrize("page", [marked(page) for page in PAGES])
class TestPage:
    async def test_its_code_does_what_it_says(
        self, page: Path, page_module: ModuleType, reader: dict[str, str], tmp_path: Path
    ) -> None:
        files: dict[str, list[str]] = {}
        for block in filter(lambda block: block.applies, blocks_of(page)):
            if "file" in block.tags:
                files.setdefault(block.tags["file"], []).append(block.code)
            else:
                await block.run(page_module.__dict__, reader)

        for name, parts in files.items():
            (tmp_path / name).write_text("\n\n".join(parts), encoding="utf-8")
        if files:
            run_pytest(tmp_path)

    def test_no_code_in_it_goes_unseen(self, page: Path) -> None:
        languages = FENCE.findall(page.read_text(encoding="utf-8"))

        assert set(languages) <= LANGUAGES | DIRECTIVES
        assert languages.count("python") == len(blocks_of(page))

    def test_its_links_lead_somewhere(self, page: Path) -> None:
        targets = LINK.findall(page.read_text(encoding="utf-8"))

        assert [target for target in targets if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("name", ["README.md", "docs/tutorial.md"])
async def test_can_be_typed_into_the_prompt(reader: dict[str, str], name: str) -> None:
    """Where, before Python 3.13, an empty line ends a block."""
    typed = [block.code for block in blocks_of(ROOT / name) if block.applies]
    source = "\n".join([*typed, 'print("the", "end")\n'])
    for theirs, ours in reader.items():
        source = source.replace(theirs, ours)
    prompt = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "asyncio"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    out, errors = await prompt.communicate(source.encode())
    assert "Error" not in errors.decode()
    assert "the end" in out.decode()


def run_pytest(directory: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if "PYTEST" not in name}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", directory],
        cwd=directory,
        env=environment,
        capture_output=True,
        encoding="utf-8",
        timeout=90,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


class TestBlocks:
    """Without these, a page whose code is wrong could pass."""

    def test_a_false_assertion_fails(self) -> None:
        (block,) = _blocks(Path("page.md"), "# Page\n\n```python\nassert False\n```\n")

        with pytest.raises(AssertionError) as raised:
            run_to_end(block)

        where = raised.traceback[-1]
        assert (Path(where.path).name, where.lineno + 1) == ("page.md", 4)

    def test_code_after_an_await_is_run(self) -> None:
        text = "```python\nimport asyncio\n\nawait asyncio.sleep(0)\nassert False\n```\n"
        (block,) = _blocks(Path("page.md"), text)

        with pytest.raises(AssertionError):
            run_to_end(block)

    def test_a_block_in_a_list_is_run(self) -> None:
        (block,) = _blocks(Path("page.md"), "* text\n\n  ```python\n  assert False\n  ```\n")

        with pytest.raises(AssertionError):
            run_to_end(block)

    def test_a_block_for_the_other_beanie_does_not_apply(self) -> None:
        other = "1" if MAJOR == "2" else "2"
        text = f"<!-- beanie: {other}, file: x.py -->\n```python\n1\n```\n```python\n2\n```\n"
        first, second = _blocks(Path("page.md"), text)

        assert (first.applies, first.tags["file"]) == (False, "x.py")
        assert (second.applies, second.tags) == (True, {})


def run_to_end(block: Block) -> None:
    asyncio.run(block.run({}, {}))


def test_every_public_name_is_documented() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)

    missing = [name for name in beanie_session_scope.__all__ if not re.search(rf"\b{name}\b", text)]

    assert missing == []
