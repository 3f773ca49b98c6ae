"""What a run of a migration has done."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

MOST_LISTED = 1000
"""How many invalid documents are listed; the others are counted."""


@dataclass(frozen=True)
class InvalidDocument:
    """A document that failed validation.

    Attributes:
        id: Its ``_id``, as the driver reads it.
        errors: What is wrong: field and type of error, such as ``"wheels: int_parsing"``.
            No values.
    """

    id: Any = field(repr=False)
    errors: tuple[str, ...]


def describe(error: ValidationError) -> tuple[str, ...]:
    """Name the fields that an error is about and the types of error; no values."""
    found = error.errors(include_url=False, include_context=False, include_input=False)
    # Of where it is only the field: what comes below it may be the key of a dictionary.
    return tuple(dict.fromkeys(f"{(*each['loc'], '-')[0]}: {each['type']}" for each in found))


@dataclass
class BatchSummary:
    """What one call of ``migrate_in_batches`` did; of a dry run, what it would have done.

    Attributes:
        name: The name of the migration.
        dry_run: Whether every batch was rolled back.
        changed: Documents that are stored otherwise now.
        unchanged: Documents that were written as they had been.
        skipped: Documents for which ``change`` returned ``SKIP``.
        invalid: Documents that failed validation, and were left as they are.
        invalid_documents: The first thousand of these, those of earlier runs included.
        batches: Transactions that were committed; of a dry run, rolled back.
        retries: Attempts at a transaction beyond the first one.
        seconds: How long it took.
        complete: Whether the end of the collection was reached.
        resumed: Whether an earlier run had begun.
        earlier: How many documents earlier runs, and others at the same time, have dealt with.
    """

    name: str
    dry_run: bool = False
    changed: int = 0
    unchanged: int = 0
    skipped: int = 0
    invalid: int = 0
    invalid_documents: list[InvalidDocument] = field(default_factory=list)
    batches: int = 0
    retries: int = 0
    seconds: float = 0.0
    complete: bool = False
    resumed: bool = False
    earlier: int = 0

    @property
    def documents(self) -> int:
        """How many documents this run has dealt with."""
        return self.changed + self.unchanged + self.skipped + self.invalid

    def __str__(self) -> str:
        """Write it in one line; nothing of a document is in it."""
        if self.complete and self.resumed and not self.batches:
            return f"Migration {self.name!r} had nothing left to do"
        return (
            f"Migration {self.name!r} {'is complete' if self.complete else 'has stopped'}"
            f"{' (dry run: nothing was stored)' if self.dry_run else ''}: "
            f"{self.changed} changed, {self.unchanged} unchanged, {self.skipped} skipped, "
            f"{self.invalid} invalid, {self.earlier} dealt with before; {self.batches} batches, "
            f"{self.retries} retries, {self.seconds:.1f} s"
        )
