"""Traces: a span a request and a span a stage, sent by OTLP over HTTP where an endpoint is set.

OpenTelemetry's own variables say where (OTEL_EXPORTER_OTLP_ENDPOINT), as whom (OTEL_SERVICE_NAME)
and how many (OTEL_TRACES_SAMPLER). Without an endpoint nothing of it is imported, nor recorded.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.util.types import AttributeValue

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")

StageName: TypeAlias = Literal["receive", "tokenize", "queue", "compute"]


class Stage(NamedTuple):
    """One of the things that happen to a document, on the monotonic clock in seconds.

    While a document streams in they go on side by side, each now and then.
    """

    name: StageName
    began: float
    ended: float
    busy_s: float
    """How much of that time went into it."""


class Span(NamedTuple):
    """A request that was answered."""

    name: str
    began: float
    attributes: Mapping[str, AttributeValue]
    stages: Sequence[Stage]
    failed: bool


_provider: TracerProvider | None = None


def check() -> None:
    """Raises ValueError if an endpoint is set and what sends to it is not installed."""
    if _wanted():
        try:
            import opentelemetry.exporter.otlp.proto.http.trace_exporter  # noqa: F401
        except ImportError:
            variable = next(filter(os.environ.get, ENDPOINTS))
            raise ValueError(f"{variable} is set: install gma-service[traces]") from None


def start() -> None:
    """Record from now on, if an endpoint is set."""
    global _provider
    if not _wanted():
        return
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    resource = Resource.create({"service.name": os.environ.get("OTEL_SERVICE_NAME", "gma")})
    _provider = TracerProvider(resource=resource)
    _provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))


def stop() -> None:
    """Send what was recorded, and record no more."""
    global _provider
    if _provider:
        _provider.shutdown()
        _provider = None


def flush() -> None:
    """Send what was recorded."""
    if _provider:
        _provider.force_flush()


def record(span: Span, headers: Mapping[str, str]) -> str | None:
    """A request that ends now, below the span that its W3C `traceparent` header names.

    Returns the trace's id in hexadecimal, or None if it is not recorded.
    """
    if not _provider:
        return None
    from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    # Spans are on the wall's clock, and what they tell was measured on the monotonic one.
    offset = time.time() - time.monotonic()

    def at(seconds: float) -> int:
        return int((seconds + offset) * 1e9)

    tracer = _provider.get_tracer("service")
    above = TraceContextTextMapPropagator().extract(headers)
    whole = tracer.start_span(
        span.name,
        above,
        SpanKind.SERVER,
        span.attributes,
        start_time=at(span.began),
    )
    if span.failed:
        whole.set_status(Status(StatusCode.ERROR))
    for stage in span.stages:
        part = tracer.start_span(
            stage.name,
            set_span_in_context(whole),
            attributes={"gma.busy_seconds": stage.busy_s},
            start_time=at(stage.began),
        )
        part.end(at(stage.ended))
    whole.end()
    context = whole.get_span_context()
    return format(context.trace_id, "032x") if context.trace_flags.sampled else None


def _wanted() -> bool:
    return any(map(os.environ.get, ENDPOINTS)) and os.environ.get("OTEL_SDK_DISABLED") != "true"
