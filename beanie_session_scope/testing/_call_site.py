"""Where in the user's code was a command of the driver asked for?

PyMongo's asyncio API sends a command in the task that asks for it, so its stack leads there.
Motor sends it in a thread: what asked is noted when the work is handed to the thread. A task that
runs the driver's or Beanie's own coroutine has no frame of the user on its stack: Python then
knows where that coroutine was created.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import os
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

_ORIGIN_DEPTH = 30
_LOOP_MODULES = ("asyncio.base_events", "asyncio.events", "asyncio.runners")
_LOOP_FUNCTIONS = ("_run", "_run_once", "run", "run_forever", "run_until_complete")
_FOREIGN_PACKAGES = ("anyio", "beanie", "bson", "motor", "pymongo", "pytest_asyncio")
_INSTALLED = {"site-packages", "dist-packages"}
_MOTOR = "motor.frameworks.asyncio"


class CallSite(NamedTuple):
    """A line of somebody's code.

    Attributes:
        file: The path of the file (str).
        line: The number of the line (int).
        function: The function that the line belongs to (str).
    """

    file: str
    line: int
    function: str


_handed_over: ContextVar[CallSite | None] = ContextVar("beanie_session_scope_call_site")


def call_site() -> CallSite | None:
    """Find the innermost line of the user's code that led here.

    Returns:
        The line (CallSite), or None where only libraries are at work.
    """
    return _on_stack() or _of_task() or _handed_over.get(None)


def _on_stack() -> CallSite | None:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not _is_loop(frame):
        code = frame.f_code
        if not is_foreign(code.co_filename):
            return CallSite(code.co_filename, frame.f_lineno, code.co_name)
        frame = frame.f_back
    return None


def _is_loop(frame: FrameType) -> bool:
    """Tell whether a frame is the event loop's: those beyond it have asked for nothing."""
    return (
        frame.f_code.co_name in _LOOP_FUNCTIONS and frame.f_globals.get("__name__") in _LOOP_MODULES
    )


def _of_task() -> CallSite | None:
    try:
        task = asyncio.current_task()
    except RuntimeError:  # no loop runs in this thread
        return None
    origin = getattr(task.get_coro(), "cr_origin", None) if task is not None else None
    return next((CallSite(*each) for each in origin or () if not is_foreign(each[0])), None)


@cache
def is_foreign(file: str) -> bool:
    """Tell whether a file belongs to Python, to an installed package or to this one.

    Args:
        file: The path of the file, as code objects have it (str).

    Returns:
        False for the user's own code (bool).
    """
    path = os.path.abspath(file)
    return (
        file.startswith("<frozen ")
        or not _INSTALLED.isdisjoint(Path(path).parts)
        or path.startswith(_foreign_folders())
    )


@cache
def _foreign_folders() -> tuple[str, ...]:
    paths = sysconfig.get_paths()
    folders = {paths["stdlib"], paths["platstdlib"], str(Path(__file__).parents[1])}
    specs = (importlib.util.find_spec(name) for name in _FOREIGN_PACKAGES)
    for spec in specs:  # one may be installed elsewhere, as in a tree of its own
        folders.update((spec and spec.submodule_search_locations) or ())
    return tuple(os.path.join(os.path.abspath(folder), "") for folder in folders)


@contextmanager
def tracked_call_sites() -> Iterator[None]:
    """Let Python and Motor keep, for the length of a block, what `call_site` needs."""
    depth = sys.get_coroutine_origin_tracking_depth()
    sys.set_coroutine_origin_tracking_depth(max(depth, _ORIGIN_DEPTH))
    try:
        with _noted_in_motor():
            yield
    finally:
        sys.set_coroutine_origin_tracking_depth(depth)


@contextmanager
def _noted_in_motor() -> Iterator[None]:
    if importlib.util.find_spec("motor") is None:
        yield
        return
    framework: Any = importlib.import_module(_MOTOR)
    original: Callable[..., Any] = framework.run_on_executor

    def run_on_executor(*args: Any, **kwargs: Any) -> Any:
        site = _on_stack() or _of_task()
        if site is not None:
            # Motor copies the context for its thread, and for the callbacks that fetch on.
            _handed_over.set(site)
        return original(*args, **kwargs)

    framework.run_on_executor = run_on_executor
    try:
        yield
    finally:
        framework.run_on_executor = original
