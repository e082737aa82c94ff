"""Who is to blame for a failed handshake."""

import pytest

from cascadeinfer.core.handshakes import Diagnosis, diagnose


@pytest.mark.parametrize(
    ("connected", "newcomer_answers", "failed", "newcomer_is_ill", "ill_peers"),
    [
        ([], True, {}, False, ()),  # the first one
        (["a", "b"], True, {}, False, ()),
        ([], True, {"a": False}, False, ("a",)),
        ([], True, {"a": False, "b": False}, False, ("a", "b")),
        (["b"], True, {"a": True}, False, ()),  # neither: only the pair
        ([], True, {"a": True}, False, ()),  # one witness is not enough
        ([], True, {"a": True, "b": False}, False, ("b",)),
        ([], True, {"a": True, "b": True}, True, ()),
        ([], False, {"a": True}, True, ()),
        (["b"], False, {"a": True}, True, ()),
        ([], False, {"a": False}, True, ("a",)),
        (["c"], True, {"a": True, "b": True}, False, ()),
    ],
)
def test_who_is_ill(
    connected: list[str],
    newcomer_answers: bool,
    failed: dict[str, bool],
    newcomer_is_ill: bool,
    ill_peers: tuple[str, ...],
) -> None:
    """A newcomer is blamed only for what is its own, never for peers whose side channels are silent."""
    found = diagnose(connected, newcomer_answers, failed)
    assert isinstance(found, Diagnosis)
    assert (found.newcomer is not None) == newcomer_is_ill
    assert found.peers == ill_peers
