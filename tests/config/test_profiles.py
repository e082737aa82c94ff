"""Finding profiles: the shipped ones, files, and names that do not exist."""

import importlib
from pathlib import Path

import pytest

from cascadeinfer.config.profiles import list_profiles, load_profile
from cascadeinfer.core.cost.latency import BatchFeatures
from cascadeinfer.core.errors import ProfileError

ROOT = Path(__file__).parents[2]
MEASUREMENTS = ROOT.parent / "shared" / "data" / "gpu"
"""The measurements, which are too large for the repository."""
DEVICES = ("h100", "h200", "a100", "l40s", "b200", "h20", "l40")
MODELS = ("llama-3.1-8b", "qwen3-32b", "llama-3.1-70b-tp4", "qwen3-30b-a3b")


def test_every_device_has_every_model() -> None:
    """Each device and model is shipped; the name gives the tensor-parallel degree where one device is not enough."""
    names = list_profiles()
    for device in DEVICES:
        for model in MODELS:
            assert any(name == f"{device}-{model}" or name.startswith(f"{device}-{model}-tp") for name in names)


@pytest.mark.parametrize("name", list_profiles())
def test_shipped_profile_is_sound(name: str) -> None:
    """A shipped profile decodes under its own name, holds a 32K request, and gives a plausible decode step."""
    profile = load_profile(name)
    assert profile.name == name
    assert profile.capacity.kv_tokens >= 32_768
    assert profile.name.endswith(f"-tp{profile.tensor_parallel}") == (profile.tensor_parallel > 1)
    assert profile.derived == any(part in name for part in ("h20-", "l40-", "a3b", "b200"))
    one = profile.step_model.step_s(BatchFeatures(1, 1_000, 1_000))
    assert 2e-3 < one < 80e-3
    assert profile.step_model.step_s(BatchFeatures(0, 0, 0, 2_048, 2_048 * 2_049 / 2)) > one
    assert profile.provenance.notes
    assert profile.provenance.sources


@pytest.mark.parametrize("name", [n for n in list_profiles() if not n.startswith(("h20-", "l40-"))])
def test_decode_attention_is_within_five_percent_of_the_data(name: str) -> None:
    """On every device with measured cells beyond the L2 cache the median error of decode attention is at most 5 %."""
    error = load_profile(name).fit_errors[0]
    assert error.part.startswith("decode attention")
    assert error.measured
    assert error.samples >= 15
    assert error.median <= 0.05


@pytest.mark.parametrize("name", ["a100-llama-3.1-8b", "h100-llama-3.1-70b-tp4"])
def test_shipped_file_is_what_the_script_makes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Building a profile again from the measurements gives the shipped coefficients, errors and capacity."""
    if not MEASUREMENTS.is_dir():
        pytest.skip(f"the published measurements are not here: {MEASUREMENTS}")
    monkeypatch.syspath_prepend(str(ROOT / "tools" / "profiles"))
    script = importlib.import_module("build_profiles")
    shipped = load_profile(name)
    device = script.DEVICE_OF[name.split("-", maxsplit=1)[0]]
    model = next(m for m in script.MODELS if m.name in name)
    built, _ = script.build(script.setting_of(device, model), shipped.provenance.date)
    assert built.capacity == shipped.capacity
    assert built.provenance == shipped.provenance
    assert built.step_model.coefficients() == pytest.approx(shipped.step_model.coefficients(), rel=1e-3)
    assert [e.median for e in built.fit_errors] == pytest.approx([e.median for e in shipped.fit_errors], rel=1e-2)


def test_unknown_name_lists_what_exists() -> None:
    """The error for an unknown name lists every name there is."""
    with pytest.raises(ProfileError, match=r"no profile is called 'h900'; there are: .*h100-llama-3\.1-8b.*l40s"):
        load_profile("h900")


def test_profile_by_path(tmp_path: Path) -> None:
    """A file anywhere loads like a shipped one; the error for a missing or broken one names it."""
    source = ROOT / "src" / "cascadeinfer" / "profiles" / "h100-llama-3.1-8b.json"
    copy = tmp_path / "mine.json"
    copy.write_bytes(source.read_bytes())
    assert load_profile(copy) == load_profile("h100-llama-3.1-8b") == load_profile(str(copy))
    for unreadable in (tmp_path / "absent.json", tmp_path, "null\0byte.json"):
        with pytest.raises(ProfileError, match="cannot be read"):
            load_profile(unreadable)
    copy.write_text("{")
    with pytest.raises(ProfileError, match=r"mine\.json"):
        load_profile(str(copy))
