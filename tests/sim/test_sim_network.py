"""Transfers: exact times when links are shared."""

import pytest

from cascadeinfer.sim.kernel import Kernel
from cascadeinfer.sim.network import Network


def finish_times(
    transfers: list[tuple[str, str, str, float]], *, max_pulls: int = 3, cancel: str = ""
) -> dict[str, float]:
    """Start all at 0 on links of 100 bytes/s; returns when each is done."""
    kernel = Kernel()
    network = Network(kernel, lambda *_: 100.0, max_pulls)
    done: dict[str, float] = {}
    for name, source, target, n_bytes in transfers:
        network.start(name, source, target, n_bytes, lambda transfer_id: done.setdefault(transfer_id, kernel.now_s))
    if cancel:
        network.cancel(cancel)
    while kernel.next_s() is not None:
        kernel.step()
    assert len(network) == 0
    return done


def test_alone_a_transfer_has_the_link() -> None:
    """200 bytes at 100 bytes/s take 2 s."""
    assert finish_times([("m", "a", "b", 200.0)]) == pytest.approx({"m": 2.0})


def test_a_shared_source_halves_the_rate_until_one_is_done() -> None:
    """Two from one source get 50 bytes/s each; the shorter ends at 2 s, then the longer has the link alone."""
    times = finish_times([("m", "a", "b", 100.0), ("n", "a", "c", 300.0)])
    assert times == pytest.approx({"m": 2.0, "n": 4.0})


def test_opposite_directions_do_not_share() -> None:
    """An instance's inbound and outbound links are separate."""
    assert finish_times([("m", "a", "b", 100.0), ("n", "b", "a", 100.0)]) == pytest.approx({"m": 1.0, "n": 1.0})


def test_the_fourth_waits_its_turn() -> None:
    """With two places, the third transfer to a target starts when the first is done."""
    times = finish_times([(m, m, "t", 100.0) for m in ("a", "b", "c")], max_pulls=2)
    assert times == pytest.approx({"a": 2.0, "b": 2.0, "c": 3.0})


def test_a_blocked_transfer_does_not_block_others() -> None:
    """While one transfer waits for a full target, another whose ends are free runs."""
    times = finish_times([("m", "a", "t", 100.0), ("n", "b", "t", 100.0), ("o", "b", "u", 100.0)], max_pulls=1)
    assert times == pytest.approx({"m": 1.0, "o": 1.0, "n": 2.0})


def test_a_cancelled_transfer_gives_its_share_back() -> None:
    """A cancelled transfer never completes, whether running or queued, and the others speed up."""
    assert finish_times([("m", "a", "t", 100.0), ("n", "b", "t", 100.0)], cancel="m") == pytest.approx({"n": 1.0})
    waiting = finish_times([("m", "a", "t", 100.0), ("n", "b", "t", 100.0)], cancel="n", max_pulls=1)
    assert waiting == pytest.approx({"m": 1.0})


def test_nothing_to_pull_takes_no_time() -> None:
    """A fully cached prefix leaves zero bytes to transfer."""
    assert finish_times([("m", "a", "b", 0.0)]) == {"m": 0.0}
