"""How far a migration has come, stored beside the documents that it changes.

Every batch claims the checkpoint first, in its own transaction: of two runners only one can, and
the other one gets a write conflict, waits and goes on from where that one has come to. A runner
that is killed leaves the checkpoint and the documents as they were before its last batch, or
after it, but never one without the other.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import bson
from beanie import Document, init_beanie
from pymongo import ReadPreference, ReturnDocument
from pymongo.errors import DuplicateKeyError

from beanie_session_scope import SessionScopeMixin, collection_of

from ._errors import MigrationError, MigrationMismatchError
from ._query import Position, Selection
from ._summary import MOST_LISTED, InvalidDocument
from ._write import Tally

CHECKPOINTS = "beanie_session_scope_migrations"
"""The collection that holds a checkpoint for each migration, in the database of the model."""


@dataclass(frozen=True)
class Progress:
    """What the checkpoint says.

    Attributes:
        step: How many batches were committed.
        position: The ``_id`` that was dealt with last.
        complete: Whether the end was reached.
        documents: How many documents were dealt with.
        invalid: Those that were left out because they failed validation.
    """

    step: int = 0
    position: Position = ()
    complete: bool = False
    documents: int = 0
    invalid: tuple[InvalidDocument, ...] = ()

    @classmethod
    def of(cls, stored: dict[str, Any]) -> Progress:
        """Read a stored checkpoint."""
        return cls(
            step=stored["step"],
            position=tuple(stored["position"]),
            complete="completed" in stored,
            documents=sum(stored[name] for name in COUNTS),
            invalid=tuple(
                InvalidDocument(each["id"], tuple(each["errors"]))
                for each in stored["invalid_documents"]
            ),
        )


COUNTS = ("changed", "unchanged", "skipped", "invalid")


class Checkpoint:
    """The stored state of one migration.

    Args:
        name: The name of the migration.
        selection: Its documents.
    """

    def __init__(self, name: str, selection: Selection) -> None:
        self._name = name
        self._selection = selection
        self._model: Any = None

    async def open(self, *, create: bool) -> Progress | None:
        """Find the checkpoint.

        Args:
            create: Whether to store a new one where there is none.

        Returns:
            How far the migration has come; ``None`` where it had not begun.

        Raises:
            MigrationMismatchError: If the name was used for another model or filter.
        """
        # A class of its own, so that the checkpoint is written through a bound collection: what
        # is cancelled there comes to its end before the transaction does.
        self._model = await _initialised_class(self._selection.collection.database)
        stored = await self._find()
        if stored is None and create:
            stored = await self._insert()
        if stored is None:
            return None
        if stored["fingerprint"] != self._fingerprint():
            raise MigrationMismatchError(
                f"A migration named {self._name!r} was begun with another query, on "
                f"{stored['model']}, and this one is on {self._selection.model.__name__}: give "
                "this one a name of its own. (A filter must be the same at every start, so it "
                "can't hold the current time.)"
            )
        progress = Progress.of(stored)
        return progress if stored["step"] or progress.complete else None

    async def read(self) -> Progress:
        """Read how far the migration has come."""
        return Progress.of(await self._find() or self._gone())

    async def claim(self) -> Progress:
        """Reserve the checkpoint for this transaction, as its first operation.

        Returns:
            How far the migration had come.
        """
        stored = await collection_of(self._model).find_one_and_update(
            {"_id": self._name}, {"$inc": {"step": 1}}, return_document=ReturnDocument.BEFORE
        )
        return Progress.of(stored or self._gone())

    async def advance(self, position: Position, tally: Tally) -> None:
        """Store how far this batch has come, in its transaction."""
        listed = [{"id": each.id, "errors": list(each.errors)} for each in tally.listed]
        await collection_of(self._model).update_one(
            {"_id": self._name},
            {
                "$set": {"position": list(position), "updated": _now()},
                "$inc": {name: getattr(tally, name) for name in COUNTS},
                "$push": {"invalid_documents": {"$each": listed, "$slice": MOST_LISTED}},
            },
        )

    async def complete(self, step: int) -> bool:
        """Store that the end was reached.

        Args:
            step: How many batches were committed when it was.

        Returns:
            Whether that is so; not where another runner has gone on meanwhile.
        """
        result = await collection_of(self._model).update_one(
            {"_id": self._name, "step": step}, {"$set": {"completed": _now()}}
        )
        return bool(result.matched_count)

    async def _find(self) -> dict[str, Any] | None:
        primary = collection_of(self._model).with_options(read_preference=ReadPreference.PRIMARY)
        found: dict[str, Any] | None = await primary.find_one({"_id": self._name})
        return found

    async def _insert(self) -> dict[str, Any] | None:
        checkpoint = {
            "_id": self._name,
            "model": self._selection.model.__name__,
            "fingerprint": self._fingerprint(),
            "step": 0,
            "position": [],
            **dict.fromkeys(COUNTS, 0),
            "invalid_documents": [],
            "started": _now(),
        }
        try:
            await collection_of(self._model).insert_one(checkpoint)
        except DuplicateKeyError:
            return await self._find()  # another runner has begun at the same moment
        return checkpoint

    def _fingerprint(self) -> str:
        """Return a hash of what the migration is about; BSON keeps types and order."""
        collection = self._selection.collection
        about = {
            "collection": collection.name,
            "model": self._selection.model.__name__,
            "filter": self._selection.filter,
        }
        encoded = bson.encode(about, codec_options=collection.codec_options)
        return hashlib.sha256(encoded).hexdigest()

    def _gone(self) -> dict[str, Any]:
        raise MigrationError(
            f"The checkpoint of migration {self._name!r} was removed from {CHECKPOINTS} while it "
            "ran. What it has changed stays changed, and nothing tells which documents these "
            "are: restore the checkpoint before you start it again."
        )


async def _initialised_class(database: Any) -> Any:
    class MigrationCheckpoint(SessionScopeMixin, Document):
        class Settings:
            name = CHECKPOINTS

    await init_beanie(database=database, document_models=[MigrationCheckpoint])
    return MigrationCheckpoint


def _now() -> datetime:
    return datetime.now(timezone.utc)
