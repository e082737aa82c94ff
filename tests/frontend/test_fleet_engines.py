"""Which engines a server starts besides those of its fleet that it finds alive."""

import pytest

from cascadeinfer.frontend.fleet_engines import missing


@pytest.mark.parametrize(
    ("n_instances", "found", "started"),
    [
        (2, (), ["0", "1"]),
        (2, ("1",), ["0"]),
        (3, ("0", "1"), ["2"]),
        (2, ("2", "3"), []),
        (2, ("0", "1", "2"), []),
        (3, ("1", "5"), ["0"]),
    ],
)
def test_as_many_as_asked_for_whatever_their_names(n_instances: int, found: tuple[str, ...], started: list[str]) -> None:
    """After adds, drains and updates, those that live have other numbers than those of a start."""
    assert missing(n_instances, found) == started
