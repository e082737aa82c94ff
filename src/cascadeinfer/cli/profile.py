"""
`cascadeinfer profile [MODEL] --output FILE [any vLLM engine flag]`.

The parser is vLLM's own for engines, with our options added. Everything that can be checked is checked before an engine
starts: the options, the model, the files to write. An interruption loses nothing: the samples are on disk, and
`--resume` continues.
"""

import asyncio
import importlib
import os
import shlex
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from cascadeinfer.core.errors import ConfigError, EngineError
from cascadeinfer.results.output_files import check_output, replacing

if TYPE_CHECKING:
    from rich.table import Table

    from cascadeinfer.config.profile_schema import ProfileOptions
    from cascadeinfer.profiling.log import SampleLog
    from cascadeinfer.profiling.profiler import Found
    from cascadeinfer.profiling.verdict import Verdict

EXIT_INTERRUPTED = 130


def profile(argv: list[str]) -> None:
    """
    Measure, fit, write.

    Args:
        argv: The command line after `profile`.

    Raises:
        ConfigError: An option is invalid, or a file cannot be written.
        EngineError: An engine failed; the measurements so far are kept.
        ProfileError: The measurements do not suffice for a profile.
    """
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # fork is unsafe once threads run
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # the progress bar matters more
    args, options = parse(argv)

    from cascadeinfer.profiling.log import SUFFIX, SampleLog

    check_outputs(options)
    log = SampleLog(options.output_path.with_name(options.output_path.stem + SUFFIX))
    log.check(resume=options.resume)
    try:
        with log:
            found = asyncio.run(_measure(args, options, log, argv))
    except KeyboardInterrupt:
        _tell_how_to_resume(log, argv, "interrupted")
        sys.exit(EXIT_INTERRUPTED)
    except EngineError:
        _tell_how_to_resume(log, argv, "the engine failed")
        raise
    _write(options, found)
    _show(options, found)
    _draw(options, found)


