"""Change every document of a collection that no single transaction can hold.

`migrate_in_batches` runs one transaction per batch, and writes its checkpoint in the same
transaction: each document is changed exactly once, however often the script is killed and
started again.

Beanie's own migrations run in one transaction, whose session it hands in: `bind_migration`, or
`bind_session` of the package, let every operation run in that.
"""

from __future__ import annotations

from ._beanie import bind_migration
from ._checkpoint import CHECKPOINTS
from ._errors import InvalidDocumentError, MigrationError, MigrationMismatchError
from ._run import migrate_in_batches
from ._summary import BatchSummary, InvalidDocument
from ._write import SKIP, Skip

__all__ = [
    "CHECKPOINTS",
    "SKIP",
    "BatchSummary",
    "InvalidDocument",
    "InvalidDocumentError",
    "MigrationError",
    "MigrationMismatchError",
    "Skip",
    "bind_migration",
    "migrate_in_batches",
]
