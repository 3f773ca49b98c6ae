"""How a transaction ends: the commit, and the abort.

The rules are those of the MongoDB *transactions* and *convenient API for transactions*
specifications. A commit whose answer is lost may have been applied. It may be sent again as
often as one likes, and is, while its error carries ``UnknownTransactionCommitResult``.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Iterator
from itertools import count
from typing import Any

from pymongo.errors import ConnectionFailure, OperationFailure, PyMongoError, WriteConcernError

from .channel import TRANSIENT, SessionChannel
from .deadline import Deadline
from .drivers import DRIVER, Session
from .errors import CommitUnknownError, Rollback, TransactionExpiredError
from .log import log, nameof
from .observers import OBSERVERS, tell
from .waiting import insist

UNKNOWN_COMMIT = "UnknownTransactionCommitResult"
MAX_TIME_MS_EXPIRED = 50


async def commit(channel: SessionChannel, deadline: Deadline, bound: float) -> None:
    """Commit the transaction of a channel's session.

    Args:
        channel: The channel, closed or with its lock held.
        deadline: Up to when a commit of unknown outcome is tried again.
        bound: How long to go on when the loop is shut down, in seconds.

    Raises:
        PyMongoError: If the server refused it: nothing was committed.
        CommitUnknownError: If nobody can tell.
    """
    session = channel.session
    for attempt in count(1):
        try:
            await insist(session.commit_transaction, bound)
            return
        except asyncio.TimeoutError as error:
            raise _unknown() from error
        except PyMongoError as error:
            again = error.has_error_label(UNKNOWN_COMMIT)
            if not again and _means_not_committed(session, error):
                raise
            # MaxTimeMSExpired: the commit used up the time that max_commit_time_ms gave it.
            spent = isinstance(error, OperationFailure) and error.code == MAX_TIME_MS_EXPIRED
            if not again or spent or deadline.has_passed():
                raise _unknown() from error
            wait = deadline.backoff(attempt)
            _say_retried(channel, error, attempt, wait)
        await insist(lambda wait=wait: asyncio.sleep(wait), bound)  # type: ignore[misc]


def _say_retried(channel: SessionChannel, error: PyMongoError, attempt: int, wait: float) -> None:
    name = nameof(error)
    log(
        logging.INFO,
        "commit.retry",
        "The outcome of a commit is unknown (%s): it is sent again in %.3f s",
        name,
        wait,
        attempt=attempt,
        error=name,
        label=UNKNOWN_COMMIT,
        wait=wait,
    )
    if OBSERVERS and (scope := channel.scope) is not None:
        tell(lambda observer: observer.commit_retried(scope, error, attempt, wait))


def _means_not_committed(session: Session, error: PyMongoError) -> bool:
    """Tell whether an error without the label of an unknown outcome says what it seems to say."""
    if error.has_error_label(TRANSIENT):
        return True  # the server's word that there is no such transaction
    if isinstance(error, WriteConcernError):
        # The server commits first, and waits for the write concern then: an error of that one
        # means neither that it was committed for good nor that it was not.
        return False
    # Where the commit was sent before, that one may have been applied, and this error is about
    # the repetition.
    return DRIVER.commits_sent(session) < 2


def _unknown() -> CommitUnknownError:
    return CommitUnknownError(
        "The commit was sent, and no answer says whether it was applied. Read the data before "
        "doing the work again: it may be there. (The scope's refresh() reads its documents.)"
    )


async def abort(channel: SessionChannel, bound: float) -> None:
    """Abort the transaction of a channel's session; never raise what that comes to.

    The server aborts by itself what it is not told to commit, and what the user must see is
    the exception that left the block.

    Args:
        channel: The channel, closed or with its lock held.
        bound: How long to go on when the loop is shut down, and to try again where there is no
            connection, in seconds.
    """
    session = channel.session

    def kill() -> Awaitable[Any]:
        return DRIVER.kill_session(session.client, session.session_id)

    def begin() -> Awaitable[Any]:
        if session.in_transaction:
            return session.abort_transaction()  # type: ignore[no-any-return]
        # The driver takes a transaction for aborted also where it was interrupted.
        return kill()

    try:
        with DRIVER.noting_lost_abort(session) as lost:
            await insist(begin, bound)
        if channel.interrupted or lost:
            # The abort did not reach the server; or what the driver abandoned may begin there
            # only now, and not even an abort that came before it is an end to it. (For the
            # driver it is over: the session may be in another transaction meanwhile.)
            await _until_connected(kill, bound)
    except (PyMongoError, asyncio.TimeoutError) as error:
        name = nameof(error)
        log(
            logging.WARNING,
            "abort.failed",
            "Aborting a transaction failed: %s",
            name,
            error=name,
        )


async def _until_connected(begin: Callable[[], Awaitable[Any]], bound: float) -> None:
    """Run a step of the clean-up, again while connections are lost.

    Args:
        begin: Starts the step.
        bound: For how long it is tried again, in seconds.

    Raises:
        ConnectionFailure: If there is no connection even then.
    """
    deadline = Deadline(bound)
    for attempt in count(1):
        try:
            await insist(begin, bound)
            return
        except ConnectionFailure:
            if deadline.has_passed():
                raise
        wait = deadline.backoff(attempt)
        await insist(lambda wait=wait: asyncio.sleep(wait), bound)  # type: ignore[misc]


def is_rollback(exc: BaseException | None) -> bool:
    """Tell whether an exception is a ``Rollback``, or a group of nothing else."""
    inner = getattr(exc, "exceptions", ())
    return isinstance(exc, Rollback) or (bool(inner) and all(map(is_rollback, inner)))


def is_transient(
    error: BaseException,
    own: BaseException | None = None,
    foreign: Collection[BaseException] = (),
) -> bool:
    """Tell whether a transaction may be run again after an error.

    Args:
        error: The error; of a group of errors, all must allow it.
        own: The error that ended the transaction: it is a reason, wherever it was met.
        foreign: Errors that are the outcome of other transactions: no reason for this one.
    """
    causes = list(_causes(error))
    belongs = own is not None and any(each is own for each in causes)
    if not belongs and any(each is other for each in causes for other in foreign):
        return False
    inner: tuple[BaseException, ...] = getattr(error, "exceptions", ())
    if inner:
        return all(is_transient(each, own, foreign) for each in inner)
    if any(isinstance(each, (CommitUnknownError, TransactionExpiredError)) for each in causes):
        return False
    has_label: Callable[[str], bool] | None = getattr(error, "has_error_label", None)
    return has_label is not None and has_label(TRANSIENT)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__
