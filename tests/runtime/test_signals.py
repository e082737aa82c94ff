"""Signals for operators and autoscalers: what waits, what moves, stages, latency by length, instances to have."""

import asyncio
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from runtime_cluster import CAPACITY, SUPERVISION, TIMES, Cluster, ScriptedPolicy

from cascadeinfer.core.effects import AdviseScale, PublishLayout
from cascadeinfer.core.layout import StageLayout
from cascadeinfer.runtime.gauges import FleetGauges
from cascadeinfer.runtime.metrics import LENGTH_CLASSES, RuntimeMetrics, length_class
from support.virtual_time import virtual_time

LAYOUT = StageLayout.from_boundaries((100,), (("a", "b"), ("c",)))


@pytest.mark.parametrize(
    ("n_tokens", "expected"),
    [(0, "0-512"), (511, "0-512"), (512, "512-2048"), (32_767, "8192-32768"), (1 << 20, "32768-")],
)
def test_length_classes(n_tokens: int, expected: str) -> None:
    """Ranges are half-open, as everywhere."""
    assert length_class(n_tokens) == expected
    assert len(LENGTH_CLASSES) == 5


@virtual_time
async def test_waiting_and_moving_are_shown() -> None:
    """Requests that wait for a place, and moves under way, are gauges that follow at once and end at 0."""
    async with Cluster(ScriptedPolicy({"r": "a"})) as cluster:
        read = cluster.registry.get_sample_value
        client = await cluster.submit("r", 40, 400)
        await client.until_tokens(5)
        assert read("cascadeinfer_unplaced_requests") == read("cascadeinfer_migrations_under_way") == 0
        cluster["b"].pause()
        cluster.move("r", "b")
        await asyncio.sleep(0.05)
        assert read("cascadeinfer_migrations_under_way") == 1
        cluster["b"].unpause()
        await client.until_end()
        assert read("cascadeinfer_migrations_under_way") == 0
        for name in "abc":
            cluster[name].kill()
        await cluster.until(lambda: not cluster.runtime.live_engines())
        waiting = [await cluster.submit(f"w{i}", 40, 10) for i in range(3)]
        assert read("cascadeinfer_unplaced_requests") == 3
        assert read("cascadeinfer_instances", {"phase": "down"}) == 3
        for one in waiting:
            await one.until_end()
        assert read("cascadeinfer_unplaced_requests") == 0
        await cluster.all_up()
        assert read("cascadeinfer_instances", {"phase": "up"}) == 3


@virtual_time
async def test_suspects_are_counted() -> None:
    """A silent instance is up and suspect."""
    async with Cluster(supervision=SUPERVISION) as cluster:
        read = cluster.registry.get_sample_value
        assert read("cascadeinfer_suspect_instances") == 0
        cluster["a"].freeze()
        await cluster.until(lambda: cluster.runtime.fleet["a"].suspect)
        assert read("cascadeinfer_suspect_instances") == 1
        cluster["a"].thaw()
        await cluster.until(lambda: not cluster.runtime.fleet["a"].suspect)


@virtual_time
async def test_stages_and_their_age() -> None:
    """Bounds, sizes and kinds of the stages in force, and how old they are; a layout that is published again ages."""
    async with Cluster(ScriptedPolicy()) as cluster:
        read = cluster.registry.get_sample_value
        assert read("cascadeinfer_plan_age_seconds") is None
        cluster.do(PublishLayout("x", LAYOUT))
        bounds = ("cascadeinfer_stage_lower_bound_tokens", "cascadeinfer_stage_upper_bound_tokens")
        assert [read(name, {"stage": "0"}) for name in bounds] == [0, 100]
        assert [read(name, {"stage": "1"}) for name in bounds] == [100, float("inf")]
        assert [read("cascadeinfer_stage_instances", {"stage": stage}) for stage in "01"] == [2, 1]
        labels = {"instance": "c", "stage": "1", "role": "mixed", "step_model": ""}
        size = {"kv_tokens": str(CAPACITY.kv_tokens), "max_num_seqs": str(CAPACITY.max_num_seqs)}
        assert read("cascadeinfer_instance_kind", {**labels, **size}) == 1
        await asyncio.sleep(5.0)
        cluster.do(PublishLayout("y", LAYOUT, failure="no plan could be made"))
        assert read("cascadeinfer_plan_age_seconds") == pytest.approx(5.0)
        cluster.do(PublishLayout("z", StageLayout.single(("a", "b", "c"))))
        assert read("cascadeinfer_plan_age_seconds") == 0.0


