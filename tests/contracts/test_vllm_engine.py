"""The engine contract on real vLLM instances with a tiny random model."""

import asyncio
import itertools
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from multiprocessing import resource_tracker
from pathlib import Path

import psutil
import pytest
import pytest_asyncio
import zmq
from engine_bed import Bed, eventually
from engine_contract import OWN, SHARED, resume_pulls
from parking_contract import PARKING
from precopy_contract import PRECOPY, PRECOPY_OWN
from vllm.platforms import current_platform

from cascadeinfer.cluster.local import LOOPBACK
from cascadeinfer.cluster.shared_memory import SHARED_MEMORY, segments_of
from cascadeinfer.engines.protocol import Engine, EngineRequest, Resume
from cascadeinfer.engines.vllm.connector.cascade_connector import CascadeConnector

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(300)]

QUICK_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",  # the worker is a separate process, whatever earlier tests chose
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "OMP_NUM_THREADS": "1",
}
LEASE_S = 5
Rule = Callable[[Bed], Awaitable[None]]


class VllmMaker:
    """Real instances with little memory; forked, so that they start fast."""

    lease_s = float(LEASE_S)

    def __init__(self, model: Path, *, caches: bool = False) -> None:
        """Instances of this model, with or without a prefix cache."""
        self._model = model
        self._caches = caches

    def caching(self) -> "VllmMaker":
        """Makes instances with a prefix cache."""
        return VllmMaker(self._model, caches=True)

    def make_engine(self, name: str) -> Engine:
        """See Maker."""
        from vllm.engine.arg_utils import AsyncEngineArgs

        from cascadeinfer.engines.vllm.configuration import KvTransferSettings
        from cascadeinfer.engines.vllm.launch import make_factories

        engine_args = AsyncEngineArgs(
            model=str(self._model),
            dtype="float32",
            block_size=32,
            enforce_eager=True,
            num_gpu_blocks_override=65,
            max_model_len=1024,
            max_num_batched_tokens=256,
            max_num_seqs=4,
            distributed_executor_backend="uni",
            enable_prefix_caching=self._caches,
        )
        factories = make_factories(
            engine_args,
            (name,),
            KvTransferSettings(lease_s=LEASE_S),
            log_stats=False,
            extra_environment={"VLLM_WORKER_MULTIPROC_METHOD": "fork"},
        )
        return factories[name](0)

    def now_s(self) -> float:
        """See Maker."""
        return time.monotonic()

    def make_request(
        self, request_id: str, n_prompt: int, max_output_tokens: int, stop_token_ids: tuple[int, ...] = ()
    ) -> EngineRequest:
        """See Maker."""
        from vllm.sampling_params import SamplingParams

        from cascadeinfer.engines.vllm.plain_request import request_with

        prompt = [3 + (17 * i * i + 5 * i) % 500 for i in range(n_prompt)]
        params = SamplingParams(
            temperature=0.0, max_tokens=max_output_tokens, ignore_eos=True, stop_token_ids=list(stop_token_ids)
        )
        params.update_from_generation_config({}, 2)
        return request_with(request_id, prompt, params)


@pytest.fixture(scope="module")
def maker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmMaker]:
    """Creates instances, in an environment in which they start fast."""
    before = dict(os.environ)
    os.environ.update(QUICK_ENVIRONMENT)
    from cascadeinfer.engines.models.tiny import make_tiny_llama

    yield VllmMaker(make_tiny_llama(tmp_path_factory.mktemp("contract") / "tiny"))
    os.environ.clear()
    os.environ.update(before)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def bed(maker: VllmMaker) -> AsyncIterator[Bed]:
    """Two connected instances that several tests use."""
    bed = await Bed.make(maker)
    yield bed
    await bed.close()


@pytest.mark.parametrize("rule", [*SHARED, *PARKING], ids=lambda rule: rule.__name__)
async def test_contract(rule: Rule, bed: Bed) -> None:
    """A vLLM instance keeps the engine contract."""
    await rule(bed)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def caching_bed(maker: VllmMaker) -> AsyncIterator[Bed]:
    """Two connected instances with prefix caches."""
    bed = await Bed.make(maker.caching())
    yield bed
    await bed.close()


