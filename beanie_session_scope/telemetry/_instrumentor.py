"""Turning telemetry on and off."""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib.metadata import version

from opentelemetry import metrics, trace

from beanie_session_scope import observe

from ._attributes import NAME
from ._observer import Telemetry

logger = logging.getLogger("beanie_session_scope.telemetry")


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
        *,
        skip_dep_check: bool = True,
    ) -> None:
        """Make spans and metrics of every scope that is entered from now on.

        Where it is on already this changes nothing, and is logged.

        Args:
            tracer_provider: Where the spans go; ``None`` means the global provider, also one that
                is set later.
            meter_provider: Where the metrics go; ``None`` as above.
            skip_dep_check: Without a meaning here: the ``opentelemetry-instrument`` command passes
                it to every instrumentation.

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

    def uninstrument(self) -> None:
        """Turn telemetry off; spans that are open end now, without an outcome."""
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
