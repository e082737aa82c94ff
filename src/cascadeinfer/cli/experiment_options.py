"""What `plan`, `simulate` and `sweep` share: option declarations, parsers, and checks beyond typer's bounds."""

import importlib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from cascadeinfer.core.errors import ConfigError

if TYPE_CHECKING:
    from cascadeinfer.core.plan.objective import Objective
    from cascadeinfer.evaluation.setting import Setting
    from cascadeinfer.results.summary import Slo
    from cascadeinfer.workload.drawing import ArrivalLaw

Profile = Annotated[str, typer.Option(help="Cost profile: a shipped name or a JSON file.")]
AcceptPoorProfile = Annotated[
    bool,
    typer.Option("--accept-poor-profile", help="Take a profile whose own measurement says that it is not fit for use."),
]
TraceFile = Annotated[
    Path,
    typer.Option(
        help="Trace file (.csv or .jsonl, also .gz), or `sample` for the one that is shipped; its lengths count."
    ),
]
Rate = Annotated[float, typer.Option(help="Requests per second.")]
Instances = Annotated[int, typer.Option(help="Instances of the model.")]
ObjectiveName = Annotated[
    str | None,
    typer.Option(
        help=(
            "What plans minimise: `latency` (mean normalised latency), `balanced` (a quarter that, the rest latency "
            "per output token of all requests), `ttft-tpot` (TTFT + 10 x TPOT), `slo` (misses). Default: `balanced` "
            "for plans with roles (--roles, the policy `roles`), `latency` for others."
        )
    ),
]
Margin = Annotated[float, typer.Option(help="Gain that several stages must bring over one; 0.03 is 3 %.")]
Context = Annotated[int, typer.Option(help="Longest sequence; longer requests are cut, and counted.")]
TtftSlo = Annotated[float, typer.Option(help="SLO: maximum seconds to the first token.")]
TpotSlo = Annotated[float, typer.Option(help="SLO: maximum seconds per token after it.")]
Policies = Annotated[
    str, typer.Option(help="Policies, separated by commas; cascade-no-refine and the like switch a part off.")
]
Seeds = Annotated[int, typer.Option(help="Runs per policy, with seeds 0, 1, ...")]
Requests = Annotated[int | None, typer.Option(help="Requests per run.")]
DurationS = Annotated[float | None, typer.Option(help="Seconds of arrivals per run, instead of --requests.")]
WarmUp = Annotated[
    float,
    typer.Option(help="Share of the requests, from the first on, that the figures exclude (the cluster is filling)."),
]
Arrivals = Annotated[
    str,
    typer.Option(
        help=(
            "When requests come: `poisson`, `gamma:CV` (bursts above 1), or `recorded` "
            "(the trace's own times at --rate)."
        )
    ),
]
PrefixCaching = Annotated[
    bool, typer.Option("--prefix-caching", help="Prompts share KV blocks by the trace's prefix hashes.")
]
PrefixHashes = Annotated[
    Path | None, typer.Option(help="JSONL file with `row_id` and `hash_ids` for a CSV trace; implies --prefix-caching.")
]
Precopy = Annotated[
    bool,
    typer.Option("--precopy", help="Full blocks of requests that move go ahead while they decode, as on a server."),
]
Overload = Annotated[
    bool, typer.Option("--overload", help="Run a rate above capacity, with the plan for what can be served.")
]
TokenBudgets = Annotated[
    str | None,
    typer.Option(
        "--max-num-batched-tokens",
        help=(
            "Run each policy at each of these token budgets of a step, e.g. 512,1024,2048,8192, and say which suits it "
            "best. Default: the profile's."
        ),
    ),
]
PlotPrefix = Annotated[
    str | None, typer.Option(help="Prefix of PNG files: PREFIX-cdf.png, PREFIX-timeline-POLICY.png.")
]
Jobs = Annotated[int, typer.Option(help="Processes; at most as many as processors.")]
EventLogFile = Annotated[
    Path | None,
    typer.Option(
        help=(
            "Write each run's event log here, for `replay`; with several runs as NAME-POLICY-SEED. "
            "A name in .gz is compressed."
        )
    ),
]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Also write all figures to this JSON file.")]

DEFAULT_CONTEXT: Final = 131_072
DEFAULT_MARGIN: Final = 0.03
DEFAULT_POLICIES: Final = "cascade,least_loaded,round_robin"
SLO_POLICY: Final = "cascade"
TTFT_WEIGHT: Final = 1.0
TPOT_WEIGHT: Final = 10.0


