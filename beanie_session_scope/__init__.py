"""Every operation of a Beanie document class in one session and transaction.

async with with_session(collections=[Bike]):
    await Bike(color="red").insert()        # no session argument anywhere
"""

from .binding import Token
from .blocks import bind_session, current_scope, outside_session, with_session
from .errors import (
    ClientMismatchError,
    CommitUnknownError,
    ModelNotInitializedError,
    ModelNotScopedError,
    NotAClientError,
    PropagationError,
    Rollback,
    ScopeClosedError,
    ScopeReusedError,
    SessionScopeError,
    TransactionAbortedError,
    TransactionsNotSupportedError,
    UnexpectedRollbackError,
    UnsupportedInTransactionError,
)
from .mixin import SessionScopeMixin
from .scope import ScopeState, SessionScope

__all__ = [
    "ClientMismatchError",
    "CommitUnknownError",
    "ModelNotInitializedError",
    "ModelNotScopedError",
    "NotAClientError",
    "PropagationError",
    "Rollback",
    "ScopeClosedError",
    "ScopeReusedError",
    "ScopeState",
    "SessionScope",
    "SessionScopeError",
    "SessionScopeMixin",
    "Token",
    "TransactionAbortedError",
    "TransactionsNotSupportedError",
    "UnexpectedRollbackError",
    "UnsupportedInTransactionError",
    "bind_session",
    "current_scope",
    "outside_session",
    "with_session",
]
