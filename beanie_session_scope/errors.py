"""Every error that this package raises.

Each message says what happened, why, and what to do next. None carries a connection
string or the contents of a document. Errors that stand for an error of the driver keep
it as ``__cause__`` and answer for its labels, because in MongoDB labels, not classes,
say what may be retried (MongoDB *transactions* specification, "Error Labels").

The last line of a message is the address of the place in the documentation where the error is
explained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from beanie import Document

_PACKAGE = __name__.partition(".")[0]

DOCUMENTATION = "https://beanie-session-scope.readthedocs.io/en/stable"
"""Where the documentation is; tests/check_site.py resolves what is below it."""


class SessionScopeError(Exception):
    """Base class of every error of this package."""

    def __str__(self) -> str:
        """Return the message, and on a line of its own where the error is explained."""
        # Not in the arguments: the error is pickled, and compared, by those.
        bases = type(self).__mro__
        own = next(base for base in bases if base.__module__.partition(".")[0] == _PACKAGE)
        return f"{super().__str__()}\n{DOCUMENTATION}/reference/errors.html#{own.__name__.lower()}"

    def has_error_label(self, label: str) -> bool:
        """Tell whether the driver's error behind this one carries a label.

        Args:
            label: An error label, such as ``"TransientTransactionError"``.

        Returns:
            What the driver's ``has_error_label`` says of ``__cause__``, or of one of the errors
            in it where that is a group; ``False`` where no driver error stands behind this one.
        """
        return _has_label(self.__cause__, label)


def _has_label(error: BaseException | None, label: str) -> bool:
    inner: tuple[BaseException, ...] = getattr(error, "exceptions", ())
    has_label: Callable[[str], bool] | None = getattr(error, "has_error_label", None)
    return any(_has_label(each, label) for each in inner) or (
        has_label is not None and bool(has_label(label))
    )


class ModelNotScopedError(SessionScopeError, TypeError):
    """Something was named that is no class with ``SessionScopeMixin``."""


class ModelNotInitializedError(SessionScopeError):
    """A class was named that ``init_beanie`` has not initialised yet."""


class ClientMismatchError(SessionScopeError):
    """A class and the scope belong to different clients, or no client can be told."""


class NotAClientError(ClientMismatchError, TypeError):
    """What was passed as ``client`` is no client of the driver that Beanie uses."""


class PropagationError(SessionScopeError):
    """The scope can't be opened the way ``propagation`` or its options ask for."""


class ScopeReusedError(SessionScopeError):
    """A scope was entered a second time."""


class ScopeClosedError(SessionScopeError):
    """Something went on using a scope that is over."""


class TransactionAbortedError(SessionScopeError):
    """The transaction is already gone on the server, so it can't go on or commit."""


class UnexpectedRollbackError(SessionScopeError):
    """The block was left normally, but its transaction could only be rolled back."""


class TransactionExpiredError(SessionScopeError):
    """The transaction outlived the server's limit; running it again would be no use."""


class TransactionTimeoutError(SessionScopeError):
    """The transaction was run again and again, and its time is up."""


class CommitUnknownError(SessionScopeError):
    """The commit was sent, and its outcome can't be known.

    Attributes:
        documents: Those that the transaction wrote or tracked. They are left as they are, and
            ``await scope.refresh()`` reads them again.
    """

    def __init__(self, message: str, documents: Iterable[Document] = ()) -> None:
        super().__init__(message)
        self.documents = list(documents)


class HookError(SessionScopeError):
    """A hook failed, after the outcome of the transaction was settled.

    Its cause is the first error of a hook. It carries no labels: the transaction is over, and
    must not be run again because a hook says so.

    Attributes:
        committed: Whether the transaction was committed; otherwise it was aborted.
        errors: What the hooks raised, in order.
    """

    def __init__(self, message: str, committed: bool, errors: Iterable[BaseException]) -> None:
        super().__init__(message)
        self.committed = committed
        self.errors = list(errors)

    def __reduce__(self) -> tuple[Any, ...]:
        """Let it be pickled, as for another process."""
        return type(self), (*self.args, self.committed, self.errors), self.__dict__

    def has_error_label(self, label: str) -> bool:
        """Answer ``False``."""
        return False


class TransactionsNotSupportedError(SessionScopeError):
    """The server is a standalone one, which has no transactions."""


class UnsupportedInTransactionError(SessionScopeError):
    """The operation can't run inside a transaction."""


class Rollback(Exception):  # noqa: N818 - it is raised to ask for something, not to report
    """Raise it inside a scope to abort its transaction quietly.

    It leaves the block of the scope that owns the transaction; the code after that
    block goes on as if nothing had been raised.
    """
