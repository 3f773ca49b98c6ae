"""The names of what is recorded, and what is recorded of an error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeGuard

from beanie_session_scope import Rollback

NAME = "beanie_session_scope"

# Of spans and metrics.
ATTEMPT = f"{NAME}.attempt"
ATTEMPTS = f"{NAME}.attempts"
ERROR_LABELS = f"{NAME}.error.labels"
OPERATIONS = f"{NAME}.operations"
OUTCOME = f"{NAME}.outcome"
PROPAGATION = f"{NAME}.propagation"
WAIT = f"{NAME}.wait"

# Of events.
RETRY = f"{NAME}.retry"
COMMIT_RETRY = f"{NAME}.commit.retry"

LABELS = ("TransientTransactionError", "UnknownTransactionCommitResult")


def kind(error: BaseException) -> dict[str, Any]:
    """Return attributes that say what kind of error one is, for metrics."""
    attributes = {"error.type": type(error).__qualname__}
    code = getattr(error, "code", None)
    if isinstance(code, int):
        attributes["db.response.status_code"] = str(code)
    return attributes


def describe(error: BaseException) -> dict[str, Any]:
    """Return attributes that say what an error means, and nothing of its message."""
    has_label: Callable[[str], bool] | None = getattr(error, "has_error_label", None)
    labels = [label for label in LABELS if has_label is not None and has_label(label)]
    return {**kind(error), **({ERROR_LABELS: labels} if labels else {})}


def is_failure(error: BaseException | None) -> TypeGuard[BaseException]:
    """Tell whether there is an error, and not one that only asks for a rollback."""
    if error is None or isinstance(error, Rollback):
        return False
    inner = getattr(error, "exceptions", ())
    return not inner or any(map(is_failure, inner))
