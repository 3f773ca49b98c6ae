"""OpenTelemetry: a span for each transaction, and metrics of scopes.

::

    SessionScopeInstrumentor().instrument()

The span is the one that MongoDB's *OpenTelemetry* specification for drivers describes. It is named
``transaction``, and the spans of the operations in the transaction sit under it, whoever makes
those: the instrumentation of the driver, or the driver itself. The attempts of a retrying form share
one span, in which they are events.

Nothing that is recorded shows the message of an error, a connection string or the contents of a
document: of an error it is the class, the code and the labels.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from typing import Any
from weakref import WeakKeyDictionary, finalize

from beanie_session_scope import (
    Rollback,
    ScopeObserver,
    ScopeState,
    SessionScope,
    TransactionAttempt,
    TransactionAttempts,
    observe,
)

try:
    from opentelemetry import context, metrics, trace
except ImportError as error:
    raise ImportError(
        "beanie_session_scope.telemetry needs the OpenTelemetry API, which is not installed: "
        "pip install 'beanie_session_scope[otel]'."
    ) from error

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

# What OpenTelemetry's conventions for databases advise for durations, in seconds, and up to the
# lifetime that a server gives a transaction.
BOUNDARIES = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 60.0)

logger = logging.getLogger("beanie_session_scope.telemetry")


class ScopeSpan(trace.Span):
    """Stands in the context for the span that the operations of a scope belong under.

    Every task has a copy of the context in which it was started, and nobody can exchange what is
    in a copy. So the transaction's span is not put there itself, but this, which is it as long as
    the transaction is open, then the span of the next transaction in the block, and in the end,
    in hooks and in tasks that go on, the span around the scope.

    Attributes:
        around: The span around the scope.
        target: What it stands for now.
    """

    def __init__(self, around: trace.Span) -> None:
        self.around = self.target = around

    def get_span_context(self) -> trace.SpanContext:
        """Return the context of what it stands for."""
        return self.target.get_span_context()

    def is_recording(self) -> bool:
        """Tell whether what it stands for is recorded."""
        return self.target.is_recording()

    def set_attribute(self, key: str, value: Any) -> None:
        """Pass it on."""
        self.target.set_attribute(key, value)

    def set_attributes(self, attributes: Any) -> None:
        """Pass it on."""
        self.target.set_attributes(attributes)

    def add_event(self, name: str, attributes: Any = None, timestamp: int | None = None) -> None:
        """Pass it on."""
        self.target.add_event(name, attributes, timestamp)

    def add_link(self, context: trace.SpanContext, attributes: Any = None) -> None:
        """Pass it on."""
        self.target.add_link(context, attributes)

    def update_name(self, name: str) -> None:
        """Pass it on."""
        self.target.update_name(name)

    def set_status(self, status: Any, description: str | None = None) -> None:
        """Pass it on."""
        self.target.set_status(status, description)

    def record_exception(
        self,
        exception: BaseException,
        attributes: Any = None,
        timestamp: int | None = None,
        escaped: bool = False,
    ) -> None:
        """Pass it on."""
        self.target.record_exception(exception, attributes, timestamp, escaped)  # type: ignore[arg-type]

    def end(self, end_time: int | None = None) -> None:
        """Do nothing: what it stands for is ended by who has started it."""


class Entry:
    """What is known of a scope from its entry to the end of its last transaction.

    Attributes:
        began: When the scope was entered, in seconds of a monotonic clock.
        before: The context around it; ``None`` where it runs no transaction.
        ended: The outcome of the span's transaction, its operations and when it ended, in
            nanoseconds since 1970; ``None`` while it is open.
        failure: What is recorded of the error that left the block.
        left: Whether the block was left.
        place: What stands for the transaction's span in the context.
        span: The span of the transaction.
        within: The context of the block.
    """

    __slots__ = (
        "__weakref__",
        "began",
        "before",
        "ended",
        "failure",
        "left",
        "place",
        "span",
        "within",
    )

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.before = context.get_current()
        self.within = self.before
        self.place = ScopeSpan(_open_span(trace.get_current_span(self.before)))
        self.span: trace.Span | None = None
        self.ended: tuple[ScopeState, int, int] | None = None
        self.failure: dict[str, Any] | None = None
        self.left = False

    def enter(self) -> None:
        """Let what runs in the current context belong to the scope."""
        self.within = trace.set_span_in_context(self.place, self.before)
        context.attach(self.within)

    def leave(self) -> None:
        """Restore the context around the scope.

        A block may be left in a copy of the context in which it was entered, or in an unrelated
        one: an abandoned generator is, or what a web framework runs in a task of its own. Detaching
        the token of ``attach()`` fails there, which OpenTelemetry logs as an error. So the context
        around the scope is attached instead, wherever the block's own one is in force.
        """
        if context.get_current() is self.within is not self.before:
            context.attach(self.before)

    def start(self, span: trace.Span) -> None:
        """Take a span for the transaction that begins."""
        self.span = self.place.target = span
        self.ended = None

    def end(self) -> None:
        """End the span, and say how the transaction ended."""
        span, self.span = self.span, None
        self.place.target = self.place.around
        if span is None:
            return
        outcome, operations, at = self.ended or (None, 0, None)
        if outcome is not None:
            span.set_attributes({OUTCOME: outcome.value, OPERATIONS: operations})
        failed = self.failure is not None and outcome is not ScopeState.COMMITTED
        if failed or outcome is ScopeState.UNKNOWN:
            span.set_status(trace.StatusCode.ERROR)
            span.set_attributes(self.failure or {})
        span.end(at)


def _open_span(span: trace.Span) -> trace.Span:
    """Return a span, or what one stands for that was left in the context by a scope that is over.

    An abandoned generator leaves it there; one after the other, they must not make a chain.
    """
    while isinstance(span, ScopeSpan) and span.target is span.around:
        span = span.around
    return span


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
        self._waiting: WeakKeyDictionary[TransactionAttempts, tuple[Entry, Any]] = (
            WeakKeyDictionary()
        )
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
        self._commit_retries.add(1, _kind(error))
        entry = self._entries.get(scope)
        if entry is not None and entry.span is not None:
            entry.span.add_event(COMMIT_RETRY, {ATTEMPT: attempt, WAIT: wait, **_describe(error)})

    # -- how it ends -----------------------------------------------------------------------

    def transaction_ended(
        self, scope: SessionScope, outcome: ScopeState, seconds: float, operations: int
    ) -> None:
        """Record the outcome. What comes next belongs to the span around the scope."""
        self._transactions.record(seconds, {OUTCOME: outcome.value})
        entry = self._entries.get(scope)
        if entry is None:
            return
        entry.place.target = entry.place.around
        entry.ended = outcome, operations, time.time_ns()
        if entry.left:  # the clean-up went on in the background
            entry.end()

    def scope_left(
        self, scope: SessionScope, error: BaseException | None, retry_in: float | None
    ) -> None:
        """Restore the context. The span ends with the transaction, or waits for an attempt."""
        entry = self._entries.get(scope)
        if entry is None:
            return
        if not entry.left:
            entry.left = True
            entry.leave()
            self._active.add(-1)
            self._scopes.record(time.monotonic() - entry.began, _kind(error))
        entry.failure = None if _is_rollback(error) else _describe(error)
        if retry_in is not None and isinstance(scope, TransactionAttempt):
            self._wait(scope, entry, error, retry_in)
            return
        self._take_waiting(scope)  # if it waited, that was in vain
        if entry.ended is not None:
            entry.end()

    def _wait(
        self, scope: TransactionAttempt, entry: Entry, error: BaseException | None, wait: float
    ) -> None:
        """Keep the span of an attempt for the next one."""
        self._retries.add(1, _kind(error))
        if entry.span is not None:
            about = {ATTEMPT: scope.number, WAIT: wait, **_describe(error)}
            entry.span.add_event(RETRY, about)
        # Where the loop over the attempts is left meanwhile, nobody says so.
        loop = asyncio.get_running_loop()
        abandoned = finalize(scope.attempts, _end_soon, loop, entry.end)
        abandoned.atexit = False
        self._waiting[scope.attempts] = entry, abandoned

    def _take_waiting(self, scope: SessionScope) -> Entry | None:
        """Return the attempt before, whose span is to be taken over or ended."""
        if not isinstance(scope, TransactionAttempt):
            return None
        entry, abandoned = self._waiting.pop(scope.attempts, (None, None))
        if abandoned is not None:
            abandoned.detach()
        return entry

    def close(self) -> None:
        """End all spans that are open, for nobody will tell of their ends."""
        for entry, abandoned in list(self._waiting.values()):
            abandoned.detach()
            entry.end()
        for entry in list(self._entries.values()):
            entry.end()
            if not entry.left:
                self._active.add(-1)
        self._waiting.clear()
        self._entries.clear()


class SessionScopeInstrumentor:
    """Turns telemetry on and off, in the way of OpenTelemetry's instrumentations.

    There is one for the process: whichever instance is asked, it is about the same.
    """

    _instance: SessionScopeInstrumentor | None = None
    _stop: Callable[[], None] | None = None

    def __new__(cls) -> SessionScopeInstrumentor:
        """Return the one that there is."""
        if cls._instance is None:
            cls._instance = super().__new__(cls)
        return cls._instance

    @property
    def is_instrumented_by_opentelemetry(self) -> bool:
        """Whether telemetry is on."""
        return self._stop is not None

    def instrument(
        self,
        tracer_provider: trace.TracerProvider | None = None,
        meter_provider: metrics.MeterProvider | None = None,
        **options: object,
    ) -> None:
        """Make spans and metrics of every scope that is entered from now on.

        Where it is on already this changes nothing, and is logged.

        Args:
            tracer_provider: Where the spans go; ``None`` means the global provider, also one that
                is set later.
            meter_provider: Where the metrics go; ``None`` as above.
            options: Ignored: what the ``opentelemetry-instrument`` command passes to every
                instrumentation.

        Raises:
            TypeError: If one of them is no provider.
        """
        _check("tracer_provider", tracer_provider, trace.TracerProvider)
        _check("meter_provider", meter_provider, metrics.MeterProvider)
        if self._stop is not None:
            logger.warning("instrument() changes nothing: telemetry is on already")
            return
        release = version(NAME)
        telemetry = Telemetry(
            trace.get_tracer(NAME, release, tracer_provider),
            metrics.get_meter(NAME, release, meter_provider),
        )
        stop = observe(telemetry)

        def close() -> None:
            stop()
            telemetry.close()

        self._stop = close

    def uninstrument(self, **options: object) -> None:
        """Turn telemetry off; spans that are open end now, without an outcome.

        Args:
            options: Ignored, as above.
        """
        stop, self._stop = self._stop, None
        if stop is not None:
            stop()


def _check(name: str, provider: object, wanted: type) -> None:
    if provider is not None and not isinstance(provider, wanted):
        raise TypeError(
            f"{name} must be an OpenTelemetry {wanted.__name__}, and is a "
            f"{type(provider).__name__} object: pass one of opentelemetry.sdk, or leave it out for "
            "the global one."
        )


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


def _kind(error: BaseException | None) -> dict[str, Any]:
    """Return attributes that say what kind of error one is, for metrics."""
    if error is None:
        return {}
    attributes = {"error.type": type(error).__qualname__}
    code = getattr(error, "code", None)
    if isinstance(code, int):
        attributes["db.response.status_code"] = str(code)
    return attributes


def _describe(error: BaseException | None) -> dict[str, Any]:
    """Return attributes that say what an error means, and nothing of its message."""
    has_label: Callable[[str], bool] | None = getattr(error, "has_error_label", None)
    labels = [label for label in LABELS if has_label is not None and has_label(label)]
    return {**_kind(error), **({ERROR_LABELS: labels} if labels else {})}


def _is_rollback(error: BaseException | None) -> bool:
    """Tell whether no error is to be recorded: there is none, or all it says is to roll back."""
    inner = getattr(error, "exceptions", ())
    return (
        error is None
        or isinstance(error, Rollback)
        or (bool(inner) and all(map(_is_rollback, inner)))
    )