def slo_of(ttft_s: float, tpot_s: float) -> "Slo":
    """
    The SLO.

    Raises:
        ConfigError: A limit is not positive and finite.
    """
    from cascadeinfer.results.summary import Slo

    for value, option in ((ttft_s, "--ttft-slo"), (tpot_s, "--tpot-slo")):
        if not (math.isfinite(value) and value > 0.0):
            raise ConfigError(f"{value} is not a positive number", option=option, fix="seconds")
    return Slo(ttft_s, tpot_s)


def objective_of(name: str | None, slo: "Slo") -> "Objective | None":
    """
    The objective of this name; None: the default of each kind of plan.

    Raises:
        ConfigError: There is no such objective.
    """
    from cascadeinfer.core.plan import objective

    known: dict[str | None, Objective | None] = {
        None: None,
        "latency": objective.MeanNormalizedLatency(),
        "balanced": objective.BalancedLatency(),
        "ttft-tpot": objective.WeightedLatency(TTFT_WEIGHT, TPOT_WEIGHT),
        "slo": objective.SloAttainment(slo.ttft_s, slo.tpot_s),
    }
    if name not in known:
        raise ConfigError(f"no objective {name!r}", option="--objective", fix="latency, balanced, ttft-tpot or slo")
    return known[name]


def at_least_one(**options: int) -> None:
    """
    Check that counts are at least 1; the keywords are the options' names.

    Raises:
        ConfigError: A count is below 1.
    """
    for name, value in options.items():
        if value < 1:
            raise ConfigError(f"{value} is not at least 1", option=f"--{name.replace('_', '-')}")


def not_negative(**options: int) -> None:
    """
    Check that counts are not negative; the keywords are the options' names.

    Raises:
        ConfigError: A count is negative.
    """
    for name, value in options.items():
        if value < 0:
            raise ConfigError(f"{value} is negative", option=f"--{name.replace('_', '-')}")


def positive(value: float, option: str) -> None:
    """
    Check that a value is positive and finite.

    Raises:
        ConfigError: It is not.
    """
    if not (math.isfinite(value) and value > 0.0):
        raise ConfigError(f"{value} is not a positive number", option=option)


def share(value: float, option: str) -> None:
    """
    Check that a value lies in [0, 1).

    Raises:
        ConfigError: It does not.
    """
    if not (math.isfinite(value) and 0.0 <= value < 1.0):
        raise ConfigError(f"{value} is not in [0, 1)", option=option)


def requests_of(requests: int | None, duration_s: float | None, rate_rps: float, *, default: int) -> int:
    """
    Number of requests of a run, from `--requests` or from the duration for which they arrive.

    Raises:
        ConfigError: Both are given, or one is out of bounds.
    """
    if duration_s is not None:
        if requests is not None:
            raise ConfigError("a run has a number of requests or a duration, not both", option="--duration-s")
        if not (math.isfinite(duration_s) and duration_s > 0.0):
            raise ConfigError(f"{duration_s} is not a positive number", option="--duration-s", fix="seconds")
        return max(1, round(rate_rps * duration_s))
    count = default if requests is None else requests
    at_least_one(requests=count)
    return count


def arrivals_of(text: str) -> "ArrivalLaw":
    """
    The arrival process named by the option.

    Raises:
        ConfigError: The name is unknown, or its number is invalid.
    """
    from cascadeinfer.workload.drawing import ArrivalLaw

    kind, _, number = text.partition(":")
    if text in {"poisson", "recorded"}:
        return ArrivalLaw("poisson" if text == "poisson" else "recorded")
    try:
        cv = float(number)
    except ValueError:
        cv = math.nan
    if kind != "gamma" or not (math.isfinite(cv) and cv > 0.0):
        raise ConfigError(
            f"{text!r} is no law of arrivals", option="--arrivals", fix="poisson, recorded, or e.g. gamma:2"
        )
    return ArrivalLaw("gamma", cv)


def prefixes_of(setting: "Setting", wanted: bool, hashes: Path | None) -> bool:
    """
    Whether prompts share prefixes.

    Raises:
        ConfigError: They should, but the trace has no hashes.
    """
    if wanted and setting.trace.prefix_hashes is None:
        fix = "name them with --prefix-hashes, or use Mooncake's JSONL"
        raise ConfigError("the trace has no prefix hashes", option="--prefix-caching", fix=fix)
    return wanted or hashes is not None


def words_of(text: str) -> list[str]:
    """The comma-separated words, without empty ones."""
    return [word.strip() for word in text.split(",") if word.strip()]


