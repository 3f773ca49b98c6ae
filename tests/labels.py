"""The labels with which the server and the driver say what may be done after an error."""

from __future__ import annotations

from pymongo.errors import PyMongoError

TRANSIENT = "TransientTransactionError"
UNKNOWN = "UnknownTransactionCommitResult"


def labelled(label: str) -> PyMongoError:
    """Return an error that has a label."""
    return PyMongoError("as if from the server", error_labels=[label])
