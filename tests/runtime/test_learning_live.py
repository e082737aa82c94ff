"""The cascade on a running runtime starts with one stage and no costs, learns, plans and moves requests."""

import asyncio
import logging

import numpy as np
import pytest
from runtime_cluster import Cluster

from cascadeinfer.core.adapt.replanning import PlanSettings
from cascadeinfer.core.cost.latency import StepModel
from cascadeinfer.core.cost.learning import LearningSettings
from cascadeinfer.core.effects import PublishLayout
from cascadeinfer.core.layout import StageLayout
from cascadeinfer.core.policies.cascade import Cascade
from cascadeinfer.core.types import InstanceCapacity
from cascadeinfer.engines.simulated.model import SimulatedTimes
from support.virtual_time import virtual_time

TRUTH = StepModel(
    base_s=0.004, per_decode_s=4e-5, per_kv_token_s=2e-6, per_prefill_token_s=6e-5, per_prefill_attention_s=2e-8
)
ROOMY = InstanceCapacity(kv_blocks=4000, block_size_tokens=16, max_num_seqs=64, max_batched_tokens=2048)
REQUESTS = 450


@virtual_time
async def test_stages_come_by_themselves(caplog: pytest.LogCaptureFixture) -> None:
    """
    With short chats and long documents, costs are learnt, stages planned
    with a logged reason, and hand-overs follow.
    """
    policy = Cascade(
        layout=StageLayout.single(("a", "b", "c")),
        learning=LearningSettings(interval_s=2.0),
        planning=PlanSettings(interval_s=8.0, min_requests=100, max_tokens=1 << 14),
    )
    rng = np.random.default_rng(0)
    caplog.set_level(logging.INFO, "cascadeinfer.runtime.perform")
    async with Cluster(policy, capacity=ROOMY, times=SimulatedTimes(step_model=TRUTH)) as cluster:
        clients = []
        for number in range(REQUESTS):
            long = number % 8 == 0
            clients.append(await cluster.submit(f"r{number}", 1500 if long else 60, 250 if long else 40))
            await asyncio.sleep(float(rng.exponential(0.06)))
        for client in clients:
            await client.until_end()
        model = policy._models.of("")
        assert model is not None
        assert model.per_kv_token_s == pytest.approx(TRUTH.per_kv_token_s, rel=0.15)
        layout = cluster.runtime.fleet.layout
        assert layout is not None
        assert len(layout.stages) > 1
        assert all(client.finish_reason == "length" for client in clients)
    assert any("predicted gain" in record.message for record in caplog.records)


@virtual_time
async def test_a_plan_that_failed_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    """The layout stays; operators get a metric and a log line."""
    async with Cluster() as cluster:
        before = StageLayout.single(("a", "b", "c"))
        cluster.do(PublishLayout("x", before, failure="no such thing"))
        await asyncio.sleep(0.1)
        assert cluster.registry.get_sample_value("cascadeinfer_plan_failures_total") == 1.0
        assert cluster.runtime.fleet.layout == before
    assert any("no such thing" in record.message for record in caplog.records)
