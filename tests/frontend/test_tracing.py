"""Spans of attempts below vLLM's span of the request, with their own times, and moves as its events."""

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from cascadeinfer.frontend.tracing import Tracing
from cascadeinfer.runtime.streams import Journey, Visit

JOURNEY = Journey(
    "cmpl-1-ab",
    [
        Visit("0", "dispatched", "", 100.0, 101.0),
        Visit("1", "moved", "outgrew_stage", 101.25, 102.0),
        Visit("1", "dispatched again", "", 103.0, 104.0),
    ],
)


class Processor:
    """vLLM's output processor, as far as tracing goes: it makes a span when told that a request has ended."""

    def __init__(self, provider: TracerProvider) -> None:
        self.request_states: dict[str, Any] = {}
        self._tracer = provider.get_tracer("vllm.llm_engine")

    def do_tracing(self, *_: Any) -> None:
        """As vLLM does: afterwards, with the time of the arrival."""
        self._tracer.start_span("llm_request", start_time=int(99e9)).end()


@pytest.fixture
def spans() -> InMemorySpanExporter:
    """What has been exported."""
    return InMemorySpanExporter()


@pytest.fixture
def processor(spans: InMemorySpanExporter) -> Processor:
    """With a provider that exports at once."""
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    processor = Processor(provider)
    processor.tracing = Tracing(processor, provider)  # type: ignore[arg-type, attr-defined]
    return processor


def test_attempts_are_below_the_request(processor: Any, spans: InMemorySpanExporter) -> None:
    """One span each, with instance, reason and times; a move is an event, a new attempt in its place is not."""
    processor.request_states["cmpl-1-ab"] = state = SimpleNamespace()
    processor.tracing.note("cmpl-1-ab", JOURNEY)
    processor.tracing.note("gone", JOURNEY)
    processor.do_tracing(None, state, None)
    *attempts, request = sorted(spans.get_finished_spans(), key=lambda span: span.name)
    assert request.name == "llm_request"
    assert [span.name for span in attempts] == ["cascade.attempt"] * 3
    for span, visit in zip(attempts, JOURNEY.visits, strict=True):
        assert span.parent.span_id == request.context.span_id
        assert span.context.trace_id == request.context.trace_id
        assert (span.start_time, span.end_time) == (int(visit.began_s * 1e9), int(visit.ended_s * 1e9))
        assert span.attributes["cascade.instance"] == visit.instance_id
        assert span.attributes["cascade.how"] == visit.how
        assert span.attributes["cascade.reason"] == visit.reason
    [move] = request.events
    assert (move.name, move.timestamp) == ("cascade.move", int(101.25e9))
    assert move.attributes["cascade.from"], move.attributes["cascade.to"] == ("0", "1")


def test_other_spans_are_left_alone(processor: Any, spans: InMemorySpanExporter) -> None:
    """A request that is not ours, and the one after ours, have no attempts."""
    ours, other = SimpleNamespace(), SimpleNamespace()
    processor.request_states["cmpl-1-ab"] = ours
    processor.tracing.note("cmpl-1-ab", JOURNEY)
    processor.do_tracing(None, ours, None)
    spans.clear()
    processor.do_tracing(None, other, None)
    assert [span.name for span in spans.get_finished_spans()] == ["llm_request"]