@pytest.mark.parametrize("rule", PRECOPY, ids=lambda rule: rule.__name__)
async def test_contract_of_precopy(rule: Rule, caching_bed: Bed) -> None:
    """Full blocks go ahead of their request."""
    await rule(caching_bed)


@pytest.mark.parametrize("rule", PRECOPY_OWN, ids=lambda rule: rule.__name__)
async def test_contract_of_precopy_and_death(rule: Rule, maker: VllmMaker) -> None:
    """What goes ahead fails with its source."""
    bed = await Bed.make(maker.caching())
    try:
        await asyncio.wait_for(rule(bed), 120.0)
    finally:
        await bed.close()


async def test_without_a_prefix_cache_nothing_goes_ahead(bed: Bed) -> None:
    """The request would not find what was copied, so nothing is."""
    request = bed.maker.make_request("plain", 70, 150)
    heard = await (await bed.a.add("plain", request)).until_tokens(5)
    full = await bed.a.engine.pin_full_blocks("plain")
    assert full is not None
    assert await bed.b.engine.reserve("plain-room", 300) is None
    assert not await bed.b.engine.precopy("plain-room", full, bed.maker.now_s() + 30.0)
    await bed.a.engine.release_full_blocks("plain")
    await bed.b.engine.release_reservation("plain-room")
    await heard.until_end()
    await bed.settled()


@pytest.mark.parametrize("rule", OWN, ids=lambda rule: rule.__name__)
async def test_contract_of_death(rule: Rule, maker: VllmMaker) -> None:
    """A dying vLLM instance keeps the engine contract."""
    bed = await Bed.make(maker)
    try:
        await asyncio.wait_for(rule(bed), 120.0)
    finally:
        await bed.close()


async def _fill(bed: Bed, name: str, ended: list[str]) -> None:
    """Run one request after another at `a`; each gets blocks that earlier ones had."""
    for number in itertools.count():
        attempt = f"{name}-{number}"
        request = bed.maker.make_request(attempt, 400 + 7 * number % 50, 150)
        await (await bed.a.add(attempt, request)).until_end()
        ended.append(attempt)


@pytest.mark.parametrize("has_deadline", [True, False])
async def test_a_stopped_target_wakes_up_after_the_lease(bed: Bed, has_deadline: bool) -> None:
    """
    It does not pull blocks that other requests have overwritten meanwhile. Without a deadline it would, and its tokens
    would be wrong.

    As in the runtime, the deadline counts from when the cut was sent.
    """
    expected = await bed.alone(150, 60)
    attempt = f"stopped-{has_deadline}"
    request = bed.maker.make_request(attempt, 150, 60)
    heard = await (await bed.a.add(attempt, request)).until_tokens(5)
    assert bed.b.engine.pid is not None
    ended: list[str] = []
    before_s = bed.maker.now_s() + LEASE_S - 3
    ticket = await bed.cut(attempt, heard)
    pulls = (await bed.b.engine.report())[1].pulls
    os.kill(bed.b.engine.pid, signal.SIGSTOP)
    fillers = [asyncio.create_task(_fill(bed, f"fill-{has_deadline}-{i}", ended)) for i in range(4)]
    try:
        resume = Resume(list(heard.token_ids), ticket, None, before_s if has_deadline else None)
        resumed = await bed.b.add(f"{attempt}~1", request, resume)

        async def pin_has_ended() -> bool:
            return (await bed.a.engine.report())[1].pinned == 0

        await eventually(pin_has_ended, "the pin has ended")
        n_ended = len(ended)

        async def written_over() -> bool:
            return len(ended) >= n_ended + 8

        await eventually(written_over, "others have had its blocks")
    finally:
        os.kill(bed.b.engine.pid, signal.SIGCONT)
        for filler in fillers:
            filler.cancel()
        await asyncio.gather(*fillers, return_exceptions=True)
        await bed.a.engine.abort([name for name in bed.a.by_attempt if name.startswith("fill")])
    await resumed.until_end()
    assert (heard.token_ids + resumed.token_ids == expected) is has_deadline
    assert (await bed.b.engine.report())[1].pulls == pulls + (not has_deadline)
    await bed.settled()


