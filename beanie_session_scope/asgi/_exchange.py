"""One request and its response, in one scope.

The scope is left when the application starts its response, and before that start is sent on. It
may be another task that sends it (Starlette streams in a task of its own). What comes after the
start runs outside, the body and the background tasks included.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from contextlib import suppress
from contextvars import Context
from typing import Any

from beanie_session_scope import (
    CommitUnknownError,
    HookError,
    Rollback,
    ScopeState,
    SessionScope,
    TransactionExpiredError,
    UnexpectedRollbackError,
)

from ._problems import ABORTED, TRANSIENT, UNKNOWN, Problem
from ._receiver import Receiver
from ._types import BODY, START, ASGIApp, HTTPScope, Message, Receive, Send, ShouldCommit

CLIENT_CLOSED_REQUEST = 499
"""What nginx, and others after it, log for a client that did not wait for its response."""

logger = logging.getLogger("beanie_session_scope")


class ClientDisconnectedError(ConnectionResetError):
    """What ``send`` raises for a request whose transaction was aborted with its connection.

    ASGI specification, "Disconnected Client - send exception": a subclass of ``OSError``.
    """


class Exchange:
    """A request that runs in a scope, up to its response.

    Args:
        scope: The scope, entered.
        http: The scope of ASGI.
        receive: The server's.
        send: The server's.
        should_commit: Decides about the transaction by the status of the response.
    """

    def __init__(
        self,
        scope: SessionScope,
        http: HTTPScope,
        receive: Receive,
        send: Send,
        should_commit: ShouldCommit,
    ) -> None:
        self._scope = scope
        self._http = http
        self._send = send
        self._should_commit = should_commit
        self._receiver = Receiver(receive, self._client_gone)
        self._task: asyncio.Task[Any] | None = None
        self._cancelling: Callable[[], int] = lambda: 0
        self._cancelled_before = 0
        # None: the scope is open. Not set: it is being left.
        self._left: asyncio.Event | None = None
        self._leaving = False
        # What send() raises from now on, and the answer that is still due.
        self._error: BaseException | None = None
        self._problem: Problem | None = None
        self._answered = False
        self._dropping = False

    async def run(self, app: ASGIApp, outside: Context) -> None:
        """Run the application to its end.

        Args:
            app: The application.
            outside: A context in which nothing is bound.

        Raises:
            BaseException: What the application raises, unless a commit had failed before.
        """
        task = self._task = asyncio.current_task()
        self._cancelling = getattr(task, "cancelling", lambda: 0)  # from Python 3.11 on
        self._cancelled_before = self._cancelling()
        try:
            expects = any(name.lower() == b"expect" for name, _ in self._http.get("headers", ()))
            self._receiver.start(outside, at_once=not expects)
            await self._run(app)
        finally:
            if self._gone and self._cancelling() > self._cancelled_before:
                task.uncancel()  # type: ignore[union-attr]
            await self._receiver.stop()

    async def _run(self, app: ASGIApp) -> None:
        try:
            await app(self._http, self.receive, self.send)
        except BaseException as error:
            await self._end(error)
            if not self._is_settled(error):
                raise
        else:
            await self._end(Rollback())
        finally:
            self._scope.forget()
        if self._gone:
            # Nobody reads it. But middleware around this one may want an answer, or count it.
            with suppress(OSError):
                await self._send({"type": START, "status": CLIENT_CLOSED_REQUEST, "headers": []})
                await self._send({"type": BODY, "body": b""})

    def _is_settled(self, error: BaseException) -> bool:
        """Tell whether what the application raised is only what it was made to raise."""
        if isinstance(error, asyncio.CancelledError):
            return self._gone and self._cancelling() <= self._cancelled_before + 1
        # After an answer of the middleware's own, nobody waits for what else there is.
        return (self._answered and isinstance(error, Exception)) or error is self._error

    async def _end(self, error: BaseException) -> None:
        """Abort, where the application has ended without a response."""
        if self._left is None:
            if self._error is None:
                self._error = RuntimeError("A response was started after the application's end.")
            self._left = asyncio.Event()
            try:
                await self._abort(error)
            finally:
                self._left.set()

    @property
    def _gone(self) -> bool:
        return isinstance(self._error, ClientDisconnectedError)

    def _client_gone(self) -> None:
        """End the application: nobody reads what it would answer."""
        if self._left is None:
            self._error = ClientDisconnectedError(
                "The client has disconnected, so the transaction of the request was aborted."
            )
            if self._task is not None:
                self._task.cancel()

    async def receive(self) -> Message:
        """Return the next message of the client."""
        try:
            return await self._receiver.receive()
        finally:
            # A task of the application may have sent the start, and so have left the scope, while
            # the one that entered it was waiting here, as with Starlette's streaming responses.
            self._scope.forget()

    async def send(self, message: Message) -> None:
        """Send a message on, after the transaction has ended where it starts the response.

        Raises:
            ClientDisconnectedError: If the client has gone, and the transaction with it.
            Exception: The error of a failed commit, so that the application ends.
        """
        if message["type"] == START and self._left is None and self._error is None:
            status = message["status"]
            self._left = asyncio.Event()
            try:
                await self._conclude(status)
                await self._pass_on(message)
            finally:
                self._left.set()
            return
        if self._left is not None:
            await self._left.wait()  # for the start that another task sends
        await self._pass_on(message)

    async def _pass_on(self, message: Message) -> None:
        if self._error is None:
            await self._send(message)
        else:
            await self._refuse(self._error, message["type"] == START)

    async def _conclude(self, status: int) -> None:
        """Commit or abort; what comes of it is in the attributes."""
        self._receiver.release()
        try:
            if self._decide(status):
                await self._commit()
            else:
                await self._abort(Rollback())
        except BaseException as error:
            # Cancelled, as a rule: what had begun was waited for, and the state tells its outcome.
            if not self._leaving:
                await self._abort(error)
            # Should the application go on and answer once more, that must be no success.
            if self._scope.state is not ScopeState.COMMITTED:
                self._problem = self._problem_after(error)
                self._error = UnexpectedRollbackError(
                    "The end of this request's transaction was cancelled, so its response may "
                    "not be true."
                )
            raise

    def _decide(self, status: int) -> bool:
        try:
            commit = self._should_commit(status, self._http)
            if not isinstance(commit, bool):
                raise TypeError(
                    "should_commit must return True or False, and has returned a "
                    f"{type(commit).__name__}."
                )
        except Exception as error:
            self._fail(error, ABORTED, "asgi.should_commit.failed", "should_commit has failed")
            return False
        return commit

    async def _commit(self) -> None:
        self._leaving = True
        try:
            rolled_back = await self._scope.__aexit__(None, None, None)
        except HookError as error:
            if not error.committed:
                self._fail_commit(error)
            else:
                # What the response says is true.
                self._log_hooks(error)
        except Exception as error:
            self._fail_commit(error)
        else:
            if rolled_back:
                self._fail_commit(
                    UnexpectedRollbackError(
                        "A before_commit hook has rolled the transaction of the request back."
                    )
                )

    async def _abort(self, error: BaseException) -> None:
        self._leaving = True
        try:
            await self._scope.__aexit__(type(error), error, error.__traceback__)
        except HookError as failed:
            self._log_hooks(failed)

    def _problem_after(self, error: BaseException) -> Problem:
        """Return what the client may know of a failed commit."""
        # OPEN: its end has gone to the background before it could begin.
        undecided = self._scope.state in (
            ScopeState.OPEN,
            ScopeState.COMMITTING,
            ScopeState.UNKNOWN,
        )
        # What commit() in the endpoint has stored stays, and must not be done once more.
        if undecided or self._scope.has_committed or isinstance(error, CommitUnknownError):
            return UNKNOWN
        has_label: Callable[[str], bool] | None = getattr(error, "has_error_label", None)
        if has_label is None or not has_label("TransientTransactionError"):
            return ABORTED
        # These keep the labels of the driver's error, and another attempt would end like this one.
        lasting = (CommitUnknownError, TransactionExpiredError)
        return ABORTED if any(isinstance(each, lasting) for each in _causes(error)) else TRANSIENT

    def _fail_commit(self, error: Exception) -> None:
        self._fail(
            error,
            self._problem_after(error),
            "asgi.commit.failed",
            "The commit at the end of a request has failed, and its response was dropped",
        )

    def _fail(self, error: Exception, problem: Problem, event: str, message: str) -> None:
        self._error, self._problem = error, problem
        name = type(error).__name__
        extra = {"event": event, "error": name, "status": problem.status.value}
        logger.error("%s: %s", message, name, extra=extra)

    @staticmethod
    def _log_hooks(error: HookError) -> None:
        names = ", ".join(type(each).__name__ for each in error.errors)
        outcome = "committed" if error.committed else "aborted"
        extra = {"event": "hooks.failed", "errors": len(error.errors)}
        logger.error("Hooks failed after a request was %s: %s", outcome, names, extra=extra)

    async def _refuse(self, error: BaseException, starts: bool) -> None:
        """Send nothing of the application on; let it end, but for the answer to its end.

        Raises:
            BaseException: Why, unless this belongs to a response that follows upon it.
        """
        if starts and self._problem is not None:
            await self._answer(self._problem)
            raise error
        if starts and self._answered:
            self._dropping = True  # an error handler's, which may come to its end
        elif not self._dropping:
            raise error

    async def _answer(self, problem: Problem) -> None:
        self._problem = None
        with suppress(OSError):  # the client has gone
            for message in problem.messages(head=self._http["method"] == "HEAD"):
                await self._send(message)
        self._answered = True


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__
