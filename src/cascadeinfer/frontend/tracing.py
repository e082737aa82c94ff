"""
OpenTelemetry: one span per attempt of a request, with instance and reason, below vLLM's span of the request.

vLLM makes the span `llm_request` when a request has ended, with the times it had; so nothing could hang below it
before. A span processor adds the attempts at that moment: children with their own times, and an event in vLLM's span
for each move. Requests that are aborted or refused have no span of vLLM's, and none of ours.

Switched on by `--otlp-traces-endpoint`; the service is called `cascadeinfer` unless OTEL_SERVICE_NAME says otherwise.
"""

import itertools
from typing import Any, Final

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor, TracerProvider
from vllm.v1.engine.output_processor import OutputProcessor

from cascadeinfer import __version__
from cascadeinfer.core.types import RequestId
from cascadeinfer.runtime.streams import Journey

SERVICE: Final = "cascadeinfer"
REQUEST_SPAN: Final = "llm_request"
ATTEMPT_SPAN: Final = "cascade.attempt"
MOVE_EVENT: Final = "cascade.move"
JOURNEY: Final = "cascade_journey"
"""The attribute in which vLLM's state of a request carries the journey to its end."""


def nanoseconds(seconds: float) -> int:
    """Seconds since 1970 as OpenTelemetry counts them."""
    return int(seconds * 1e9)


class AttemptSpans(SpanProcessor):
    """
    See the module header.

    Attributes:
        journey: Of the request whose span is being made; None: of another.
    """

    def __init__(self, provider: TracerProvider) -> None:
        """
        Args:
            provider: Makes vLLM's spans, and ours.
        """
        self.journey: Journey | None = None
        self._tracer = provider.get_tracer(SERVICE, __version__)

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:  # noqa: ARG002 - the signature
        """See SpanProcessor: vLLM's span begins, or one of ours."""
        if self.journey is None or span.name != REQUEST_SPAN:
            return
        journey, self.journey = self.journey, None
        below = trace.set_span_in_context(span)
        for number, visit in enumerate(journey.visits):
            attempt = self._tracer.start_span(
                ATTEMPT_SPAN,
                below,
                start_time=nanoseconds(visit.began_s),
                attributes={
                    "cascade.request_id": journey.request_id,
                    "cascade.instance": visit.instance_id,
                    "cascade.attempt": number,
                    "cascade.how": visit.how,
                    "cascade.reason": visit.reason,
                },
            )
            attempt.end(None if visit.ended_s is None else nanoseconds(visit.ended_s))
        for left, came in itertools.pairwise(journey.visits):
            if left.instance_id != came.instance_id:
                where = {"cascade.from": left.instance_id, "cascade.to": came.instance_id}
                why = {"cascade.how": came.how, "cascade.reason": came.reason}
                span.add_event(MOVE_EVENT, {**where, **why}, nanoseconds(came.began_s))

    def on_end(self, span: ReadableSpan) -> None:
        """See SpanProcessor."""


class Tracing:
    """Carries each request's journey to the moment in which vLLM makes its span."""

    def __init__(self, processor: OutputProcessor, provider: TracerProvider) -> None:
        """
        Args:
            processor: Of the `AsyncLLM`; its way to make a span is wrapped.
            provider: Makes the spans.
        """
        self._processor = processor
        self._spans = AttemptSpans(provider)
        provider.add_span_processor(self._spans)
        self._make_span = processor.do_tracing
        processor.do_tracing = self._with_attempts

    def note(self, request_id: RequestId, journey: Journey) -> None:
        """A request is on its way."""
        if (state := self._processor.request_states.get(request_id)) is not None:
            setattr(state, JOURNEY, journey)

    def _with_attempts(self, engine_core_output: Any, req_state: Any, iteration_stats: Any) -> None:
        self._spans.journey = getattr(req_state, JOURNEY, None)
        try:
            self._make_span(engine_core_output, req_state, iteration_stats)
        finally:
            self._spans.journey = None


def traced(processor: OutputProcessor) -> Tracing | None:
    """Trace the attempts of this processor's requests; None where vLLM's own tracing has not been set up."""
    provider = trace.get_tracer_provider()
    return Tracing(processor, provider) if isinstance(provider, TracerProvider) else None
