"""
Translates resumed requests for the V1 model runner.

The runner knows prompt ids only: the data of a new request is rewritten to hold all ids, `min_tokens` is shifted, and
the output counts sent to it later (it rebuilds its state from them after a preemption or a skipped step) exclude the
tokens that came with the request. Everything that may fail is done when the request arrives; nothing may fail while a
step is made.
"""

from dataclasses import dataclass

from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import Request


@dataclass(slots=True)
class _Resumed:
    """A resumed request: the output tokens it brought along, and what the runner gets with its first step."""

    n_brought: int
    unseen: Request | None
    sampling_params: SamplingParams | None


class V1Terms:
    """The live resumed requests of this instance."""

    def __init__(self) -> None:
        """Start empty."""
        self._resumed: dict[str, _Resumed] = {}

    def came(self, request: Request, n_brought: int) -> None:
        """Record a request that arrived with output tokens."""
        sampling_params = request.sampling_params
        if sampling_params is not None and sampling_params.min_tokens:
            sampling_params = sampling_params.clone()
            sampling_params.min_tokens = max(0, sampling_params.min_tokens - n_brought)
        self._resumed[request.request_id] = _Resumed(n_brought, request, sampling_params)

    def rewrite(self, scheduler_output: SchedulerOutput) -> None:
        """Rewrite a step that is about to be sent to the runner."""
        if not self._resumed:
            return
        for new_request in scheduler_output.scheduled_new_reqs:
            resumed = self._resumed.get(new_request.req_id)
            if resumed is None or resumed.unseen is None:
                continue
            new_request.prompt_token_ids = list(resumed.unseen.all_token_ids)
            new_request.sampling_params = resumed.sampling_params
            resumed.unseen = None
        cached = scheduler_output.scheduled_cached_reqs
        for index, request_id in enumerate(cached.req_ids):
            resumed = self._resumed.get(request_id)
            if resumed is not None:
                cached.num_output_tokens[index] -= resumed.n_brought

    def forget(self, request_id: str) -> None:
        """Forget a request that has finished."""
        self._resumed.pop(request_id, None)