def parse(argv: list[str]) -> "tuple[Namespace, ProfileOptions]":
    """Parse vLLM's engine options and ours; fill in the model."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from cascadeinfer.cli.model_argument import model_of
    from cascadeinfer.config.options import add_options, options_from
    from cascadeinfer.config.profile_schema import ProfileOptions

    parser = FlexibleArgumentParser(
        prog="cascadeinfer profile",
        description="Measure the step times of a model on this machine and write a cost profile.",
    )
    parser.error = _refuse  # instead of hundreds of lines of usage before the message
    parser.add_argument("model_tag", nargs="?", help="Folder or repository; without it the embedded model.")
    AsyncEngineArgs.add_cli_args(parser)
    add_options(parser, ProfileOptions)
    parser.set_defaults(model=None)
    args: Namespace = parser.parse_args(argv)
    options = options_from(args, ProfileOptions)
    args.model, _ = model_of(args, "profiling")
    return args, options


def _refuse(message: str) -> NoReturn:
    raise ConfigError(message, fix="cascadeinfer profile --help lists the options")


def check_outputs(options: "ProfileOptions") -> None:
    """
    Check that the output files can be written, before anything is measured; leaves nothing behind.

    Raises:
        ConfigError: A file cannot be written.
        ModuleNotFoundError: A plot is wanted and matplotlib is missing; the entry point names the extra.
    """
    check_output(options.output_path, "--output")
    if options.plot is not None:
        importlib.import_module("matplotlib")
        check_output(Path(options.plot).expanduser(), "--plot")


async def _measure(args: Namespace, options: "ProfileOptions", log: "SampleLog", argv: list[str]) -> "Found":
    """Start the engines, measure, stop them, fit."""
    from datetime import UTC, datetime

    from cascadeinfer.cli.measuring_bar import MeasuringBar
    from cascadeinfer.profiling.profiler import Profiler, header_of, make_profile, measure_pulls
    from cascadeinfer.profiling.running import running_subjects

    with MeasuringBar() as bar:
        bar.say("starting the engine" if options.instances == 1 else "starting two engines")
        async with running_subjects(args, options.instances) as subjects:
            log.open(header_of(subjects[0]))
            if options.instances > 1:
                await measure_pulls(subjects[0], subjects[1], log, bar.show)
            budget_s = 60.0 * options.minutes
            profiler = Profiler(subjects[0], log, budget_s=budget_s, watch=bar.show, rounds=options.rounds)
            await profiler.measure()
        bar.say("fitting")
        return make_profile(
            subjects[0],
            log,
            n_kinds=len(profiler.kinds),
            command=shlex.join(["cascadeinfer", "profile", *argv]),
            date=datetime.now(tz=UTC).date().isoformat(),
        )


def _tell_how_to_resume(log: "SampleLog", argv: Sequence[str], what: str) -> None:
    if not log.runs:
        sys.stderr.write(f"{what}; nothing had been measured\n")
        return
    again = shlex.join(["cascadeinfer", "profile", *argv, *([] if "--resume" in argv else ["--resume"])])
    sys.stderr.write(f"{what}; {len(log.runs)} batches are kept in {log.path}; to go on: {again}\n")


def _write(options: "ProfileOptions", found: "Found") -> None:
    """Write the whole profile or nothing."""
    from cascadeinfer.core.cost.profile import encode_profile

    try:
        with replacing(options.output_path, "--output") as beside:
            beside.write_bytes(encode_profile(found.profile))
    except ConfigError as error:
        error.add_note("--resume does not measure again")
        raise


def _show(options: "ProfileOptions", found: "Found") -> None:
    from cascadeinfer.cli.tables import console
    from cascadeinfer.profiling.verdict import judge

    out = console()
    out.print(_coefficients(found))
    out.print(_errors(found))
    measured = found.profile.measurement
    assert measured is not None
    out.print(
        f"{measured.steps} steps of {measured.batches} kinds of batch in {measured.measuring_s:.0f} s, "
        f"{measured.outliers} outliers left out; {measured.left_out} kinds did not fit into the time; "
        f"step seconds are {measured.step_share:.0%} of the wall time",
        highlight=False,
    )
    for note in found.profile.provenance.notes:
        out.print(f"note: {note}", highlight=False)
    verdict = judge(found.profile, found.fit.samples)
    for line in verdict_lines(verdict):
        out.print(line, highlight=False, markup=False)
    out.print(f"\n{what_next(verdict, options.output_path)}", highlight=False, markup=False)


def what_next(verdict: "Verdict", path: Path) -> str:
    """What to do with the file: plan with it, unless plan would refuse it."""
    from cascadeinfer.config.profiles import ACCEPT_POOR
    from cascadeinfer.profiling.verdict import Grade

    if verdict.grade is Grade.POOR:
        return f"written to {path}; not fit for use: plan, simulate and serve refuse it without {ACCEPT_POOR}"
    return f"written to {path}; use it: cascadeinfer plan --profile {path} ..."


def verdict_lines(verdict: "Verdict") -> list[str]:
    """How good the profile is, what is missing, and what to do about it, one sentence each."""
    error, noise = verdict.held_out, verdict.noise
    varies = "" if noise is None else f"; the machine itself varies by {noise.median:.1%} from round to round"
    lines = [f"steps not seen by the fit: median error {error.median:.1%}, nine in ten within {error.p90:.1%}{varies}"]
    lines += [f"not measured: {what}" for what in verdict.unmeasured]
    to_do = "; ".join(verdict.remedies)
    lines.append(
        f"verdict: {verdict.grade.name.lower()}: {verdict.grade.value}" + (f". To do: {to_do}" if to_do else "")
    )
    return lines


def _draw(options: "ProfileOptions", found: "Found") -> None:
    """Draw the plot if asked for. It comes after the figures, so that a full disk cannot cost them."""
    if options.plot is None:
        return
    from cascadeinfer.figures.drawing import save
    from cascadeinfer.figures.fit_figure import fit_figure

    title = f"{found.profile.model} on {found.profile.device}, {found.profile.backend} (measured)"
    figure = fit_figure(found.fit.samples, found.fit.predicted_s, found.fit.spread, title)
    save(figure, Path(options.plot).expanduser())


def _coefficients(found: "Found") -> "Table":
    from rich.table import Table

    table = Table(title=f"{found.profile.model} on {found.profile.device}: {found.fit.form}")
    for heading in ("coefficient", "value", "standard error"):
        table.add_column(heading, justify="left" if heading == "coefficient" else "right")
    for name, error in found.profile.coefficient_errors.items():
        value = getattr(found.profile.step_model, name)
        if name.endswith("_s"):
            table.add_row(name.removesuffix("_s"), f"{1e6 * value:,.4g} us", f"{1e6 * error:.2g}")
        else:
            table.add_row(name, f"{value:,.4g}", f"{error:.2g}")
    return table


def _errors(found: "Found") -> "Table":
    from rich.table import Table

    table = Table(title="relative error of the predicted step time")
    for heading in ("batches", "samples", "median", "p90", "bias"):
        table.add_column(heading, justify="left" if heading == "batches" else "right")
    for error in found.profile.fit_errors:
        table.add_row(error.part, str(error.samples), f"{error.median:.1%}", f"{error.p90:.1%}", f"{error.bias:+.1%}")
    return table
