"""
Draws docs/figures/idea-1.svg to idea-4.svg, the picture of docs/idea.md in four steps:

    python docs/draw_idea.py

The stages, their instances and their times are the planner's for the README's example; the bars stand for what it
predicts to run at one moment. A test compares the files with this program's output.
"""

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Final
from xml.sax.saxutils import escape

from cascadeinfer.core.plan.planner import Plan, StagePrediction
from cascadeinfer.evaluation.setting import load_setting

FIGURES: Final = Path(__file__).parent / "figures"
PROFILE, RATE_PER_S, INSTANCES = "h100-llama-3.1-8b", 35.0, 16
REQUESTS_PER_BAR: Final = 10
LONGEST_TOKENS: Final = 131_072
WIDTH, HEIGHT = 900, 250
BOX_WIDTH, BOX_HEIGHT, BOX_TOP, PITCH = 46, 110, 70, 54
BAR_WIDTH, BAR_PITCH = 6, 8
LEFT: Final = (WIDTH - INSTANCES * PITCH + PITCH - BOX_WIDTH) // 2
COLOURS: Final = ("#1b9e77", "#d95f02", "#7570b3", "#b8860b")
GREY: Final = "#667788"

Bar = tuple[float, int]
"""Length in tokens, number of the stage."""


def pictures() -> dict[str, str]:
    """The text of each file."""
    plan = load_setting(PROFILE, Path("sample"), INSTANCES).plan(RATE_PER_S)
    problem = plan.problem
    together_s = problem.service(0, len(problem.edges) - 1, INSTANCES).step_s
    staged = [bars for number, stage in enumerate(plan.stages) for bars in _stage_boxes(number, stage)]
    steps = (
        (
            f"1. Every instance has requests of all lengths: a step takes {_ms(together_s)}",
            _boxes(_mixed(staged), grey=True),
        ),
        ("2. The planner cuts the lengths into stages and gives each its instances", _axis(plan)),
        ("3. A request starts in the stage of its length, among its like", _groups(plan, staged)),
        ("4. One that outgrows its stage moves on while it runs, with its KV cache", _moves(plan, staged)),
    )
    return {f"idea-{number}.svg": _drawing(title, list(shapes)) for number, (title, shapes) in enumerate(steps, 1)}


def _stage_boxes(number: int, stage: StagePrediction) -> Iterator[list[Bar]]:
    """The bars of each instance of a stage: as many as its predicted batch, over the stage's lengths."""
    low, high = max(64, stage.range.lo_tokens), min(stage.range.hi_tokens or LONGEST_TOKENS, LONGEST_TOKENS)
    count = max(1, round(stage.service.batch / REQUESTS_PER_BAR))
    for instance in range(stage.n_instances):
        places = ((bar + (instance + 1) / (stage.n_instances + 1)) / count for bar in range(count))
        yield [(low * (high / low) ** place, number) for place in places]


def _mixed(staged: list[list[Bar]]) -> list[list[Bar]]:
    """The same bars dealt out to the instances in turn, as a load balancer would."""
    bars = [bar for box in staged for bar in box]
    return [bars[7 * first % INSTANCES :: INSTANCES] for first in range(INSTANCES)]


def _boxes(boxes: list[list[Bar]], *, grey: bool = False) -> Iterator[str]:
    yield _legend("a box is an instance, a bar a request: as high as it is long, on a logarithmic scale")
    for index, bars in enumerate(boxes):
        left = LEFT + index * PITCH
        yield (
            f'<rect x="{left}" y="{BOX_TOP}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="4" fill="#f4f6f8" '
            'stroke="#aab4be"/>'
        )
        for place, (tokens, stage) in enumerate(bars):
            height = (BOX_HEIGHT - 8) * _share(tokens)
            yield (
                f'<rect x="{left + 4 + place * BAR_PITCH}" y="{BOX_TOP + BOX_HEIGHT - 2 - height:.1f}" '
                f'width="{BAR_WIDTH}" height="{height:.1f}" fill="{GREY if grey else COLOURS[stage]}"/>'
            )


