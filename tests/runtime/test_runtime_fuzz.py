"""
Random lives: requests come and go; instances die, hang, stall, return, are added and drained; policies move requests.

Everything is drawn from one seed and happens in virtual time, so a failing seed fails again: the seed is in the test's
name and in the error. `Cluster` checks that each token comes once and in order, that nothing is left at the end, and
that no attempt runs without a listener.
"""

import asyncio
import contextlib
import random
from dataclasses import replace

import pytest
from runtime_cluster import CAPACITY, MANY_DEATHS, SUPERVISION, TIMES, Client, Cluster, ScriptedPolicy

from cascadeinfer.core.effects import Effect, MigrationReason, StartMigration
from cascadeinfer.core.errors import ScalingRefusedError
from cascadeinfer.core.events import Event, InstanceReported
from cascadeinfer.core.layout import StageLayout
from cascadeinfer.core.migration import MigrationLimits
from cascadeinfer.core.policies import POLICIES
from cascadeinfer.core.policy import Policy
from cascadeinfer.core.refusals import Refusal
from cascadeinfer.engines.simulated import SimulatedEngine
from support.virtual_time import virtual_time

CASES = [("restless", seed) for seed in range(6)] + [(name, 6) for name in sorted(POLICIES)]
LIVE_S = 15.0
N_INSTANCES = 4
"""The initial number of instances, and roughly the number later."""
LIMITS = MigrationLimits(ask_s=0.5, cut_s=0.3, resume_s=0.8)
SMALL = replace(CAPACITY, kv_blocks=60, max_num_seqs=5)
"""So small that requests wait, are preempted, and find no room."""


class Restless(ScriptedPolicy):
    """Moves requests at random, whether it makes sense or not."""

    def __init__(self, rng: random.Random) -> None:
        """Draw from this generator."""
        super().__init__()
        self._rng = rng
        self._n = 0

    def handle(self, event: Event, now_s: float) -> list[Effect]:
        """Least loaded; after each report it may move a request from the reporting instance to any other."""
        effects = super().handle(event, now_s)
        if isinstance(event, InstanceReported) and self._rng.random() < 0.7:
            here = self.view.instances.get(event.instance_id)
            others = [i for i in self.view.available() if i is not here]
            movable = [r for r in here.request_ids if self.view.requests[r].migration_id is None] if here else []
            if others and movable:
                self._n += 1
                move = StartMigration(
                    event.cause,
                    f"f{self._n}",
                    self._rng.choice(movable),
                    event.instance_id,
                    self._rng.choice(others).instance_id,
                    MigrationReason.REBALANCE,
                )
                self.view.carry_out([move])
                effects.append(move)
        return effects


async def stall(engine: SimulatedEngine, rng: random.Random) -> None:
    """The instance does not step for a while."""
    engine.pause()
    await asyncio.sleep(rng.uniform(0.0, 1.5))
    engine.unpause()


async def late_outputs(engine: SimulatedEngine, rng: random.Random) -> None:
    """Its outputs are late."""
    engine.hold_outputs()
    await asyncio.sleep(rng.uniform(0.0, 1.0))
    engine.release_outputs()


async def late_answers(engine: SimulatedEngine, rng: random.Random) -> None:
    """Its answers to one command are late."""
    command = rng.choice(("reserve", "cut", "undo_cut", "release_pin"))
    engine.hold_answers(command)
    await asyncio.sleep(rng.uniform(0.0, 1.0))
    engine.release_answers(command)


async def terminate(engine: SimulatedEngine, rng: random.Random) -> None:
    """The instance drops its requests and ends soon after."""
    engine.end_all("abort")
    await asyncio.sleep(rng.uniform(0.0, 0.3))
    engine.kill()


async def at_once(engine: SimulatedEngine, rng: random.Random) -> None:
    """One of the faults that are instantaneous."""
    rng.choice((engine.hang, engine.lose_pins, engine.spoil_cut, lambda: engine.refuse_room(Refusal.NO_BLOCKS)))()


async def die(engine: SimulatedEngine, _: random.Random) -> None:
    """It dies."""
    engine.kill()


TROUBLES = (stall, late_outputs, late_answers, terminate, at_once, at_once, at_once, die, die)


async def trouble(cluster: Cluster, rng: random.Random) -> None:
    """One fault of an instance, if it is up."""
    engines = rng.choice(list(cluster.engines.values()))
    if engines and engines[-1].serves:
        await rng.choice(TROUBLES)(engines[-1], rng)


def scale(cluster: Cluster, rng: random.Random) -> None:
    """Add or drain an instance in any state, if that is allowed."""
    there = list(cluster.runtime.fleet.records)
    with contextlib.suppress(ScalingRefusedError):
        if rng.random() < (0.7 if len(there) < N_INSTANCES else 0.3):
            cluster.runtime.elastic.add()
        else:
            cluster.runtime.elastic.drain(rng.choice(there), rng.choice((0.0, 0.5, 60.0)))


async def live(cluster: Cluster, rng: random.Random) -> None:
    """Arrivals, departures and faults for a while, then calm until everything has ended."""
    clients: list[Client] = []
    troubles: list[asyncio.Task[None]] = []
    end_s = asyncio.get_running_loop().time() + LIVE_S
    while asyncio.get_running_loop().time() < end_s:
        await asyncio.sleep(rng.expovariate(12.0))
        cluster.check_pump()
        match rng.choices(("arrive", "leave", "trouble", "scale"), (8, 1, 1, 0.5))[0]:
            case "arrive" if cluster.runtime.n_live_requests < 24:
                n_output = rng.randint(1, 120)
                stop_at = rng.randint(1, n_output) if rng.random() < 0.3 else None
                clients.append(await cluster.submit(f"r{len(clients)}", rng.randint(1, 250), n_output, stop_at=stop_at))
            case "leave":
                here = [c for c in clients if c.finish_reason is None and not c.left]
                if here:
                    cluster.abort(rng.choice(here))
            case "trouble":
                troubles.append(asyncio.create_task(trouble(cluster, rng)))
            case "scale":
                scale(cluster, rng)
            case _:
                continue
    await asyncio.gather(*troubles)
    for client in clients:
        await client.until_end()
        assert client.left or client.finish_reason in {"stop", "length"}
    await cluster.all_up()


def policy_of(name: str, rng: random.Random) -> Policy:
    """The policy of this name, or the restless one."""
    if name == "restless":
        return Restless(rng)
    if name == "static_stages":
        return POLICIES[name].make(
            layout=StageLayout.from_boundaries((100, 180), (("a",), ("b", "d"), ("c",))), retry_s=0.1
        )
    return POLICIES[name].make()


@pytest.mark.parametrize(("name", "seed"), CASES)
@virtual_time
async def test_random_life(name: str, seed: int) -> None:
    """Whatever happens, every client that stays gets exactly its tokens, and nothing is left at the end."""
    rng = random.Random(seed)
    try:
        async with Cluster(
            policy_of(name, rng),
            "abcd",
            capacity=SMALL,
            times=replace(TIMES, start_s=0.3),
            supervision=replace(SUPERVISION, report_s=0.05, hang_s=1.0, backoff_first_s=0.1, backoff_max_s=1.0),
            migration=replace(LIMITS, precopy=seed % 2 == 0),
            poison_deaths=MANY_DEATHS,
            start_error=lambda name, n: "bad luck" if (n > 0 or name.isdecimal()) and rng.random() < 0.2 else None,
        ) as cluster:
            await live(cluster, rng)
    except BaseException as error:
        error.add_note(f"policy {name}, seed {seed}")
        raise
