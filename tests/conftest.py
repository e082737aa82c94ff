"""Shared fixtures. Property tests run a fixed, derandomised set of examples, so that CI is repeatable."""

import signal
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("ci", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ci")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of the chaos and fuzz tests (duration or number, seed, file for figures) and of the page's figures."""
    group = parser.getgroup("chaos")
    group.addoption("--chaos-s", type=float, default=None, help="seconds of the chaos test; without it, it is skipped")
    group.addoption("--chaos-seed", type=int, default=1, help="seed of the chaos test")
    group.addoption("--chaos-stages", default="0-64:1,64-:2", help="stages of the chaos test's three instances")
    group.addoption("--chaos-report", default=None, help="file for the figures of the chaos test, as JSON")
    group = parser.getgroup("fuzz")
    group.addoption("--fuzz-examples", type=int, default=None, help="bodies per surface and mode; CI sends a few")
    group.addoption("--fuzz-report", default=None, help="file for the figures of the fuzz test, as JSON")
    group = parser.getgroup("ray")
    group.addoption("--ray", action="store_true", help="run the tests with Ray on three network namespaces")
    group.addoption("--ray-report", default=None, help="file for what streams saw of a cluster's faults, as JSON")
    group = parser.getgroup("page")
    group.addoption("--page-figures", default=None, help="folder for the figures of the operator's page, as PNG")


@pytest.fixture(scope="session", autouse=True)
def forked_engines_start() -> None:
    """
    Let engines start although they are forked from this process, which has imported numba.

    vLLM's CPU worker looks at the `__dict__` of every attribute of every imported module. For llvmlite's library
    object, that is a wrapped C function (by the object's own attribute lookup), which kills the worker. Here it gets an
    empty dictionary.
    """
    from llvmlite.binding import ffi

    ffi.lib._fntab["__dict__"] = {}


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Let started commands receive SIGINT, which a shell makes its background programs ignore."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
