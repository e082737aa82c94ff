"""
The paper's evaluation, simulated: run the grid, write `docs/evaluation.md` and its figures.

    make figures            (or: .venv/bin/python benchmarks/evaluation/run.py --traces ../shared/data/traces)

Cells in the results file that were made by the current code are not run again, so an interrupted run resumes where it
was. The whole grid takes one to two hours on two cores. `--only TEXT` runs the cells whose name contains the text;
`--report` only writes the page. `--tuned` runs the comparison with rivals at their best token budget instead (see
`tuned.py`), which takes as long again.
"""

import argparse
import os
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

from cells import Cell, Figures, Results, append, fingerprint, read, run_cell, write
from grid import cells, tuned_cells
from page import write_report
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "evaluation.csv"
PAGE = ROOT / "docs" / "evaluation.md"


def main() -> int:
    """Run what is missing, then report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument(
        "--traces", type=Path, default=ROOT.parent / "shared" / "data" / "traces", help="folder with NAME.csv.gz"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--only", default="", help="cells whose name contains this text")
    parser.add_argument("--keep", action="store_true", help="keep cells that older code made")
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--tuned", action="store_true", help="run everybody at each token budget instead of the grid")
    parser.add_argument("--seed", type=int, help="run only the cells with this seed")
    options = parser.parse_args()
    results = read(RESULTS)
    if not options.report:
        if not options.traces.is_dir():
            parser.error(f"--traces: there is no folder {options.traces}")
        fill(results, options)
        write(RESULTS, results, [*cells(), *tuned_cells()])
    order = [cell for cell in cells() if cell in results]
    if not order:
        parser.error("there are no results to report")
    if len(order) < len(cells()):
        print(f"{len(cells()) - len(order)} of {len(cells())} cells are missing: the page says so", file=sys.stderr)
    write_report(results, PAGE)
    return 0


def fill(results: Results, options: argparse.Namespace) -> None:
    """Run the missing cells. Each is saved as soon as it is done; until then, the result of older code is kept."""
    code = fingerprint()
    wanted = [cell for cell in (tuned_cells() if options.tuned else cells()) if options.only in name_of(cell)]
    if options.seed is not None:
        wanted = [cell for cell in wanted if cell.seed == options.seed]
    todo = [cell for cell in wanted if cell not in results or (results[cell].code != code and not options.keep)]
    columns = (
        TextColumn("simulating"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    if not todo:
        return
    with Progress(*columns) as progress, ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        bar = progress.add_task("", total=len(todo))
        running = {pool.submit(run_cell, cell, options.traces): cell for cell in todo}
        try:
            for future in as_completed(running):
                _keep(results, running[future], future.result())
                progress.advance(bar)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _keep(results: Results, cell: Cell, figures: Figures) -> None:
    results[cell] = figures
    append(RESULTS, cell, figures)


def name_of(cell: Cell) -> str:
    """Name of a cell for `--only`."""
    budget = f" @{cell.max_batched_tokens}" if cell.max_batched_tokens else ""
    return f"{cell.profile} {cell.trace} {cell.load:g} {cell.policy} {cell.seed}{budget}"


if __name__ == "__main__":
    sys.exit(main())
