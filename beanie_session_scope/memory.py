"""Documents as they were: what a transaction changed in memory, and how to take it back.

Beanie changes documents while it writes them. It sets the id, swaps the revision, keeps the
state it saved, and merges the server's answer into the fields. The server takes back what an
aborted transaction wrote; nobody does that in memory, where the next ``save()`` would then
store values that never were, or ``save_changes()`` would send nothing at all.

So a scope notes each document just before its first write to it. A ``Memento`` holds a shallow
copy of everything in the document that can change: going back puts the contents back into
the same objects, so whoever holds one of them sees that, too.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass
from datetime import datetime
from typing import Any

from beanie import Document
from beanie.odm.utils.parsing import merge_models
from bson import ObjectId
from pydantic import BaseModel

ATOMS = frozenset({type(None), bool, int, float, str, bytes, datetime, ObjectId})
"""Types of values that can't change: most fields hold one of these."""

CONTAINERS = (list, tuple, set, frozenset)
SAVED_STATES = ("_saved_state", "_previous_saved_state")
"""What Beanie keeps for its state management, which it replaces and never changes."""

MODEL_SLOTS = ("__pydantic_fields_set__", "__pydantic_extra__", "__pydantic_private__")


class Memento:
    """What a document was at one moment; linked documents are not part of it.

    Args:
        document: The document.
    """

    __slots__ = ("_parts", "_seen", "document")

    def __init__(self, document: Document) -> None:
        self.document = document
        self._parts: list[tuple[Callable[[Any, Any], None], Any, Any]] = []
        self._seen = {id(document)}
        self._note_model(document)
        del self._seen  # a scope may keep thousands of these

    def restore(self) -> None:
        """Let the document be what it was."""
        for put_back, part, contents in self._parts:
            put_back(part, contents)

    def _note_model(self, model: BaseModel) -> None:
        # Not through the attributes: that would validate, and refuse frozen fields.
        attributes = model.__dict__.copy()
        slots = [getattr(model, name, None) for name in MODEL_SLOTS]
        contents = (attributes, *[each if each is None else each.copy() for each in slots])
        self._parts.append((put_back_model, model, contents))
        self._note_all(attributes.values())
        _, extra, private = slots
        if extra:
            self._note_all(extra.values())
        if private:
            self._note_all(v for name, v in private.items() if name not in SAVED_STATES)

    def _note_all(self, values: Iterable[Any]) -> None:
        for value in values:
            if type(value) not in ATOMS and id(value) not in self._seen:
                self._seen.add(id(value))
                self._note(value)

    def _note(self, value: Any) -> None:
        if isinstance(value, (list, dict, set, deque, bytearray)):
            contents: Any = value.copy()
            self._parts.append((put_back_container, value, contents))
            self._note_all(contents.values() if isinstance(contents, dict) else contents)
        elif isinstance(value, BaseModel):
            if not isinstance(value, Document):
                self._note_model(value)
        elif isinstance(value, tuple):
            self._note_all(value)
        elif is_dataclass(value) and not isinstance(value, type):
            contents = {each.name: getattr(value, each.name) for each in fields(value)}
            self._parts.append((put_back_attributes, value, contents))
            self._note_all(contents.values())


def put_back_model(model: BaseModel, contents: tuple[Any, ...]) -> None:
    """Restore the fields of a model, and what pydantic keeps beside them."""
    for name, value in zip(("__dict__", *MODEL_SLOTS), contents, strict=True):
        object.__setattr__(model, name, value if value is None else value.copy())


def put_back_container(container: Any, contents: Any) -> None:
    """Restore what a list, a dict, a set or the like holds."""
    container.clear()
    (container.update if isinstance(container, (dict, set)) else container.extend)(contents)


def put_back_attributes(target: object, attributes: dict[str, Any]) -> None:
    """Restore the attributes of a dataclass, also of a frozen one."""
    for name, value in attributes.items():
        object.__setattr__(target, name, value)


