"""What a migration raises."""

from __future__ import annotations

from typing import Any

from beanie_session_scope import SessionScopeError

from ._summary import InvalidDocument


class MigrationError(SessionScopeError):
    """A migration can't go on; the batch that was under way is rolled back."""


class MigrationMismatchError(MigrationError, ValueError):
    """The name of the migration was used for another model or filter before."""


class InvalidDocumentError(MigrationError):
    """A document failed validation, and ``on_invalid="stop"`` asks to stop there.

    The batch that it was in is rolled back. Its cause is pydantic's ``ValidationError``.

    Attributes:
        document: Which document, and what is wrong with it.
    """

    def __init__(self, message: str, document: InvalidDocument) -> None:
        super().__init__(message)
        self.document = document

    def __reduce__(self) -> tuple[Any, ...]:
        """Let it be pickled, as for another process."""
        return type(self), (*self.args, self.document), self.__dict__
