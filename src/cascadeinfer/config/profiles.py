"""
Finds cost profiles: the shipped ones by name, others by path.

The shipped files are package data in `cascadeinfer/profiles/`; `docs/profiles.md` describes them. A name that contains
a path separator or ends in `.json` is a path; anything else names a shipped profile.
"""

import asyncio
import logging
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from cascadeinfer.config.schema import ServeOptions
from cascadeinfer.core.cost.profile import CostProfile, decode_profile
from cascadeinfer.core.cost.suitability import check_suits
from cascadeinfer.core.errors import ProfileError
from cascadeinfer.core.policies import POLICIES
from cascadeinfer.profiling.verdict import FAIR, Grade, grade_of
from cascadeinfer.runtime.shell import Runtime

logger = logging.getLogger(__name__)

SUFFIX = ".json"
ACCEPT_POOR = "--accept-poor-profile"
"""The option of every command that takes a profile."""


def _shipped() -> Traversable:
    return files("cascadeinfer") / "profiles"


def list_profiles() -> list[str]:
    """Names of the shipped profiles, sorted."""
    return sorted(entry.name.removesuffix(SUFFIX) for entry in _shipped().iterdir() if entry.name.endswith(SUFFIX))


def load_fit_profile(name_or_path: str | Path, *, accept_poor: bool = False) -> CostProfile:
    """
    Load a profile that plans may rest on.

    Args:
        name_or_path: See load_profile.
        accept_poor: Take one whose own measurement says that it is poor.

    Raises:
        ProfileError: See load_profile; or it is poor.
    """
    profile = load_profile(name_or_path)
    if accept_poor or profile.measurement is None or grade_of(profile) is not Grade.POOR:
        return profile
    error = profile.fit_errors[0]
    raise ProfileError(
        f"profile {str(name_or_path)!r} is not fit for use: on steps that its fit has not seen, the median error is "
        f"{error.median:.0%} (at most {FAIR.median:.0%}) and nine in ten are within {error.p90:.0%} (at most "
        f"{FAIR.p90:.0%}); measure longer (cascadeinfer profile --resume --minutes), or use it anyway with "
        f"{ACCEPT_POOR}"
    )


def load_profile(name_or_path: str | Path) -> CostProfile:
    """
    Load a shipped profile by name, or a profile file by path.

    Raises:
        ProfileError: There is no such profile (the message lists those that exist), or the file is unreadable or
            rejected by `decode_profile`.
    """
    name = str(name_or_path)
    if isinstance(name_or_path, Path) or name.endswith(SUFFIX) or "/" in name or "\\" in name:
        try:
            raw = Path(name_or_path).read_bytes()
        except (OSError, ValueError) as error:  # ValueError: a path with a null byte
            raise ProfileError(f"{name!r}: cannot be read: {error}") from error
        return decode_profile(raw, origin=name)
    if name not in list_profiles():
        raise ProfileError(f"no profile is called {name!r}; there are: {', '.join(list_profiles())}")
    return decode_profile((_shipped() / f"{name}{SUFFIX}").read_bytes(), origin=name)


async def check_profile(runtime: Runtime, options: ServeOptions) -> None:
    """
    Compare the profile with every running engine.

    Raises:
        ProfileError: It was measured on another model or set-up than one of them.
    """
    if options.profile is None:
        if POLICIES[options.policy_name()].uses_profile:
            logger.info("no profile: one stage until what steps cost has been learnt")
        return
    profile = load_profile(options.profile)
    told = await asyncio.gather(*(engine.identity() for engine in runtime.live_engines()))
    doubts = [doubt for one in told for doubt in check_suits(profile, one.engine, one.kv_bytes_per_token)]
    for doubt in dict.fromkeys(doubts):
        logger.warning("profile %s is a start value: %s", options.profile, doubt)
