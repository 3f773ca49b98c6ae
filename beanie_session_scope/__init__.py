"""Every operation of a Beanie document class in one session and transaction.

async with with_session(collections=[Bike]):
    await Bike(color="red").insert()        # no session argument anywhere
"""

from .binding import Token
from .blocks import (
    bind_session,
    current_scope,
    is_outside,
    on_abort,
    on_commit,
    outside_session,
    with_session,
)
from .errors import (
    ClientMismatchError,
    CommitUnknownError,
    HookError,
    ModelNotInitializedError,
    ModelNotScopedError,
    NotAClientError,
    PropagationError,
    Rollback,
    ScopeClosedError,
    ScopeReusedError,
    SessionScopeError,
    TransactionAbortedError,
    TransactionExpiredError,
    TransactionsNotSupportedError,
    TransactionTimeoutError,
    UnexpectedRollbackError,
    UnsupportedInTransactionError,
)
from .mixin import SessionScopeMixin
from .observers import ScopeObserver, observe
from .plan import collection_of
from .retry import (
    TransactionAttempt,
    TransactionAttempts,
    run_in_transaction,
    transaction_attempts,
    transactional,
)
from .scope import SessionScope
from .state import ScopeState

__all__ = [
    "ClientMismatchError",
    "CommitUnknownError",
    "HookError",
    "ModelNotInitializedError",
    "ModelNotScopedError",
    "NotAClientError",
    "PropagationError",
    "Rollback",
    "ScopeClosedError",
    "ScopeObserver",
    "ScopeReusedError",
    "ScopeState",
    "SessionScope",
    "SessionScopeError",
    "SessionScopeMixin",
    "Token",
    "TransactionAbortedError",
    "TransactionAttempt",
    "TransactionAttempts",
    "TransactionExpiredError",
    "TransactionTimeoutError",
    "TransactionsNotSupportedError",
    "UnexpectedRollbackError",
    "UnsupportedInTransactionError",
    "bind_session",
    "collection_of",
    "current_scope",
    "is_outside",
    "observe",
    "on_abort",
    "on_commit",
    "outside_session",
    "run_in_transaction",
    "transaction_attempts",
    "transactional",
    "with_session",
]
