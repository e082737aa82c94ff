"""
KV cache transfers between instances: one link per instance and direction, shared equally by its transfers.

A transfer's rate is `link / max(transfers out of its source, transfers into its target)`: no link is ever
overcommitted, and what one end cannot use is not given to others (simpler than max-min fairness, never faster). Between
instances of different nodes, `link` is that between nodes; what else goes over the same cable is not modelled. At most
`max_pulls` transfers run per instance and direction; the rest start in the order of their requests, as soon as both
ends have a free slot.
"""

from collections.abc import Callable
from dataclasses import dataclass

from cascadeinfer.core.types import InstanceId, MigrationId
from cascadeinfer.sim.kernel import Kernel, Priority


@dataclass(slots=True)
class _Transfer:
    transfer_id: MigrationId
    source_id: InstanceId
    target_id: InstanceId
    bytes_left: float
    on_done: Callable[[MigrationId], None]
    rate: float = 0.0
    since_s: float = 0.0
    version: int = 0


class Network:
    """The links of all instances."""

    def __init__(
        self, kernel: Kernel, link_bytes_per_s: Callable[[InstanceId, InstanceId], float], max_pulls: int
    ) -> None:
        self._kernel = kernel
        self._link_bytes_per_s = link_bytes_per_s
        self._max_pulls = max_pulls
        self._queue: list[_Transfer] = []
        self._running: dict[MigrationId, _Transfer] = {}
        self._outgoing: dict[InstanceId, int] = {}
        self._incoming: dict[InstanceId, int] = {}

    def __len__(self) -> int:
        """Running and queued transfers."""
        return len(self._running) + len(self._queue)

    def start(
        self,
        transfer_id: MigrationId,
        source_id: InstanceId,
        target_id: InstanceId,
        n_bytes: float,
        on_done: Callable[[MigrationId], None],
    ) -> None:
        """Begin a transfer, or queue it; `on_done` is called when the last byte has arrived, unless it is cancelled."""
        self._queue.append(_Transfer(transfer_id, source_id, target_id, n_bytes, on_done))
        self._admit()

    def cancel(self, transfer_id: MigrationId) -> None:
        """Forget a transfer, if there is one."""
        self._queue = [transfer for transfer in self._queue if transfer.transfer_id != transfer_id]
        if (transfer := self._running.get(transfer_id)) is not None:
            self._leave(transfer)
            self._admit()

    def _admit(self) -> None:
        waiting: list[_Transfer] = []
        for transfer in self._queue:
            outgoing = self._outgoing.get(transfer.source_id, 0)
            incoming = self._incoming.get(transfer.target_id, 0)
            if max(outgoing, incoming) >= self._max_pulls:
                waiting.append(transfer)
                continue
            self._outgoing[transfer.source_id] = outgoing + 1
            self._incoming[transfer.target_id] = incoming + 1
            self._running[transfer.transfer_id] = transfer
            transfer.since_s = self._kernel.now_s
        self._queue = waiting
        self._share()

    def _leave(self, transfer: _Transfer) -> None:
        del self._running[transfer.transfer_id]
        transfer.version += 1
        self._outgoing[transfer.source_id] -= 1
        self._incoming[transfer.target_id] -= 1

    def _share(self) -> None:
        """Update the rate of every running transfer and recompute when it will be done."""
        now_s = self._kernel.now_s
        for transfer in self._running.values():
            crowd = max(self._outgoing[transfer.source_id], self._incoming[transfer.target_id])
            rate = self._link_bytes_per_s(transfer.source_id, transfer.target_id) / crowd
            if rate == transfer.rate:
                continue
            transfer.bytes_left = max(0.0, transfer.bytes_left - transfer.rate * (now_s - transfer.since_s))
            transfer.since_s = now_s
            transfer.rate = rate
            transfer.version += 1
            self._kernel.at(
                now_s + transfer.bytes_left / rate, Priority.TRANSFER, self._done, (transfer, transfer.version)
            )

    def _done(self, what: tuple[_Transfer, int]) -> None:
        transfer, version = what
        if version != transfer.version:
            return
        self._leave(transfer)
        self._admit()
        transfer.on_done(transfer.transfer_id)
