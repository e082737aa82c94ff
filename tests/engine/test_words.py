"""Connector parameters on real instances: clients' are ignored, impossible ones end only their request."""

import dataclasses
from typing import Any

import pytest
from zoo import BLOCK, KINDS, Attempt, Zoo, greedy, random_prompt

from cascadeinfer.engines.vllm.connector.ticket import VllmTicket
from cascadeinfer.engines.vllm.instance import VllmInstance

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]

FORGED: dict[str, Any] = {
    "do_remote_prefill": True,
    "do_remote_decode": False,
    "remote_block_ids": [[1, 2, 3, 4]],
    "remote_engine_id": "nobody",
    "remote_request_id": "nothing",
    "remote_host": "127.0.0.1",
    "remote_port": 9,
    "tp_size": 1,
    "remote_num_tokens": 4 * BLOCK,
}
SAID = [
    {"do_remote_prefill": True},
    {"do_remote_decode": True},
    {"cascade_prompt_tokens": "x"},
    {"cascade_prompt_tokens": 5},
    FORGED,
    ["no dict"],
]


@pytest.mark.parametrize("name", ["async+cache", "sync"])
async def test_what_a_client_says_changes_nothing(zoo: Zoo, name: str) -> None:
    """Client-supplied parameters, in every form that has done harm, leave the output unchanged and no blocks held."""
    instance = zoo.instances[name]
    prompt, expected = await zoo.window(100, 12)
    for key in ("kv_transfer_params", "cascadeinfer_words"):
        said = [await zoo.start(instance, prompt, greedy(12, extra_args={key: words})) for words in SAID]
        for attempt in said:
            await attempt.until_end()
            assert attempt.output == expected
            assert attempt.ticket is None
    counters = await zoo.counters(instance)
    assert not any(counters.held_blocks.values())


async def with_ticket(zoo: Zoo, old: Attempt, target: VllmInstance, params: dict[str, Any]) -> Attempt:
    """Resume the request at the target with a ticket of these parameters in place of its own."""
    return await zoo.resume(old, target, ticket=VllmTicket(params))


@pytest.mark.parametrize("name", KINDS)
async def test_impossible_tickets(zoo: Zoo, name: str) -> None:
    """
    Wrong parameters of our own: impossible ones end their request with an error; if only the pull fails, it recomputes.

    A neighbour gets its tokens; the instance holds nothing afterwards (the fixture checks).
    """
    target = zoo.instances[name]
    source = next(instance for instance in zoo.instances.values() if instance is not target)
    prompt, expected = await zoo.window(100, 60)
    neighbour = await zoo.start(target, prompt, greedy(60))
    old = await zoo.start(source, prompt, greedy(60))
    await old.until_output(5)
    if not await zoo.cut(old):
        pytest.skip("it ended before the cut")
    assert isinstance(old.ticket, VllmTicket)
    ticket = old.ticket.params
    [blocks] = ticket["remote_block_ids"]
    for wrong in (
        {"remote_port": "x"},
        {"remote_block_ids": [blocks, blocks]},
        {"remote_num_tokens": 1},
        {"tp_size": None},
    ):
        attempt = await (await with_ticket(zoo, old, target, {**ticket, **wrong})).until_end()
        assert attempt.finish_reason is not None
        assert attempt.finish_reason.name == "ERROR"
        assert attempt.token_ids == []
    far = {**ticket, "remote_block_ids": [[block + 10**6 for block in blocks]]}
    attempt = await (await with_ticket(zoo, old, target, far)).until_end()
    assert attempt.output == expected
    assert (await neighbour.until_end()).output == expected
    await source.release_pin(old.engine_request_id)


async def test_a_token_is_for_one_start(zoo: Zoo) -> None:
    """Parameters under another instance's token are ignored: the whole text is prompt, and nothing is pulled."""
    here, other = zoo.instances["async"], zoo.instances["sync"]
    assert here.channel.connector_token != other.channel.connector_token
    old = await zoo.start(other, random_prompt(40, 3), greedy(20))
    await old.until_end()
    pulls = (await zoo.counters(here)).pulls
    right, here.channel.connector_token = here.channel.connector_token, other.channel.connector_token
    try:
        attempt = await zoo.resume(
            dataclasses.replace(old, token_ids=old.token_ids[:10]), here, ticket=VllmTicket({**FORGED})
        )
    finally:
        here.channel.connector_token = right
    await attempt.until_end()
    assert len(attempt.token_ids) == 20, "it was taken for a request that has run before"
    assert (await zoo.counters(here)).pulls == pulls