@virtual_time
async def test_latency_by_length() -> None:
    """TTFT counts by prompt length at the first token; TPOT and end to end by final length, of finished requests."""
    roomy = type(CAPACITY)(kv_blocks=1024, block_size_tokens=16, max_num_seqs=8, max_batched_tokens=1024)
    async with Cluster(ScriptedPolicy(), capacity=roomy) as cluster:
        read = cluster.registry.get_sample_value
        grows = await cluster.submit("grows", 500, 101)
        gone = await cluster.submit("gone", 600, 900)
        await gone.until_tokens(3)
        cluster.abort(gone)
        await grows.until_end()
        short, longer = {"length": "0-512"}, {"length": "512-2048"}
        for labels in (short, longer):
            assert read("cascadeinfer_request_ttft_seconds_count", labels) == 1
        for name in ("tpot", "e2e"):
            assert read(f"cascadeinfer_request_{name}_seconds_count", short) is None
            assert read(f"cascadeinfer_request_{name}_seconds_count", longer) == 1
        assert read("cascadeinfer_request_tpot_seconds_sum", longer) == pytest.approx(TIMES.step_s, rel=0.05)
        ttft_s = read("cascadeinfer_request_ttft_seconds_sum", short)
        assert read("cascadeinfer_request_e2e_seconds_sum", longer) == pytest.approx(
            ttft_s + 100 * TIMES.step_s, rel=0.05
        )


@virtual_time
async def test_pulled_tokens() -> None:
    """The instance that pulled a request's KV cache shows its tokens."""
    async with Cluster(ScriptedPolicy({"r": "a"})) as cluster:
        client = await cluster.submit("r", 90, 300)
        await client.until_tokens(20)
        cluster.move("r", "c")
        await cluster.until(lambda: cluster.migration("r") is None)
        await asyncio.sleep(0.25)
        pulled = cluster.registry.get_sample_value(
            "cascadeinfer_instance_pulled_tokens", {"instance": "c", "stage": ""}
        )
        assert pulled is not None
        assert 90 + 20 <= pulled < 90 + 300
        await client.until_end()


@virtual_time
async def test_the_number_of_instances_to_have() -> None:
    """Absent until the policy advises one; then the last one advised, also while no number would do."""
    async with Cluster(ScriptedPolicy()) as cluster:
        read = cluster.registry.get_sample_value
        cluster.do(AdviseScale("x", None, "nothing keeps it"))
        assert read("cascadeinfer_desired_instances") is None
        cluster.do(AdviseScale("x", 7, "5 requests/s"))
        assert read("cascadeinfer_desired_instances") == 7
        cluster.do(AdviseScale("x", None, "nothing keeps it"))
        assert read("cascadeinfer_desired_instances") == 7
        cluster.do(AdviseScale("x", 3, "2 requests/s"))
        assert read("cascadeinfer_desired_instances") == 3


def test_several_processes_add_up(tmp_path: Path) -> None:
    """In multiprocess mode what waits and moves is summed, and the number to have is that of the process that plans."""
    program = tmp_path / "one.py"
    program.write_text(
        textwrap.dedent(
            """
            import sys
            from prometheus_client import CollectorRegistry, generate_latest
            from prometheus_client.multiprocess import MultiProcessCollector
            from cascadeinfer.runtime.gauges import FleetGauges
            from cascadeinfer.runtime.metrics import RuntimeMetrics

            metrics = RuntimeMetrics(CollectorRegistry(), FleetGauges)
            metrics.show(2, 1, 0)
            metrics.first_token(100, 0.3)
            if sys.argv[1] == "plans":
                metrics.desire(5)
            print("ready", flush=True)
            sys.stdin.readline()
            shown = CollectorRegistry()
            MultiProcessCollector(shown)
            print(generate_latest(shown).decode())
            """
        )
    )
    folder = tmp_path / "shared"
    folder.mkdir()
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(folder)}
    processes = [
        subprocess.Popen(
            [sys.executable, program, role], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        for role in ("plans", "follows")
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        shown, _ = processes[1].communicate("\n")
    finally:
        for process in processes:
            process.kill()
            process.wait()
    values = dict(re.findall(r"^(cascadeinfer_\S+) (\S+)$", shown, flags=re.MULTILINE))
    assert float(values["cascadeinfer_unplaced_requests"]) == 4
    assert float(values["cascadeinfer_migrations_under_way"]) == 2
    assert float(values["cascadeinfer_desired_instances"]) == 5
    assert float(values['cascadeinfer_request_ttft_seconds_count{length="0-512"}']) == 2


def test_nothing_is_known_before_the_start() -> None:
    """With no instance there are no series of instances and stages, no age of a plan, and no number to have."""
    registry = CollectorRegistry()
    RuntimeMetrics(registry, FleetGauges)
    samples = {sample.name for family in registry.collect() for sample in family.samples}
    assert not any(name.startswith(("cascadeinfer_instance_", "cascadeinfer_stage_")) for name in samples)
    assert not samples & {"cascadeinfer_plan_age_seconds", "cascadeinfer_desired_instances"}
    assert {"cascadeinfer_unplaced_requests", "cascadeinfer_instances", "cascadeinfer_suspect_instances"} <= samples
