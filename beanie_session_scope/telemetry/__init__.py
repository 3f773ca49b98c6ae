"""OpenTelemetry: a span for each transaction, and metrics of scopes.

::

    SessionScopeInstrumentor().instrument()

The span is the one that MongoDB's *OpenTelemetry* specification for drivers describes. It is named
``transaction``, and the spans of the operations in the transaction sit under it, whoever makes
those: the instrumentation of the driver, or the driver itself. The attempts of a retrying form
share one span, in which they are events.

Nothing that is recorded shows the message of an error, a connection string or the contents of a
document: of an error it is the class, the code and the labels.
"""

from __future__ import annotations

try:
    from ._instrumentor import SessionScopeInstrumentor
except ImportError as error:
    raise ImportError(
        "beanie_session_scope.telemetry needs the OpenTelemetry API, which is not installed: "
        "pip install 'beanie_session_scope[otel]'."
    ) from error

__all__ = ["SessionScopeInstrumentor"]
