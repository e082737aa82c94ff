"""Calls that go to all instances: one answer, whatever each of them says, and ids as they are listed."""

from types import SimpleNamespace
from typing import Any

import pytest

from cascadeinfer.core.errors import EngineError
from cascadeinfer.frontend.agreement import COMBINED, DisagreementError, combined
from cascadeinfer.frontend.engine_client import TO_ALL_INSTANCES, CascadeEngineClient, CascadeLLM


@pytest.mark.parametrize(
    ("method", "answers", "one"),
    [
        ("reset_prefix_cache_async", (True, False), False),
        ("is_scheduler_paused_async", (True, False), False),
        ("is_sleeping_async", (True, True), True),
        ("wake_up_async", (False, True), False),
        ("add_lora_async", (True, True), True),
        ("remove_lora_async", (False, True), True),
        ("list_loras_async", ({1, 2}, {2, 3}), {2}),
        ("collective_rpc_async", (["a"], ["b"]), ["a", "b"]),
        ("compute_weight_checksums_async", ([{"w": "1"}], [{"w": "2"}]), [{"w": "1"}, {"w": "2"}]),
        ("profile_async", (None, None), None),
        ("get_weight_version_async", ("7", "7"), "7"),
    ],
)
def test_one_answer(method: str, answers: tuple[Any, Any], one: Any) -> None:
    """Done means done everywhere, and what is listed can be used everywhere; with one instance its answer is passed."""
    assert combined(method, dict(zip("ab", answers, strict=True))) == one
    assert combined(method, {"a": answers[0]}) == answers[0]


def test_what_has_no_common_answer_is_an_error() -> None:
    """It names the instances and their answers."""
    with pytest.raises(DisagreementError, match=r"get_weight_version: instance 0: '1'; instance 1: '2'"):
        combined("get_weight_version_async", {"0": "1", "1": "2"})


def test_every_combined_call_goes_to_all() -> None:
    """The table names no call that only one instance gets."""
    assert COMBINED.keys() <= set(TO_ALL_INSTANCES)


class Told:
    """An engine that answers one thing, or fails."""

    def __init__(self, instance_id: str, answer: Any) -> None:
        self.instance_id = instance_id
        self.calls: list[str] = []
        self._answer = answer

    async def utility(self, method: str, *_: Any, **__: Any) -> Any:
        """See Engine.utility."""
        self.calls.append(method)
        if isinstance(self._answer, Exception):
            raise self._answer
        return self._answer


def client_of(*engines: Told) -> CascadeEngineClient:
    """Our client on these engines."""
    client = CascadeEngineClient.__new__(CascadeEngineClient)
    client._runtime = SimpleNamespace(live_engines=lambda: list(engines))  # type: ignore[assignment]
    return client


async def test_one_instance_is_busy() -> None:
    """Its cache could not be cleared, which is no error of the server: the caller may try again."""
    assert await client_of(Told("0", True), Told("1", False)).reset_prefix_cache_async(False, False) is False


async def test_one_instance_fails() -> None:
    """Its error is the answer, after every instance has had the call."""
    engines = [Told("0", EngineError("no", instance_id="0")), Told("1", True)]
    with pytest.raises(EngineError, match="no"):
        await client_of(*engines).reset_prefix_cache_async(False, False)
    assert [engine.calls for engine in engines] == [["reset_prefix_cache_async"]] * 2


async def test_requests_are_aborted_by_the_ids_that_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids of `/admin/instances` and ids that clients know may stand side by side."""
    aborted: list[tuple[list[str], bool]] = []

    async def abort(_: Any, request_ids: list[str], internal: bool = False) -> None:
        aborted.append((request_ids, internal))

    monkeypatch.setattr("vllm.v1.engine.async_llm.AsyncLLM.abort", abort)
    llm = CascadeLLM.__new__(CascadeLLM)
    monkeypatch.setattr(CascadeLLM, "__del__", lambda _: None, raising=False)
    llm.output_processor = SimpleNamespace(request_states={"cmpl-1-0-ab12": 1}, parent_requests={"cmpl-2-cd34": 1})
    await llm.abort(["cmpl-1-0-ab12", "cmpl-2-cd34", "cmpl-3-0"])
    assert aborted == [(["cmpl-1-0-ab12", "cmpl-2-cd34"], True), (["cmpl-3-0"], False)]
    await llm.abort("cmpl-1-0-ab12", internal=True)
    assert aborted[-1] == (["cmpl-1-0-ab12"], True)
