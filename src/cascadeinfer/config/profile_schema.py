"""The options of `cascadeinfer profile` beyond vLLM's own, each defined once."""

from dataclasses import dataclass
from pathlib import Path

from cascadeinfer.config.options import check_bounds, option


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileOptions:
    """Options of `profile`."""

    output: str = option("profile.json", "The profile to write; samples go to NAME.samples.jsonl beside it.")
    minutes: float = option(
        5.0, "Time for measuring, not counting the engine's start; larger batches need more.", low=0.01, high=1440.0
    )
    instances: int = option(
        1,
        "2: also measure the transfer of KV between two instances, which share the machine as in serve.",
        low=1,
        high=2,
    )
    rounds: int = option(3, "How often each batch is measured at most.", low=1, high=100)
    resume: bool = option(False, "Continue with the samples of an interrupted run, or add to those of a complete one.")
    plot: str | None = option(None, "Draw measured against predicted step times (PNG).")

    def __post_init__(self) -> None:
        """Check every bound; raises ConfigError that names the option."""
        check_bounds(self)

    @property
    def output_path(self) -> Path:
        """Path of the profile to write."""
        return Path(self.output).expanduser()