@pytest.mark.skipif(
    sys.platform != "linux" or not current_platform.is_cpu(), reason="elsewhere they share no cores, or cannot be asked"
)
async def test_engines_do_not_interrupt_the_front_end(bed: Bed) -> None:
    """On a CPU, threads of EngineCore and workers that wake up do not preempt others."""
    core = psutil.Process(bed.a.engine.pid)
    policies = {
        (process.name(), os.sched_getscheduler(thread.id))
        for process in (core, *core.children())
        for thread in process.threads()
        if process.name().startswith("VLLM")  # Python's resource tracker is there too
    }
    assert policies == {("VLLM::EngineCore", os.SCHED_BATCH), ("VLLM::Worker", os.SCHED_BATCH)}


async def test_a_worker_that_hangs_ends_with_its_engine(maker: VllmMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker whose shutdown hangs ends as soon as its EngineCore is killed, and the death is reported."""
    monkeypatch.setattr(CascadeConnector, "shutdown", lambda _: time.sleep(3600))  # the forked processes have it too
    bed = await Bed.make(maker)
    try:
        (worker,) = (child for child in psutil.Process(bed.a.engine.pid).children() if "Worker" in child.name())
        bed.a.engine.kill()
        await asyncio.to_thread(worker.wait, 60.0)
        await asyncio.wait_for(bed.a.died.wait(), 30.0)
    finally:
        await bed.close()


async def test_a_killed_engine_leaves_no_shared_memory(maker: VllmMaker) -> None:
    """The queues between an EngineCore and its workers are removed with it, not only when the server ends."""
    resource_tracker.ensure_running()  # spawned processes have this one too; forked ones would start their own
    before = segments_of(os.getpid())
    bed = await Bed.make(maker)
    try:
        used = segments_of(os.getpid()) - before
        assert used  # otherwise this test would see nothing
        bed.a.engine.kill()
        await asyncio.wait_for(bed.a.died.wait(), 30.0)
    finally:
        await bed.close()
    assert not [name for name in used if (SHARED_MEMORY / name).exists()]


async def test_a_port_that_is_taken_is_not_used(maker: VllmMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Instances start and shake hands even if another process has the port that vLLM would use."""
    with socket.create_server((LOOPBACK, 0)) as taken:
        monkeypatch.setenv("VLLM_NIXL_SIDE_CHANNEL_PORT", str(taken.getsockname()[1]))
        bed = await asyncio.wait_for(Bed.make(maker), 120.0)
        try:
            await resume_pulls(bed)
        finally:
            await bed.close()


async def test_rubbish_on_the_side_channel_keeps_nobody_out(bed: Bed, maker: VllmMaker) -> None:
    """Malformed messages end vLLM's listener; ours continues, and an instance that joins later can shake hands."""
    engine = bed.a.engine
    from cascadeinfer.engines.vllm.instance import VllmInstance

    assert isinstance(engine, VllmInstance)
    with zmq.Context() as context, context.socket(zmq.DEALER) as sock:
        sock.setsockopt(zmq.LINGER, 10_000)
        sock.connect(f"tcp://{engine.hello.host}:{engine.hello.port}")
        for frames in ([b""], [b"", b"\xc1"], [b"", b"\x93\xc4\x0cget_meta_msg\x07\x07"], [b"", bytes(1 << 20)]):
            sock.send_multipart(frames)
    assert await engine.listens()
    newcomer = maker.make_engine("2")
    try:
        await newcomer.start()
        await asyncio.wait_for(newcomer.connect([engine]), 60.0)
        assert (await engine.report())[1].listens
    finally:
        await newcomer.stop(5.0)
