"""What becomes a span, an event or a metric."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from weakref import WeakKeyDictionary, finalize

from opentelemetry import metrics, trace

from beanie_session_scope import (
    ScopeObserver,
    ScopeState,
    SessionScope,
    TransactionAttempt,
    TransactionAttempts,
)

from ._attributes import (
    ATTEMPT,
    ATTEMPTS,
    COMMIT_RETRY,
    NAME,
    OUTCOME,
    PROPAGATION,
    RETRY,
    WAIT,
    describe,
    is_failure,
    kind,
)
from ._spans import Entry

# What OpenTelemetry's conventions for databases advise for durations, in seconds, and up to the
# lifetime that a server gives a transaction.
BOUNDARIES = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 60.0)


class Telemetry(ScopeObserver):
    """Makes spans and metrics of what it is told.

    Args:
        tracer: Starts the spans.
        meter: Makes the instruments.
    """

    def __init__(self, tracer: trace.Tracer, meter: metrics.Meter) -> None:
        self._tracer = tracer
        self._entries: WeakKeyDictionary[SessionScope, Entry] = WeakKeyDictionary()
        # The attempt that failed last, of those that are run again.
        self._waiting: WeakKeyDictionary[TransactionAttempts, Entry] = WeakKeyDictionary()
        self._active = meter.create_up_down_counter(
            f"{NAME}.active_scopes", "{scope}", "Scopes that are open."
        )
        self._scopes = _durations(meter, "scope.duration", "How long scopes were open.")
        self._transactions = _durations(
            meter, "transaction.duration", "How long transactions took."
        )
        self._locks = _durations(
            meter, "lock.wait_time", "How long operations waited for another one on their session."
        )
        self._retries = meter.create_counter(
            f"{NAME}.retries", "{retry}", "Attempts of transactions that were run again."
        )
        self._commit_retries = meter.create_counter(
            f"{NAME}.commit.retries", "{retry}", "Commits of unknown outcome that were sent again."
        )

    # -- what happens in the block ---------------------------------------------------------

    def scope_entered(self, scope: SessionScope) -> None:
        """Count it, and let the operations in it belong to it."""
        entry = self._entries[scope] = Entry()
        self._active.add(1)
        if scope.options.transaction:
            entry.enter()

    def transaction_started(self, scope: SessionScope) -> None:
        """Start a span, or go on with the one of the attempt before."""
        entry = self._entries.get(scope)
        if entry is None:
            return  # it was entered before there was telemetry
        entry.end()  # the transaction that was ended by commit() or abort() in the block
        failed = self._take_waiting(scope)
        if failed is not None and failed.span is not None:
            span, failed.span = failed.span, None
        else:
            attributes = {"db.system.name": "mongodb", PROPAGATION: scope.options.propagation}
            span = self._tracer.start_span(
                "transaction", entry.before, trace.SpanKind.CLIENT, attributes
            )
        entry.start(span)
        if isinstance(scope, TransactionAttempt):
            span.set_attribute(ATTEMPTS, scope.number)
            span.add_event(ATTEMPT, {ATTEMPT: scope.number})

    def lock_waited(self, scope: SessionScope | None, seconds: float) -> None:
        """Record it."""
        self._locks.record(seconds)

    def commit_retried(
        self, scope: SessionScope, error: BaseException, attempt: int, wait: float
    ) -> None:
        """Count it; an event of the transaction's span."""
        self._commit_retries.add(1, kind(error))
        entry = self._entries.get(scope)
        if entry is not None and entry.span is not None:
            entry.span.add_event(COMMIT_RETRY, {ATTEMPT: attempt, WAIT: wait, **describe(error)})

    # -- how it ends -----------------------------------------------------------------------

    def transaction_ended(
        self,
        scope: SessionScope,
        outcome: ScopeState,
        seconds: float,
        operations: int,
        error: BaseException | None,
    ) -> None:
        """Record the outcome. What comes next belongs to the span around the scope."""
        self._transactions.record(seconds, {OUTCOME: outcome.value})
        entry = self._entries.get(scope)
        if entry is None:
            return
        entry.place.target = entry.place.around
        entry.ended = outcome, operations, time.time_ns()
        entry.failure = describe(error) if is_failure(error) else None
        if entry.left and entry.waits is None:  # the clean-up went on in the background
            entry.end()

    def scope_left(
        self, scope: SessionScope, error: BaseException | None, retry_in: float | None
    ) -> None:
        """Restore the context. The span ends with its transaction, or waits for an attempt."""
        entry = self._entries.get(scope)
        if entry is None:
            return
        if not entry.left:
            entry.left = True
            entry.leave()
            self._active.add(-1)
            about = kind(error) if is_failure(error) else {}
            self._scopes.record(time.monotonic() - entry.began, about)
        if retry_in is not None and error is not None and isinstance(scope, TransactionAttempt):
            self._wait(scope, entry, error, retry_in)
            return
        self._take_waiting(scope)  # if it waited, that was in vain
        if entry.ended is not None:
            if entry.failure is not None and is_failure(error):
                entry.failure = describe(error)  # says more, as that the time is up
            entry.end()

    def _wait(
        self, scope: TransactionAttempt, entry: Entry, error: BaseException, wait: float
    ) -> None:
        """Keep the span of an attempt for the next one."""
        self._retries.add(1, kind(error))
        if entry.span is not None:
            about = {ATTEMPT: scope.number, WAIT: wait, **describe(error)}
            entry.span.add_event(RETRY, about)
        # Where the loop over the attempts is left meanwhile, nobody says so.
        loop = asyncio.get_running_loop()
        entry.waits = finalize(scope.attempts, _end_soon, loop, entry.end)
        entry.waits.atexit = False
        self._waiting[scope.attempts] = entry

    def _take_waiting(self, scope: SessionScope) -> Entry | None:
        """Return the attempt before, whose span is to be taken over or ended."""
        if not isinstance(scope, TransactionAttempt):
            return None
        entry = self._waiting.pop(scope.attempts, None)
        if entry is not None and entry.waits is not None:
            entry.waits.detach()
            entry.waits = None
        return entry

    def close(self) -> None:
        """End all spans that are open, for nobody will tell of their ends."""
        for entry in self._entries.values():
            entry.end()
            if not entry.left:
                self._active.add(-1)
        self._entries.clear()


def _durations(meter: metrics.Meter, name: str, description: str) -> metrics.Histogram:
    return meter.create_histogram(
        f"{NAME}.{name}", "s", description, explicit_bucket_boundaries_advisory=BOUNDARIES
    )


def _end_soon(loop: asyncio.AbstractEventLoop, end: Callable[[], None]) -> None:
    """Let a span end, from where the garbage collector calls.

    That may be anywhere, also where an exporter holds its lock, which ending a span takes.
    """
    with suppress(RuntimeError):  # the loop is closed
        loop.call_soon_threadsafe(end)
