"""The report: all verdicts and facts, nothing secret, written whole or not at all."""

import json
from pathlib import Path

import pytest
from made_up_facts import HOST, MACHINE

from cascadeinfer.core.errors import ConfigError
from cascadeinfer.doctor.facts import End, Gathered
from cascadeinfer.doctor.report import report_of, secrets_in, write_report
from cascadeinfer.doctor.verdicts import fault, ok, warning

SECTIONS = {"this machine": [ok("host name", "node7"), fault("memory", "none", "buy some")]}
LEAKED = "hf_abcdefgh"


def made(*gathered: Gathered) -> dict[str, object]:
    """A report on two checks."""
    return report_of(SECTIONS, list(gathered), ["cascadeinfer", "doctor"])


def test_it_has_verdicts_and_facts(tmp_path: Path) -> None:
    """A fix where there is one; each fact with its type; of a part that failed, its end."""
    failed = Gathered("trial", End.FAILED, (HOST,), "starting", 1, 2.0, 300.0, "Traceback")
    write_report(tmp_path / "r.json", made(Gathered("machine", End.DONE, (MACHINE,)), failed), {})
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["verdicts"] == {"ok": 1, "fault": 1}
    assert report["sections"]["this machine"] == [
        {"name": "host name", "verdict": "ok", "found": "node7"},
        {"name": "memory", "verdict": "fault", "found": "none", "fix": "buy some"},
    ]
    assert report["parts"]["machine"]["facts"][0]["type"] == "Machine"
    assert "output" not in report["parts"]["machine"]
    assert report["parts"]["trial"]["output"] == "Traceback"
    assert report["parts"]["trial"]["doing"] == "starting"


def test_keys_are_struck_out(tmp_path: Path) -> None:
    """Wherever a library has printed one; and the home folder's name is left out."""
    environment = {"HF_TOKEN": LEAKED, "MY_API_KEY": "sk-1234567", "PASSWORD": "ab", "LANG": "C.UTF-8"}
    output = f"cannot log in with {LEAKED} or sk-1234567 from {Path.home()}/x (C.UTF-8, ab)"
    write_report(tmp_path / "r.json", made(Gathered("trial", End.FAILED, output=output)), environment)
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["parts"]["trial"]["output"] == "cannot log in with *** or *** from ~/x (C.UTF-8, ab)"
    assert secrets_in(environment) == [LEAKED, "sk-1234567"]


def test_an_old_report_survives_a_failure(tmp_path: Path) -> None:
    """When the folder is gone, for instance."""
    with pytest.raises(ConfigError, match="--json: cannot write"):
        write_report(tmp_path / "none" / "r.json", made(), {})


def test_a_warning_has_a_fix() -> None:
    """As a fault has; neither can be made without one."""
    assert warning("a", "b", "c").fix == "c"
