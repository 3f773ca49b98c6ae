"""What telemetry has recorded, read from OpenTelemetry's in-memory exporters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from opentelemetry.instrumentation.pymongo import CommandTracer
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

PREFIX = "beanie_session_scope."


class Recorded:
    """Spans and metrics, and the providers that lead here.

    Attributes:
        commands: A listener for a driver's client, which makes a span of every command, as
            OpenTelemetry's own instrumentation of PyMongo does.
    """

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self.tracers = TracerProvider()
        self.tracers.add_span_processor(SimpleSpanProcessor(self._exporter))
        self._reader = InMemoryMetricReader()
        self.meters = MeterProvider([self._reader])
        self.tracer = self.tracers.get_tracer("application")
        self.commands = CommandTracer(self.tracers.get_tracer("driver"))

    def clear(self) -> None:
        """Forget the spans."""
        self._exporter.clear()

    @property
    def spans(self) -> list[ReadableSpan]:
        """All spans that have ended, in this order."""
        return list(self._exporter.get_finished_spans())

    @property
    def transactions(self) -> list[ReadableSpan]:
        """The spans of transactions, by their start."""
        found = [span for span in self.spans if span.name == "transaction"]
        return sorted(found, key=lambda span: span.start_time or 0)

    @property
    def transaction(self) -> ReadableSpan:
        """The only span of a transaction."""
        (span,) = self.transactions
        return span

    def under(self, parent: ReadableSpan | None) -> list[str]:
        """Return the names of the spans right under one, or of those without a parent."""
        context = parent and parent.context
        wanted = context and context.span_id
        return [
            span.name.removeprefix("beanie_session_scope_tests.").removeprefix("admin.")
            for span in sorted(self.spans, key=lambda span: span.start_time or 0)
            if (span.parent and span.parent.span_id) == wanted
        ]

    def metric(self, name: str) -> list[tuple[Mapping[str, Any], Any]]:
        """Return the attributes and the value, or count, of each point of a metric."""
        data = self._reader.get_metrics_data()
        return [
            (dict(point.attributes or {}), getattr(point, "count", getattr(point, "value", None)))
            for resource in (data.resource_metrics if data else ())
            for scope in resource.scope_metrics
            for metric in scope.metrics
            if metric.name == PREFIX + name
            for point in metric.data.data_points
        ]


def about(span: ReadableSpan) -> dict[str, Any]:
    """Return the attributes of a span, without the prefix of the package's own."""
    return {name.removeprefix(PREFIX): value for name, value in (span.attributes or {}).items()}


def events(span: ReadableSpan) -> list[tuple[str, dict[str, Any]]]:
    """Return the events of a span, and their attributes, but for how long was waited."""
    return [
        (
            event.name.removeprefix(PREFIX),
            {
                name.removeprefix(PREFIX): value
                for name, value in (event.attributes or {}).items()
                if name != f"{PREFIX}wait"
            },
        )
        for event in span.events
    ]
