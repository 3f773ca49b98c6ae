"""The spans, and how they come into the context and out of it again."""

from __future__ import annotations

import time
from typing import Any
from weakref import finalize

from opentelemetry import context, trace

from beanie_session_scope import ScopeState

from ._attributes import OPERATIONS, OUTCOME


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

    target: trace.Span = trace.INVALID_SPAN

    def __init__(self, around: trace.Span) -> None:
        self.around = self.target = around

    def __getattr__(self, name: str) -> Any:
        """Return what the span of an SDK has besides: its name and attributes, for processors."""
        return getattr(self.target, name)

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
        self.target.record_exception(exception, attributes, timestamp, escaped)

    def end(self, end_time: int | None = None) -> None:
        """Do nothing: what it stands for is ended by who has started it."""


class Entry:
    """What is known of a scope from its entry to the end of its last transaction.

    Attributes:
        began: When the scope was entered, in seconds of a monotonic clock.
        before: The context around it.
        ended: The outcome of the span's transaction, its operations and when it ended, in
            nanoseconds since 1970; ``None`` while it is open.
        failure: What is recorded of the error that ended the transaction; ``None`` where none did.
        left: Whether the block was left.
        place: What stands for the transaction's span in the context.
        span: The span of the transaction.
        waits: Where the span waits for the next attempt: ends it, should that one never come.
        within: The context of the block; ``before``, where it runs no transaction.
    """

    __slots__ = (
        "before",
        "began",
        "ended",
        "failure",
        "left",
        "place",
        "span",
        "waits",
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
        self.waits: finalize[..., Any] | None = None

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
        self.span = span
        self.ended = None
        if span.get_span_context().is_valid:  # else there is no SDK, and nothing to sit under
            self.place.target = span

    def end(self) -> None:
        """End the span, and say how the transaction ended."""
        span, self.span = self.span, None
        self.place.target = self.place.around
        if span is None:
            return
        if self.ended is None:
            span.end()
            return
        outcome, operations, at = self.ended
        span.set_attributes({OUTCOME: outcome.value, OPERATIONS: operations})
        if self.failure is not None:
            span.set_status(trace.StatusCode.ERROR)
            span.set_attributes(self.failure)
        span.end(at)


def _open_span(span: trace.Span) -> trace.Span:
    """Return a span, or what one stands for that was left in the context by a scope that is over.

    An abandoned generator leaves it there; one after the other, they must not make a chain.
    """
    while isinstance(span, ScopeSpan) and span.target is span.around:
        span = span.around
    return span
