"""Who is told how far a migration is: a bar on a terminal, the log elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal

logger = logging.getLogger("beanie_session_scope.migration")

INTERVAL = 5.0
"""How long there is nothing new in the log at least, in seconds."""

ProgressKind = Literal["auto", "bar", "log", "off"]
KINDS: tuple[ProgressKind, ...] = ("auto", "bar", "log", "off")


class Silence:
    """Tells nobody."""

    counts = False
    """Whether it wants to know how many documents there are."""

    def start(self, name: str, total: int | None) -> None:
        """Hear that a migration begins.

        Args:
            name: Its name.
            total: How many documents are left.
        """

    def advance(self, documents: int) -> None:
        """Hear that so many more documents were dealt with."""

    def stop(self) -> None:
        """Hear that nothing more comes."""


class Lines(Silence):
    """Writes a line to the log now and then."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock

    def start(self, name: str, total: int | None) -> None:
        """Remember when it began."""
        self._name, self._documents = name, 0
        self._began = self._told = self._clock()

    def advance(self, documents: int) -> None:
        """Write a line, if the last one was written a while ago."""
        self._documents += documents
        now = self._clock()
        if now - self._told >= INTERVAL:
            self._told = now
            logger.info(
                "Migration %r: %d documents so far, %.0f per second",
                self._name,
                self._documents,
                self._documents / (now - self._began),
                extra={
                    "event": "migration.progress",
                    "migration": self._name,
                    "documents": self._documents,
                },
            )


class Bar(Silence):
    """Draws tqdm's bar on the standard error.

    Raises:
        ImportError: If tqdm is not installed.
    """

    counts = True

    def __init__(self) -> None:
        try:
            self._tqdm: Any = import_module("tqdm").tqdm
        except ImportError as error:
            raise ImportError(
                'progress="bar" needs tqdm: pip install "beanie_session_scope[migration]".'
            ) from error
        self._bar: Any = None

    def start(self, name: str, total: int | None) -> None:
        """Draw it."""
        self._bar = self._tqdm(desc=name, total=total, unit=" documents")

    def advance(self, documents: int) -> None:
        """Draw it longer."""
        self._bar.update(documents)

    def stop(self) -> None:
        """Leave it as it is."""
        if self._bar is not None:
            self._bar.close()


def progress_of(kind: ProgressKind) -> Silence:
    """Return whom to tell.

    Raises:
        ValueError: If the kind is not known.
        ImportError: If a bar was asked for, and tqdm is not installed.
    """
    if kind not in KINDS:
        raise ValueError(
            f"progress={kind!r} is not known: use one of {', '.join(map(repr, KINDS))}."
        )
    on_terminal = sys.stderr is not None and sys.stderr.isatty()
    if kind == "bar" or (kind == "auto" and on_terminal and find_spec("tqdm") is not None):
        return Bar()
    return Silence() if kind == "off" else Lines()
