"""The runtime's event log on real engines: replaying it gives the same decisions, and it contains no tokens."""

import asyncio
import dataclasses
from pathlib import Path
from typing import Any

import pytest
from zoo import greedy, random_prompt

from cascadeinfer.core.events import InstanceJoined
from cascadeinfer.core.kind import InstanceKind
from cascadeinfer.core.layout import StageLayout
from cascadeinfer.core.policies.spec import PolicySpec
from cascadeinfer.eventlog.log_summary import summarise_log
from cascadeinfer.eventlog.reader import open_log
from cascadeinfer.eventlog.replay import replay
from cascadeinfer.eventlog.story import find_request, story_of
from cascadeinfer.eventlog.writer import EventLog, header_of
from cluster import STAGE_EDGES, Cluster

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]

N_REQUESTS = 8
IDS = ("0", "1", "2")
LAYOUT = StageLayout.from_boundaries(STAGE_EDGES, (("0",), ("1",), ("2",)))


@pytest.mark.parametrize(
    ("name", "options"), [("static_stages", {"retry_s": 0.05}), ("cascade", {"refine": False, "rebalance": False})]
)
async def test_what_real_engines_were_told_replays(
    cluster: Cluster, tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    """
    Requests climb the stages of real instances under a fresh policy, logged from its first event on.

    The log replays without a difference, names every move, has the history of each request, and contains none of its
    tokens.
    """
    spec = PolicySpec(name, {"layout": LAYOUT, **options})
    log = EventLog(
        tmp_path / "log", header_of(spec, source="runtime", instances=IDS, commit=None), max_bytes=10**8, files=2
    )
    driver = cluster.runtime._driver
    before = driver._policy, driver._observer
    moved = cluster.migrations("moved")
    driver._policy, driver._observer = spec.make(), log
    try:
        for state in cluster.runtime.fleet:
            assert state.capacity is not None
            driver.emit(InstanceJoined(f"up:{state.instance_id}", state.instance_id, InstanceKind(state.capacity)))
        prompts = [random_prompt(20 + 5 * number, seed=number) for number in range(N_REQUESTS)]
        streams = [
            cluster.stream(prompt, greedy(140), request_id=f"log-{name}-{i}") for i, prompt in enumerate(prompts)
        ]

        async def hear(stream: Any) -> None:
            async for _ in stream:
                pass

        await asyncio.gather(*map(hear, streams))
        await cluster.settled()
    finally:
        driver._policy, driver._observer = before
        log.close()
    reader = open_log(tmp_path / "log")
    done = replay(reader)
    assert done.difference is None, dataclasses.asdict(done.difference)
    assert not reader.notes
    assert done.events == log.events
    summary = summarise_log(reader)
    assert (summary.arrived, summary.finished) == (N_REQUESTS, N_REQUESTS)
    assert summary.migrations["outgrew_stage", "moved", ""] == cluster.migrations("moved") - moved >= N_REQUESTS
    for number in range(N_REQUESTS):
        texts = [chapter.text for chapter in story_of(reader, find_request(reader, f"log-{name}-{number}-"))]
        assert texts[0].startswith("arrived: ")
        assert "dispatched to 0 (stage 0: 0-64 tokens)" in texts
        assert texts[-1] == "ended after 140 output tokens"
    written = (tmp_path / "log").read_bytes()
    assert b"token_ids" not in written
    assert not any(b",".join(b"%d" % token for token in prompt[:4]) in written for prompt in prompts)
