"""
Keeps each request with the version of the model that has written its output.

During a rolling update to another version (`runtime/rolling.py`), instances of both serve. A request without output may
run on either. One that has output, and has to leave its instance, continues on an instance of the same version only:
policies choose among those (`core/view.py`), and it waits while they are down. When the last one is replaced, or where
a policy chooses another one all the same, the request ends with an error. Its client can send it again; half an answer
of each version would go unnoticed.
"""

from collections.abc import Callable
from typing import Final

from cascadeinfer.core.types import InstanceId
from cascadeinfer.engines.protocol import Engine
from cascadeinfer.runtime.fleet import Fleet
from cascadeinfer.runtime.instance_state import Deed
from cascadeinfer.runtime.streams import Stream, StreamTable

OUTCOME: Final = "replaced"
"""The metric label of its end."""
SENTENCE: Final = "model_replaced: the version of the model that began this answer has been replaced; send it again"
"""The message to its client, with HTTP 500."""


class Versions:
    """See the module header, and `cascadeinfer.runtime.fleet.FleetWatcher`."""

    def __init__(self, fleet: Fleet, streams: StreamTable, end: Callable[[Stream, str, str], None]) -> None:
        """
        Args:
            fleet: The instances; this object watches them.
            streams: The live requests.
            end: Ends a request, with the metric label of its end and a sentence for its client.
        """
        self._fleet = fleet
        self._streams = streams
        self._end = end
        streams.version_of = fleet.model_version_of
        fleet.watchers.append(self)

    def may_run(self, stream: Stream, instance_id: InstanceId) -> bool:
        """Whether a request that is on no instance may continue on this one."""
        return stream.model_version in {None, self._fleet.model_version_of(instance_id)}

    def strand(self, stream: Stream) -> None:
        """End a request that cannot continue with its version."""
        self._end(stream, OUTCOME, SENTENCE)

    def instance_joins(self, engine: Engine) -> None:
        """See FleetWatcher."""

    def instance_left(self, instance_id: InstanceId) -> None:  # noqa: ARG002 - see FleetWatcher
        """End what waits for a version that is gone."""
        staying = {record.build.model_version for record in self._fleet if record.life.allows(Deed.BE_DRAINED)}
        for stream in self._streams:
            waits = stream.instance_id is None and stream.migration is None
            if waits and stream.model_version is not None and stream.model_version not in staying:
                self.strand(stream)
