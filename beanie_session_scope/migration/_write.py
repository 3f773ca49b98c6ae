"""One batch, inside its transaction: read, change, write."""

from __future__ import annotations

import inspect
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final, Literal, TypeAlias

import bson
from beanie import BulkWriter, Document
from beanie.odm.utils.parsing import parse_obj
from pydantic import ValidationError

from beanie_session_scope import ModelNotScopedError, SessionScopeMixin, collection_of

from ._errors import InvalidDocumentError, MigrationError
from ._pace import MOST_BYTES
from ._query import Position, Selection
from ._summary import InvalidDocument, describe


class Skip(Enum):
    """The type of ``SKIP``."""

    SKIP = "skip"


SKIP: Final = Skip.SKIP
"""What ``change`` returns for a document that is not to be written."""

Change: TypeAlias = "Callable[[Any], Any | Awaitable[Any]]"
Write = Literal["save", "replace"]
OnInvalid = Literal["stop", "skip"]


class Redo(Exception):  # noqa: N818 - it asks for something, and is no error
    """``change`` refused documents that it may have written about: once more, without these."""


@dataclass
class Tally:
    """What a batch did.

    Attributes:
        position: The ``_id`` that it has come to.
        listed: The documents that it left out because they failed validation.
    """

    position: Position = ()
    changed: int = 0
    unchanged: int = 0
    skipped: int = 0
    listed: list[InvalidDocument] = field(default_factory=list)

    @property
    def invalid(self) -> int:
        """How many documents failed validation."""
        return len(self.listed)

    @property
    def documents(self) -> int:
        """How many documents there were."""
        return self.changed + self.unchanged + self.skipped + self.invalid


class Changer:
    """Changes documents, as the user asks.

    Args:
        selection: Which documents.
        change: What to do with each.
        write: How to write them.
        on_invalid: What to do about those that fail validation.
    """

    def __init__(
        self, selection: Selection, change: Change, write: Write, on_invalid: OnInvalid
    ) -> None:
        self._selection = selection
        self._change = change
        self._write: Write = write
        self._on_invalid = on_invalid
        self._refused: dict[bytes, InvalidDocument] = {}

    async def run(self, ids: list[Any], seconds: float) -> Tally:
        """Change documents, in the transaction in force, until the time is up.

        Args:
            ids: Which ones.
            seconds: After how long to leave the others to the next batch.

        Returns:
            What was done, and how far.

        Raises:
            Redo: If a document was refused when ``change`` may have written something already.
        """
        end = time.monotonic() + seconds
        tally, writers = Tally(position=(ids[-1],)), Writers(self._write)
        size, redo = 0, False
        options = self._selection.collection.codec_options
        cursor = self._selection.documents(ids)
        async for stored in cursor:
            encoded = bson.encode(stored, codec_options=options)
            redo |= await self._is_refused_anew(stored, encoded, tally, writers)
            size += len(encoded)
            if size >= MOST_BYTES or time.monotonic() >= end:
                tally.position = (stored["_id"],)
                await cursor.close()
                break
        if redo:
            raise Redo
        await writers.flush(tally)
        return tally

    def forget(self) -> None:
        """Start with another batch."""
        self._refused.clear()

    async def _is_refused_anew(
        self, stored: dict[str, Any], encoded: bytes, tally: Tally, writers: Writers
    ) -> bool:
        """Read, change and write one document; tell whether that asks for another try."""
        refused = self._refused.get(encoded)  # as it is now: it may have been mended meanwhile
        if refused is not None:
            tally.listed.append(refused)
            return False
        try:
            document = parse_obj(self._selection.model, stored)
        except ValidationError as error:
            tally.listed.append(self._invalid(stored, error, "it was read"))
            return False
        try:
            changed = await self._changed(document)
            if changed is None:
                tally.skipped += 1
            else:
                await writers.add(changed)
        except ValidationError as error:
            self._refused[encoded] = self._invalid(stored, error, "it was changed")
            return True
        return False

    async def _changed(self, document: Any) -> Any:
        """Return the document to write, or ``None``."""
        if not issubclass(type(document), SessionScopeMixin):  # of a class of a union
            name = type(document).__name__
            raise ModelNotScopedError(
                f"{name} has no SessionScopeMixin, so its documents can't be changed in the "
                f"transaction of a batch: declare it as class {name}(SessionScopeMixin, Document)."
            )
        result: Any = self._change(document)
        if inspect.isawaitable(result):
            result = await result
        if result is None or result is document:
            return document
        if result is SKIP:
            return None
        model = type(result)
        if isinstance(result, Document) and issubclass(model, SessionScopeMixin):
            same_place = collection_of(model).full_name
            if result.id == document.id and same_place == self._selection.collection.full_name:
                return result
        raise TypeError(
            f"change() returned a {type(result).__name__}, and must return None (the document is "
            "written as it is now), SKIP (it is not written), or a document with the same id, of "
            "a class with the mixin that is stored in the same collection."
        )

    def _invalid(
        self, stored: dict[str, Any], error: ValidationError, when: str
    ) -> InvalidDocument:
        invalid = InvalidDocument(stored["_id"], describe(error))
        if self._on_invalid == "stop":
            raise InvalidDocumentError(
                f"A document of {self._selection.model.__name__} failed validation when {when} "
                f"({', '.join(invalid.errors)}). Its batch was rolled back, and those before it "
                "were not. Mend the document, whose _id is in document.id of this error, or "
                'pass on_invalid="skip"; then start the migration again.',
                invalid,
            ) from error
        return invalid


NOBODYS: Any = object()
"""In place of a session, while writes are collected and nothing is sent.

A scope keeps a copy of each document that is written in its own session, to put it back after an
abort. These are thrown away after an abort, and the copies would take a sixth of the time.
"""


class Writers:
    """Collects what is to be written, for one command.

    Beanie's own ``save`` and ``replace`` write through them: with its event actions, validation,
    revisions and saved states.

    Args:
        write: Which of the two.
    """

    def __init__(self, write: Write) -> None:
        self._write = write
        self._writers: dict[type[Any], BulkWriter] = {}

    async def add(self, document: Any) -> None:
        """Take a document to be written."""
        # Older Beanie wants one writer for each class.
        writer = self._writers.setdefault(type(document), BulkWriter(session=NOBODYS))
        await getattr(document, self._write)(bulk_writer=writer)

    async def flush(self, tally: Tally) -> None:
        """Write the documents.

        Raises:
            MigrationError: If one is not there.
        """
        for model, writer in self._writers.items():
            writer.session = None  # that of the scope, as everywhere
            result = await writer.commit()
            if result is None:
                continue
            if result.matched_count != len(writer.operations):
                raise MigrationError(
                    f"A document of {model.__name__} was not there when it was to be written, "
                    "or had another revision: change() has removed it or written it otherwise. "
                    "Return SKIP for a document that change() itself has dealt with."
                )
            tally.changed += result.modified_count
            tally.unchanged += result.matched_count - result.modified_count