def _axis(plan: Plan) -> Iterator[str]:
    """The lengths on a logarithmic axis, in the stages' colours."""
    yield _legend("lengths on a logarithmic scale")
    span = WIDTH - 2 * LEFT
    for number, stage in enumerate(plan.stages):
        low = LEFT + span * _share(max(64, stage.range.lo_tokens))
        high = LEFT + span * _share(min(stage.range.hi_tokens or LONGEST_TOKENS, LONGEST_TOKENS))
        middle = (low + high) / 2
        yield f'<rect x="{low:.1f}" y="110" width="{high - low:.1f}" height="30" fill="{COLOURS[number]}"/>'
        yield _text(middle, 100, f"{stage.range} tokens", COLOURS[number])
        yield _text(middle, 162, f"{stage.share_of_steps:.0%} of the tokens", COLOURS[number])
        yield _text(middle, 182, _instances(stage), COLOURS[number])


def _groups(plan: Plan, staged: list[list[Bar]]) -> Iterator[str]:
    yield from _boxes(staged)
    for number, (stage, left, right) in enumerate(_places(plan)):
        middle = (left + right) / 2
        yield f'<path d="M{left} {BOX_TOP + 118}H{right}" stroke="{COLOURS[number]}" stroke-width="3"/>'
        yield _text(middle, BOX_TOP + 136, f"{stage.range} tokens", COLOURS[number])
        yield _text(middle, BOX_TOP + 154, f"{_ms(stage.service.step_s)} a step", COLOURS[number])


def _moves(plan: Plan, staged: list[list[Bar]]) -> Iterator[str]:
    yield from _groups(plan, staged)
    places = _places(plan)
    for number, ((_, _, source), (stage, target, _)) in enumerate(itertools.pairwise(places)):
        start, end = source - BOX_WIDTH / 2, target + BOX_WIDTH / 2
        yield (
            f'<path d="M{start} {BOX_TOP - 2}C{start} 48 {end} 48 {end} {BOX_TOP - 4}" fill="none" '
            f'stroke="{COLOURS[number]}" stroke-width="2.5" marker-end="url(#head)"/>'
        )
        yield _text((start + end) / 2, 46, f"{stage.hand_overs_per_s:.1f} moves/s", COLOURS[number])


def _places(plan: Plan) -> list[tuple[StagePrediction, int, int]]:
    """Each stage with the left and right ends of its instances' boxes."""
    places, first = [], 0
    for stage in plan.stages:
        last = first + stage.n_instances - 1
        places.append((stage, LEFT + first * PITCH, LEFT + last * PITCH + BOX_WIDTH))
        first = last + 1
    return places


def _share(tokens: float) -> float:
    """Place of a length on a logarithmic axis from 64 tokens to the longest context."""
    return math.log(tokens / 64) / math.log(LONGEST_TOKENS / 64) if tokens > 64 else 0.0


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.1f} ms"


def _instances(stage: StagePrediction) -> str:
    return f"{stage.n_instances} instances"


def _legend(text: str) -> str:
    return _text(LEFT, HEIGHT - 10, text, GREY, 11, "start")


def _text(x: float, y: float, text: str, colour: str, size: int = 13, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y}" font-size="{size}" text-anchor="{anchor}" fill="{colour}">{escape(text)}</text>'


def _drawing(title: str, shapes: list[str]) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" role="img">\n'
        f"<title>{escape(title)}</title>\n"
        '<defs><marker id="head" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="6" markerHeight="6" orient="auto">'
        '<path d="M0 0L8 4L0 8z" fill="#334455"/></marker></defs>\n'
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="#ffffff"/>\n'
    )
    words = (
        _text(LEFT, 26, title, "#223344", 16, "start"),
        _text(WIDTH - LEFT, HEIGHT - 10, "predicted by the planner, not measured", GREY, 11, "end"),
    )
    return head + "\n".join([*words, *shapes]) + "\n</svg>\n"


def main() -> None:
    """Write the files."""
    for name, text in pictures().items():
        (FIGURES / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
