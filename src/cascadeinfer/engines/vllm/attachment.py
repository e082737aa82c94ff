"""What a further front-end process must know of an instance that another one owns."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Attachment:
    """
    What a further client must know of a running instance; plain values, sent from the owner as JSON.

    Attributes:
        index: Its number; vLLM's metrics carry it as the label `engine`.
        hello: What the instance says of itself; its `engine_id` is another one after each start.
        ready_payload: vLLM's message of readiness, in hexadecimal digits.
        input_address: Where this client binds the socket from which the instance takes requests.
        output_address: Where it binds the one to which the instance sends.
        connector_token: Under which the instance's connector takes words from front ends; nothing that is to be logged.
    """

    index: int
    pid: int | None
    hello: dict[str, Any]
    ready_payload: str
    input_address: str
    output_address: str
    connector_token: str = field(repr=False)