class Journal:
    """The documents that a transaction wrote or tracks, as they were before.

    A write may be under way in one task when another one ends the transaction. Its document is
    put back when that write fails, or belongs to the transaction that comes next.

    Attributes:
        rewinds: How often the documents were put back because a transaction was aborted.
    """

    __slots__ = ("_before", "_tracked", "_under_way", "_written", "rewinds")

    def __init__(self) -> None:
        self.rewinds = 0
        self._before: dict[int, Memento] = {}
        self._tracked: dict[int, Document] = {}
        self._under_way: dict[int, Memento] = {}
        self._written: set[int] = set()

    def __contains__(self, document: Document) -> bool:
        """Tell whether the document was noted."""
        return id(document) in self._before

    def __len__(self) -> int:
        """Return how many documents were noted."""
        return len(self._before)

    @property
    def documents(self) -> list[Document]:
        """The documents, in the order in which they were noted."""
        return [memento.document for memento in self._before.values()]

    @property
    def written(self) -> list[Document]:
        """Those of them that a method has written."""
        return [self._before[key].document for key in self._before if key in self._written]

    def note(self, document: Document) -> None:
        """Keep what a document is, before something changes it."""
        if document not in self:
            self._before[id(document)] = Memento(document)

    def begin(self, document: Document) -> bool:
        """Keep what a document is, before a method writes it.

        Returns:
            Whether ``end`` is to be called; ``False`` where one such method calls another.
        """
        key = id(document)
        if key in self._under_way:
            return False
        memento = self._under_way[key] = Memento(document)
        self._written.add(key)
        self._before.setdefault(key, memento)
        return True

    def end(self, document: Document) -> None:
        """Take note that a method has written a document, or has failed to."""
        del self._under_way[id(document)]

    def track(self, document: Document) -> None:
        """Keep what a document is, and the documents in its fields, written or not."""
        for each in reachable(document):
            self._tracked[id(each)] = each
            self.note(each)

    def renew(self, documents: Iterable[Document]) -> None:
        """Take what documents are now for what they were, where they were noted."""
        for document in documents:
            if document in self:
                self._before[id(document)] = Memento(document)

    def rewind(self, documents: Iterable[Document] | None = None) -> None:
        """Let documents be what they were; all that were noted, where none are named."""
        self.rewinds += documents is None
        for document in self.documents if documents is None else documents:
            if document in self:
                self._before[id(document)].restore()

    def commit(self) -> None:
        """Take note that what was written is stored; a write under way comes after that."""
        self._before.update(self._under_way)

    def start_anew(self) -> None:
        """Begin a new transaction, for what is tracked and the writes that are under way."""
        before = {key: Memento(each) for key, each in self._tracked.items()}
        before.update((key, self._before[key]) for key in self._under_way)
        self._before = before
        self._written = set(self._under_way)


def reachable(document: Document) -> list[Document]:
    """Return a document and those that its fields hold, and theirs, each once."""
    found: dict[int, Document] = {}
    waiting = [document]
    while waiting:
        each = waiting.pop()
        if id(each) not in found:
            found[id(each)] = each
            waiting += documents_in(vars(each).values())
    return list(found.values())


def documents_in(values: Iterable[Any]) -> list[Document]:
    """Find documents among values, and in the lists, tuples, sets and dicts among them."""
    found, waiting, seen = [], list(values), set()
    while waiting:
        value = waiting.pop(0)
        if isinstance(value, Document):
            found.append(value)
        elif isinstance(value, (dict, *CONTAINERS)) and id(value) not in seen:
            seen.add(id(value))
            waiting += value.values() if isinstance(value, dict) else value
    return found


def check_documents(documents: Iterable[Any]) -> None:
    """Raise ``TypeError`` where something is no document."""
    for each in documents:
        if not isinstance(each, Document):
            name = each.__name__ if isinstance(each, type) else f"a {type(each).__name__} object"
            raise TypeError(
                f"Documents are needed here, instances of Document, and this is {name}."
            )


async def read_again(journal: Journal, documents: Iterable[Document]) -> None:
    """Read documents again: all that a journal holds, where none are named.

    One that is not stored becomes what the journal says that it was.
    """
    for document in list(documents) or journal.documents:
        stored = None
        if document.id is not None:
            # Document's own: that of a class with soft deletion leaves out what is deleted.
            find_one: Any = Document.find_one.__func__  # type: ignore[attr-defined]
            stored = await find_one(type(document), {"_id": document.id}, ignore_cache=True)
        if stored is None:
            journal.rewind([document])
        else:
            merge_models(document, stored)
            document._save_state()
