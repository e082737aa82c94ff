"""What every instance starts with: its KV transfer, its environment, and when its start begins."""

import os
from typing import Any

import pytest
from vllm.engine.arg_utils import AsyncEngineArgs

from cascadeinfer.cluster.protocol import Place
from cascadeinfer.cluster.start_turns import StartTurns
from cascadeinfer.engines.vllm import launch
from cascadeinfer.engines.vllm.configuration import KvTransferSettings, environment_of, instance_config
from cascadeinfer.engines.vllm.launch import start_turns

PLACE = Place("0", "here", "0", "127.0.0.1", "lo")


@pytest.fixture
def on_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with devices."""
    monkeypatch.setattr(launch.current_platform, "is_cpu", lambda: False)


def test_settings_of_the_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    NIXL keeps what it knows of a peer however long nothing moves; a lease lasts as long as it was set to; pulls go to
    the platform's own device.
    """
    monkeypatch.setenv("VLLM_SSM_CONV_STATE_LAYOUT", "DS")
    monkeypatch.setattr(AsyncEngineArgs, "create_engine_config", lambda self, **_: self)
    config: Any = instance_config(AsyncEngineArgs(), "0", KvTransferSettings(lease_s=7))
    extra = config.kv_transfer_config.kv_connector_extra_config
    assert extra["engine_ttl"] == 0
    assert extra["kv_lease_duration"] == 7
    assert config.kv_transfer_config.kv_buffer_device == launch.current_platform.device_type


def test_mamba_states_have_the_layout_that_nixl_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless the operator has chosen one."""
    monkeypatch.delenv("VLLM_SSM_CONV_STATE_LAYOUT", raising=False)
    assert environment_of(PLACE)["VLLM_SSM_CONV_STATE_LAYOUT"] == "DS"
    monkeypatch.setenv("VLLM_SSM_CONV_STATE_LAYOUT", "SD")
    assert "VLLM_SSM_CONV_STATE_LAYOUT" not in environment_of(PLACE)


def test_vllm_does_not_choose_another_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where vLLM writes its choice into the environment of whoever makes a configuration, ours is there already."""

    def create(self: Any, **_: Any) -> Any:
        os.environ.setdefault("VLLM_SSM_CONV_STATE_LAYOUT", "SD")  # as `vllm/platforms/cpu.py` does
        return self

    monkeypatch.setenv("VLLM_SSM_CONV_STATE_LAYOUT", "")  # so that it is restored
    monkeypatch.delenv("VLLM_SSM_CONV_STATE_LAYOUT")
    monkeypatch.setattr(AsyncEngineArgs, "create_engine_config", create)
    instance_config(AsyncEngineArgs(), "0", KvTransferSettings())
    assert {**os.environ, **environment_of(PLACE)}["VLLM_SSM_CONV_STATE_LAYOUT"] == "DS"


@pytest.mark.usefixtures("on_devices")
def test_an_instance_sees_its_devices_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Although the operator has named all of them."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    assert environment_of(PLACE)["CUDA_VISIBLE_DEVICES"] == "0"


@pytest.mark.usefixtures("on_devices")
def test_starts_take_turns_on_devices() -> None:
    """Engines there measure free memory at their start."""
    assert isinstance(start_turns(), StartTurns)


def test_starts_take_no_turns_on_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines on a CPU are told how much memory to take, and start in parallel."""
    monkeypatch.setattr(launch.current_platform, "is_cpu", lambda: True)
    assert start_turns() is None
