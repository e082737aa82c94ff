"""The systemd unit: accepted by systemd, with options that `serve` takes and times that fit its drain."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from cascadeinfer.cli.main import EXIT_OPERATOR
from cascadeinfer.config.schema import ServeOptions
from support.shown_commands import ROOT, parsed_by_serve

pytestmark = pytest.mark.timeout(900)  # vLLM's parser takes a while to import on a busy machine

FOLDER = ROOT / "deploy" / "systemd"
UNIT = (FOLDER / "cascadeinfer.service").read_text(encoding="utf-8")
FLEET = (FOLDER / "fleet.conf").read_text(encoding="utf-8")
ENVIRONMENT = (FOLDER / "cascadeinfer.env").read_text(encoding="utf-8")


def value_of(name: str) -> str:
    """The one value of a setting of the unit."""
    (value,) = re.findall(rf"^{name}=(.*)$", UNIT, flags=re.MULTILINE)
    return str(value)


@pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze (Debian: systemd) is not installed"
)
@pytest.mark.parametrize("with_fleet", [False, True])
def test_systemd_accepts_the_unit(tmp_path: Path, with_fleet: bool) -> None:
    """`systemd-analyze verify` finds nothing to say; the program is replaced by one that exists here."""
    unit = tmp_path / "cascadeinfer.service"
    if with_fleet:
        more = tmp_path / "cascadeinfer.service.d" / "fleet.conf"
        more.parent.mkdir()
        more.write_text(FLEET)
    unit.write_text(UNIT.replace("/opt/cascadeinfer/bin/cascadeinfer", "/bin/true"))
    verified = subprocess.run(["systemd-analyze", "verify", unit], check=False, capture_output=True, text=True)
    assert (verified.returncode, verified.stdout, verified.stderr) == (0, "", "")


def test_the_options_are_those_of_serve() -> None:
    """The command is `serve` with the options of the environment file."""
    assert value_of("ExecStart").endswith("cascadeinfer serve $CASCADEINFER_OPTIONS")
    (options,) = re.findall(r"^CASCADEINFER_OPTIONS=(.*)$", ENVIRONMENT, flags=re.MULTILINE)
    parsed_by_serve(shlex.split(options))


def test_the_log_lies_where_the_unit_may_write() -> None:
    """The event log of the options is in the folder that systemd makes for logs."""
    assert f"--event-log /var/log/{value_of('LogsDirectory')}/" in ENVIRONMENT


def test_the_unit_fits_the_exit_codes_and_the_drain() -> None:
    """A wrong option is not retried, a stop during the start is no failure, and a drain is not cut short."""
    assert int(value_of("RestartPreventExitStatus")) == EXIT_OPERATOR
    assert "143" in value_of("SuccessExitStatus").split()
    assert int(value_of("TimeoutStopSec")) > ServeOptions().drain_timeout_s
    assert value_of("KillMode") == "mixed"


def test_the_page_installs_these_files() -> None:
    """docs/deploy.md copies both files to the places that the unit names."""
    page = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
    assert f"deploy/systemd/cascadeinfer.env {value_of('EnvironmentFile')}\n" in page
    assert "deploy/systemd/cascadeinfer.service /etc/systemd/system/cascadeinfer.service\n" in page


def test_a_fleet_survives_the_end_of_its_unit() -> None:
    """Nothing but the server ends with it, and the fleet's folder is where the next server finds it."""
    assert "KillMode=process\n" in FLEET
    (folder,) = re.findall(r"^Environment=VLLM_RPC_BASE_PATH=/run/(.*)$", FLEET, flags=re.MULTILINE)
    assert f"RuntimeDirectory={folder}\n" in FLEET
    assert "RuntimeDirectoryPreserve=yes\n" in FLEET
    page = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
    assert "deploy/systemd/fleet.conf /etc/systemd/system/cascadeinfer.service.d/fleet.conf\n" in page