def token_budgets_of(text: str | None) -> list[int | None]:
    """
    Token budgets from a comma-separated list; without one, only that of the profile (None).

    Raises:
        ConfigError: One is no whole number of at least 1, or is named twice.
    """
    if text is None:
        return [None]
    option, fix = "--max-num-batched-tokens", "e.g. 512,1024,2048,8192"
    budgets: list[int | None] = []
    for word in words_of(text):
        if not (word.isdecimal() and int(word) > 0):
            raise ConfigError(f"{word!r} is not a whole number of at least 1", option=option, fix=fix)
        if int(word) in budgets:
            raise ConfigError(f"{word} is named twice", option=option, fix=fix)
        budgets.append(int(word))
    if not budgets:
        raise ConfigError("no token budget", option=option, fix=fix)
    return budgets


def rates_of(text: str) -> list[float]:
    """
    Rates from `lo:hi:n` (n equally spaced rates, both ends included) or from an increasing, comma-separated list.

    Raises:
        ConfigError: The text is neither, the rates do not increase, or one is not positive and finite.
    """
    fix = "lo:hi:n, e.g. 5:40:8, or a list, e.g. 5,10,20"
    try:
        if ":" in text:
            low, high, count = text.split(":")
            n = int(count)
            if n < 2:
                raise ConfigError(f"{n} rates between two ends", option="--rates", fix="at least 2")
            ends = (float(low), float(high))
            rates = [ends[0] + (ends[1] - ends[0]) * i / (n - 1) for i in range(n)]
        else:
            rates = [float(word) for word in words_of(text)]
    except ValueError:
        raise ConfigError(f"{text!r} are no rates", option="--rates", fix=fix) from None
    if not rates:
        raise ConfigError("no rates", option="--rates", fix=fix)
    for rate in rates:
        if not (math.isfinite(rate) and rate > 0.0):
            raise ConfigError(f"{rate} is not a positive number", option="--rates", fix=fix)
    if any(b <= a for a, b in itertools.pairwise(rates)):
        raise ConfigError(f"{text!r} does not increase", option="--rates", fix=fix)
    return rates


def check_outputs(files: Mapping[str, Path | None], **packages: bool) -> None:
    """
    Fail before anything is computed if an output file could not be written.

    Args:
        files: Output files by the option that names them.
        packages: For each optional package, whether it is needed to write them.

    Raises:
        ConfigError: A file is a folder, its folder is missing, or nothing can be written there.
        ModuleNotFoundError: A package is not installed; the entry point names the extra.
    """
    from cascadeinfer.results.output_files import check_output

    for option, file in files.items():
        if file is not None:
            check_output(file, option)
    for package, needed in packages.items():
        if needed:
            importlib.import_module(package)


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """
    Write one indented JSON object; NaN and infinities, which JSON lacks, become null.

    Raises:
        ConfigError: The file cannot be written; an earlier file of that name is left untouched.
    """
    from cascadeinfer.results.output_files import replacing

    text = json.dumps(_plain(content), indent=2, allow_nan=False) + "\n"
    with replacing(file, "--json") as beside:
        beside.write_text(text, encoding="utf-8")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def tell_short_runs(rate_rps: float, requests: int, slowest_e2e_s: float) -> None:
    """Warn on standard error that a run ended before the cluster had filled."""
    from cascadeinfer.results.summary import SHORT_RUN

    if requests < SHORT_RUN * rate_rps * slowest_e2e_s:
        typer.echo(
            f"note: requests came for {requests / rate_rps:.3g} s at {rate_rps:g}/s and took up to "
            f"{slowest_e2e_s:.3g} s on average: in a run this short the cluster does not fill; "
            "raise --requests or --duration-s",
            err=True,
        )


def setting_of(
    profile: str,
    trace: Path,
    instances: int,
    context: int,
    objective: "Objective | None",
    margin: float,
    accept_poor_profile: bool,
    hashes: Path | None = None,
) -> "Setting":
    """
    The setting of these options; from now on, a note on standard error says when numba compiles.

    Raises:
        ConfigError, ProfileError, TraceError: See `load_setting`.
    """
    from cascadeinfer.evaluation.compiling import say_when_compiling
    from cascadeinfer.evaluation.setting import load_setting

    say_when_compiling(lambda sentence: typer.echo(f"note: {sentence}", err=True))
    return load_setting(
        profile, trace, instances, context, objective, margin, hashes, accept_poor_profile=accept_poor_profile
    )


def tell_notes(setting: "Setting") -> None:
    """Note on standard error what was cut, and whether the profile was measured."""
    for note in setting.notes():
        typer.echo(f"note: {note}", err=True)
    if setting.profile.derived:
        typer.echo(
            f"note: profile {setting.profile.name} is derived: a main part of it "
            f"was not measured on {setting.profile.device}",
            err=True,
        )
