"""What each instance of this machine gets: cores, devices, a port, an environment."""

import os
import socket
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascadeinfer.cluster import local
from cascadeinfer.cluster.local import LOOPBACK, free_port
from cascadeinfer.cluster.places import core_places, device_places, split_cores, split_devices
from cascadeinfer.cluster.process_start import ProcessStart, operator_environment
from cascadeinfer.core.errors import ConfigError, ScalingRefusedError


def cores_of(binding: str) -> list[int]:
    """The cores that a binding of one rank allows."""
    return [int(core) for core in binding.split(",")]


def cores_of_ranks(binding: str) -> list[list[int]]:
    """The cores that a binding allows to each rank."""
    return [cores_of(rank) for rank in binding.split("|")]


@given(st.integers(1, 16), st.lists(st.integers(0, 255), min_size=1, max_size=64, unique=True), st.integers(1, 4))
def test_cores_are_shared_out(n_instances: int, cores: list[int], n_ranks: int) -> None:
    """Every rank gets some of our cores, all equally many; none is shared unless there are too few."""
    instances = [cores_of_ranks(binding) for binding in split_cores(n_instances, cores, n_ranks)]
    bindings = [rank for instance in instances for rank in instance]
    assert [len(instance) for instance in instances] == [n_ranks] * n_instances
    assert all(core in cores for binding in bindings for core in binding)
    assert len({len(binding) for binding in bindings}) == 1
    if len(cores) >= len(bindings):
        given_out = [core for binding in bindings for core in binding]
        assert len(given_out) == len(set(given_out)) == len(cores) // len(bindings) * len(bindings)
    else:
        shares = [sum(core in binding for binding in bindings) for core in cores]
        assert max(shares) - min(shares) <= 1
        within = [sum(core in rank for rank in instance) for instance in instances for core in cores]
        assert max(within) <= -(-n_ranks // len(cores))


def test_ranks_of_an_added_instance_get_left_over_cores() -> None:
    """A later instance gets a full set of free shares, then shares those of another."""
    places = core_places(2, range(7), n_ranks=2)
    assert [places.take(name) for name in "abc"] == ["0|1", "2|3", "4|5"]
    assert core_places(2, range(8), n_ranks=2).take("a") == "0,1|2,3"
    assert places.take("d") == "0|1"


def test_no_core_is_an_error() -> None:
    """A process that may run nowhere cannot start instances."""
    with pytest.raises(ConfigError, match="no core"):
        split_cores(2, [])


@pytest.mark.parametrize(
    ("n_instances", "each", "visible", "expected"),
    [
        (2, 1, "0123", ["0", "1"]),
        (2, 2, "0123", ["0,1", "2,3"]),
        (1, 4, "7654", ["7,6,5,4"]),
        (3, 1, "5", ["5", "5", "5"]),
    ],
)
def test_devices_are_shared_out(n_instances: int, each: int, visible: str, expected: list[str]) -> None:
    """Instances get devices in order; a single device is shared by all."""
    assert split_devices(n_instances, each, list(visible)) == expected


def test_added_instances_get_what_is_free() -> None:
    """A place that was left is reused first, then unused devices; then there is none."""
    places = device_places(2, 2, list("0123456"))
    assert [places.take(name) for name in "ab"] == ["0,1", "2,3"]
    places.give_back("a")
    assert [places.take(name) for name in "cd"] == ["0,1", "4,5"]
    with pytest.raises(ScalingRefusedError, match="no device left: 0,1, 2,3, 4,5 have an instance each"):
        places.take("e")
    places.give_back("b")
    assert places.take("f") == "2,3"


def test_added_instances_share_the_only_device() -> None:
    """As those of the start do."""
    places = device_places(2, 1, ["5"])
    assert [places.take(name) for name in "abc"] == ["5", "5", "5"]


@given(st.integers(1, 6), st.integers(0, 20), st.lists(st.integers(0, 5), max_size=30))
def test_cores_stay_shared_out(n_instances: int, more_cores: int, changes: list[int]) -> None:
    """A newcomer gets as many cores as the others, and shares them only if no place is free."""
    n_cores = n_instances + more_cores
    each = n_cores // n_instances
    places = core_places(n_instances, range(n_cores))
    there = {str(number): places.take(str(number)) for number in range(n_instances)}
    assert list(there.values()) == split_cores(n_instances, range(n_cores))
    for number, change in enumerate(changes):
        if change < 3 and there:
            name = list(there)[change % len(there)]
            places.give_back(name)
            del there[name]
            continue
        users = Counter(there.values())
        place = places.take(f"new{number}")
        assert len(cores_of(place)) == each
        assert users[place] == 0 or len(users) == n_cores // each
        assert users[place] == min([*users.values(), users[place]])
        there[f"new{number}"] = place


@pytest.mark.parametrize(
    ("n_instances", "each", "visible", "fix"),
    [(3, 1, "01", 2), (3, 2, "0123", 2), (1, 2, "0", 0), (2, 1, "", 0)],
)
def test_too_few_devices(n_instances: int, each: int, visible: str, fix: int) -> None:
    """Too few devices is an error about --instances that says how many would do."""
    with pytest.raises(ConfigError, match=f"need {n_instances * each} devices, {len(visible)} are visible") as raised:
        split_devices(n_instances, each, list(visible))
    assert raised.value.option == "--instances"
    if fix:
        assert f"--instances {fix} " in str(raised.value)
    else:
        assert "--instances 0" not in str(raised.value)


def test_free_port_is_free() -> None:
    """The port can be bound, and no connection gets it by itself before."""
    with socket.socket() as listener:
        listener.bind((LOOPBACK, port := free_port()))
    first, last = map(int, local.PORT_RANGE.read_text().split())
    assert first > local.PORTS_OF_SERVERS[0], "this machine has other ranges than Linux's default: change the test"
    assert not first <= port <= last


def test_free_port_without_a_range(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system does not say which ports it gives to connections, or gives them all, it may be one of them."""
    for told in (None, "1024\t65535"):
        monkeypatch.setattr(local, "PORT_RANGE", tmp_path / "range")
        if told is not None:
            (tmp_path / "range").write_text(told)
        with socket.socket() as listener:
            listener.bind((LOOPBACK, free_port()))


def test_environment_is_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within the block the variables are set; afterwards each is as before, including those that were unset."""
    monkeypatch.setenv("CASCADE_TEST_OLD", "old")
    monkeypatch.delenv("CASCADE_TEST_NEW", raising=False)
    start = ProcessStart({"CASCADE_TEST_OLD": "1", "CASCADE_TEST_NEW": "2"})
    start.leave()  # not entered: nothing happens
    for _ in range(2):
        start.enter()
        assert (os.environ["CASCADE_TEST_OLD"], os.environ["CASCADE_TEST_NEW"]) == ("1", "2")
        start.leave()
        start.leave()
        assert os.environ["CASCADE_TEST_OLD"] == "old"
        assert "CASCADE_TEST_NEW" not in os.environ


def test_what_the_operator_has_set_is_known_while_an_instance_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables of a starting instance are not taken for the operator's; those set by this process are."""
    monkeypatch.setenv("CASCADE_TEST_OLD", "old")
    monkeypatch.delenv("CASCADE_TEST_NEW", raising=False)
    before = operator_environment()
    with ProcessStart({"CASCADE_TEST_OLD": "1", "CASCADE_TEST_NEW": "2"}):
        assert operator_environment() == before
        monkeypatch.setenv("CASCADE_TEST_OURS", "3")
        assert operator_environment() == {**before, "CASCADE_TEST_OURS": "3"}
    assert operator_environment() == {**before, "CASCADE_TEST_OURS": "3"} == dict(os.environ)


def test_starts_are_exclusive(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starts in several threads never see each other's variables."""
    monkeypatch.delenv("CASCADE_TEST", raising=False)
    inside = 0
    barrier = threading.Barrier(4)

    def start(number: int) -> None:
        nonlocal inside
        own = ProcessStart({"CASCADE_TEST": str(number)})
        barrier.wait()
        for _ in range(200):
            own.enter()
            inside += 1
            assert inside == 1
            assert os.environ["CASCADE_TEST"] == str(number)
            inside -= 1
            own.leave()

    with ThreadPoolExecutor(4) as threads:
        for future in [threads.submit(start, number) for number in range(4)]:
            future.result()
    assert "CASCADE_TEST" not in os.environ
