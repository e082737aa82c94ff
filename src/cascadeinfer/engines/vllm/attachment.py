"""What a further front-end process must know of an instance owned by another."""

import msgspec


class Attachment(msgspec.Struct, frozen=True):
    """
    What a further client must know of a running instance; sent by the owner.

    Attributes:
        index: Its number; vLLM's metrics carry it as the label `engine`.
        engine_id: A new one for each start.
        ready_payload: vLLM's ready message.
        input_address: Where this client binds the socket from which the instance takes requests.
        output_address: Where it binds the socket to which the instance sends.
        connector_token: Authenticates front ends' words to the instance's connector; must not be logged.
    """

    index: int
    pid: int | None
    engine_id: str
    ready_payload: bytes
    input_address: str
    output_address: str
    connector_token: str

    def __repr__(self) -> str:
        """Without the token."""
        return f"Attachment(index={self.index}, pid={self.pid}, engine_id={self.engine_id!r})"
