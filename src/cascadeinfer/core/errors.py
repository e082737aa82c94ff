"""
The project's exceptions, by fault.

`CascadeError` itself is never raised. Each subclass says whose fault it is and carries the facts as attributes, so that
callers need not parse the message.
"""


class CascadeError(Exception):
    """Base of every error this project raises on purpose."""


class ConfigError(CascadeError):
    """
    An option, file or argument given by the operator is wrong.

    Attributes:
        option: The option at fault as the operator writes it, e.g. `--stages`.
        fix: What to write instead.
    """

    def __init__(self, message: str, *, option: str | None = None, fix: str | None = None) -> None:
        self.option = option
        self.fix = fix
        text = message if option is None else f"{option}: {message}"
        super().__init__(text if fix is None else f"{text} ({fix})")


class TraceError(CascadeError):
    """
    A workload trace is malformed.

    Attributes:
        line: One-based line number in the file, or None when the file as a whole is at fault.

    """

    def __init__(self, message: str, *, line: int | None = None) -> None:
        self.line = line
        super().__init__(message if line is None else f"line {line}: {message}")


class ProfileError(CascadeError):
    """A cost profile is unknown, malformed, or belongs to another model or device."""


class EventLogError(CascadeError):
    """An event log cannot be read at all, by this version or in full; the message names file and line."""


class PlanError(CascadeError):
    """
    No stage layout can be planned: an empty histogram, no instances, or a demand above capacity.

    Attributes:
        capacity_per_s: Requests per second that can be served when the demand exceeds that; else None.
    """

    def __init__(self, message: str, *, capacity_per_s: float | None = None) -> None:
        self.capacity_per_s = capacity_per_s
        super().__init__(message)


class PolicyError(CascadeError):
    """A policy asked for something impossible, forgot requests, or failed at one: a bug of the policy."""


class EngineError(CascadeError):
    """
    An engine instance failed or refused.

    Attributes:
        instance_id: The instance at fault.

    """

    def __init__(self, message: str, *, instance_id: str) -> None:
        self.instance_id = instance_id
        super().__init__(f"instance {instance_id}: {message}")


class UnknownInstanceError(CascadeError):
    """There is no instance with this id (any more)."""

    def __init__(self, instance_id: str) -> None:
        super().__init__(f"there is no instance {instance_id}; GET /admin/instances lists them")


class ScalingRefusedError(CascadeError):
    """An instance cannot be added or drained now; the message says why and what to do."""


class RequestRejectedError(CascadeError):
    """
    The policy refused a request for now.

    Attributes:
        retry_after_s: When its client may retry, in seconds from now.
    """

    def __init__(self, reason: str, retry_after_s: float) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(f"overloaded ({reason}); try again in {retry_after_s:g} s")


class RequestIdInUseError(CascadeError):
    """A request has the id of another live request; the live one is not affected."""

    def __init__(self, request_id: str) -> None:
        super().__init__(f"request {request_id} is live already")


class InvalidTransition(CascadeError):  # noqa: N818 - the established name (dask, h11) for this error
    """
    An event arrived that the protocol's table does not allow in this state. The state is unchanged.

    Attributes:
        state: The state's name.
        event: The event's name.
        story: What happened before, oldest first.

    """

    def __init__(self, machine: str, *, state: str, event: str, story: tuple[str, ...] = ()) -> None:
        self.state = state
        self.event = event
        self.story = story
        history = f"; story: {' -> '.join(story)}" if story else ""
        super().__init__(f"{machine}: event {event} is not allowed in state {state}{history}")
