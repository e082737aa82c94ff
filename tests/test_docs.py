"""The documentation is true: generated pages are current, links and names resolve, and outputs are those shown."""

import ast
import importlib.util
import itertools
import re
import shlex
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cascadeinfer.cli.main import main
from cascadeinfer.cluster.protocol import Launcher
from cascadeinfer.core.effects import MigrationReason
from cascadeinfer.core.events import MigrationOutcome, PinReason
from cascadeinfer.core.layout import StageLayout
from cascadeinfer.engines.protocol import Engine, EngineRequest
from cascadeinfer.runtime.instance_state import Happening
from cascadeinfer.runtime.pairs import BrokenPair
from cascadeinfer.runtime.streams import StreamTable
from cascadeinfer.runtime.supervise import SupervisionTimes, Supervisor
from cascadeinfer.runtime.view import Departed, Drain, InstanceRecord, snapshot
from support.exported_metrics import exported_series, registry_with_everything
from support.shown_commands import commands_in

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")])
LONG_LINE = 40
"""Characters: shorter rows may say the same of different things."""
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def page(name: str) -> str:
    """The text of a page below docs/."""
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def test_cli_page_is_what_the_generator_writes() -> None:
    """The page docs/cli.md is current; `python docs/generate_cli.py` rewrites it."""
    spec = importlib.util.spec_from_file_location("generate_cli", ROOT / "docs" / "generate_cli.py")
    assert spec is not None
    assert spec.loader is not None
    generator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generator)
    assert page("cli.md") == generator.render(), "run: .venv/bin/python docs/generate_cli.py"


def anchors_of(text: str) -> set[str]:
    """Anchors of a page's headings, as GitHub generates them."""
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    """Each relative link names a file that exists, and its anchor a heading in it."""
    for target in LINK.findall(path.read_text(encoding="utf-8")):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        assert file.exists(), f"{target} does not exist"
        if anchor:
            assert anchor in anchors_of(file.read_text(encoding="utf-8")), f"{target}: no such heading"


def test_where_is_names_what_exists() -> None:
    """Each path in the table of docs/architecture.md exists, and no package is missing from it."""
    table = page("architecture.md").partition("## Where is ...?")[2].partition("Paths are below")[0]
    named = re.findall(r"`([a-z_/]+(?:\.py|/))`", table)
    package = ROOT / "src" / "cascadeinfer"
    missing = [name for name in named if not (package / name).exists()]
    assert len(named) > 30
    assert not missing


@pytest.mark.parametrize("path", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_is_said_twice(path: Path) -> None:
    """No long line stands twice in a table or list: two branches that add to one end so when they are merged."""
    for part in re.split(r"\n\n", path.read_text(encoding="utf-8")):
        lines = [line for line in part.splitlines() if line.startswith(("| ", "- ")) and len(line) > LONG_LINE]
        assert [line for line, count in Counter(lines).items() if count > 1] == []


def test_architecture_has_one_row_for_each() -> None:
    """No row of a table of docs/architecture.md names an object, or only files, that another row of it names."""
    rows = [row.strip("| ").split(" | ") for row in page("architecture.md").splitlines() if row.startswith("| ")]
    firsts = Counter(row[0] for row in rows if len(row) == 3)
    assert [first for first, count in firsts.items() if count > 1] == []
    files = {row[0]: set(re.findall(r"`([\w/{},]+(?:\.py|/))`", row[1])) for row in rows if len(row) == 2}
    assert len(files) == sum(len(row) == 2 for row in rows)
    inside = [
        (one, other) for one, other in itertools.permutations(files, 2) if files[one] and files[one] <= files[other]
    ]
    assert inside == []


def metric_names() -> set[str]:
    """Every metric the runtime exposes, as Prometheus sees it."""
    families = list(registry_with_everything().collect())
    return {f.name + ("_total" if f.type == "counter" else "") for f in families}


def documented_metrics() -> dict[str, tuple[str, set[str]]]:
    """Type and labels of each metric in the table of docs/metrics.md."""
    runtime = page("metrics.md").partition("## Runtime (Prometheus)")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(cascadeinfer_\w+)` \| (\w+) \|([^|]*)\|", runtime, flags=re.MULTILINE)
    return {name: (kind, set(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}


def test_metrics_page_has_every_metric_and_no_other() -> None:
    """The runtime table of docs/metrics.md lists exactly our metrics at `/metrics`."""
    runtime = page("metrics.md").partition("## Runtime (Prometheus)")[2].partition("\n## ")[0]
    assert set(re.findall(r"^\| `(cascadeinfer_\w+)`", runtime, flags=re.MULTILINE)) == metric_names()
    for value in [*MigrationOutcome, *MigrationReason]:
        assert f"`{value.value}`" in runtime


def test_metrics_page_has_every_type_and_label() -> None:
    """Type and labels in the table are those that `/metrics` exports."""
    exported = exported_series()
    for family in registry_with_everything().collect():
        name = family.name + ("_total" if family.type == "counter" else "")
        series = f"{name}_count" if family.type == "histogram" else name
        assert documented_metrics()[name] == (family.type, exported[series]), name


@pytest.mark.parametrize("path", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_metrics_named_anywhere_exist(path: Path) -> None:
    """No page names a metric of ours that does not exist, including series of histograms."""
    known = metric_names()
    starts = (
        "instance|stage|migration|requests?_|pinned|recovered|unplaced|suspect|desired|plan_|poison|event_log|withdrawn"
    )
    for name in re.findall(rf"cascadeinfer_(?:{starts})\w*", path.read_text()):
        assert re.sub(r"_(bucket|sum|count)$", "", name) in known, name


def keys_of(value: Any) -> Iterator[str]:
    """Every key in nested JSON, except keys that are data."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield key
            yield from () if key == "ended" else keys_of(part)
    elif isinstance(value, list):
        for part in value:
            yield from keys_of(part)


def test_operating_page_has_every_field_of_the_snapshot() -> None:
    """Each field of `/admin/instances` is explained in docs/operating.md."""
    streams = StreamTable()
    streams.place(streams.open(EngineRequest("r", [1, 2], 3, None), 0.0), "0")
    supervisor = Supervisor("0", lambda _: pytest.fail("started"), None, SupervisionTimes())  # type: ignore[arg-type]
    supervisor.back_off.died(0.0, "killed")
    supervisor.life.happen(Happening.START, 0.0)
    shown = snapshot(
        [InstanceRecord(supervisor, drain=Drain(0.0, 1.0, 1))],
        [Departed("1", "drained", None, 0.0, supervisor.life)],
        StageLayout.single(("0",)),
        streams,
        0,
        {"moved": 1},
        0.0,
        [BrokenPair(("0", "1"), "no answer", 0.0)],
    )
    section = page("operating.md").partition("### The fields of")[2].partition("\n## ")[0]
    explained = set(re.findall(r"[a-z_]+", " ".join(re.findall(r"`([^`]+)`", section))))
    assert set(keys_of(shown)) <= explained


def test_migration_page_has_every_pin_reason() -> None:
    """The reasons in docs/migration.md are the code's."""
    table = page("migration.md").partition("## What pins a request")[2].partition("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+)`", table, flags=re.MULTILINE)) == {reason.value for reason in PinReason}


def test_the_paper_page_names_what_exists() -> None:
    """Every path on the page is a module, a test or a folder of the checkout."""
    paths = re.findall(r"`([a-z_/]+(?:/|\.py))`", page("paper.md")) + re.findall(
        r"`(benchmarks/\w+)`", page("paper.md")
    )
    roots = (ROOT / "src" / "cascadeinfer", ROOT / "tests", ROOT)
    assert len(paths) > 20
    assert [path for path in paths if not any((root / path).exists() for root in roots)] == []


NAMED_IN_FILE = re.compile(r"\[`([\w.]+)`\]\((\.\./src/[\w/]+\.py)\)")


def defined_in(path: Path) -> set[str]:
    """Every class, function and constant of a module; a class's own as `Class.name`."""

    def names(body: list[ast.stmt], prefix: str) -> Iterator[str]:
        for node in body:
            match node:
                case ast.ClassDef():
                    yield prefix + node.name
                    yield from names(node.body, f"{prefix}{node.name}.")
                case ast.FunctionDef() | ast.AsyncFunctionDef():
                    yield prefix + node.name
                case ast.Assign():
                    yield from (prefix + target.id for target in node.targets if isinstance(target, ast.Name))
                case ast.AnnAssign(target=ast.Name(id=name)):
                    yield prefix + name
                case _:
                    pass

    return set(names(ast.parse(path.read_text(encoding="utf-8")).body, ""))


def test_the_tour_names_what_exists() -> None:
    """Each of the ten stops begins with a link to a name in a file, and every such file defines its name."""
    stops = re.split(r"^## \d+\. .*\n", page("tour.md").partition("\n## The same")[0], flags=re.MULTILINE)[1:]
    assert len(stops) == 10
    assert all(NAMED_IN_FILE.match(stop.lstrip()) for stop in stops)
    named = NAMED_IN_FILE.findall(page("tour.md"))
    missing = [(name, file) for name, file in named if name not in defined_in((ROOT / "docs" / file).resolve())]
    assert missing == []


def shown_by_the_tour() -> list[tuple[str, list[str]]]:
    """Commands of the tour, each with the output lines that the page shows for it."""
    shown: list[tuple[str, list[str]]] = []
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", page("tour.md"), flags=re.DOTALL | re.MULTILINE):
        if language == "":
            shown += [(command.text, []) for command in commands_in(f"```\n{block}```")]
        elif language == "text" and not block.startswith('"event"'):
            shown[-1][1].extend(block.splitlines())
    return shown


def test_the_tour_shows_what_its_commands_print(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The simulated run and its replays print every line that the page shows of them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    compared = 0
    for command, lines in shown_by_the_tour():
        words = shlex.split(command)[1:]
        if words[0] not in {"simulate", "replay"} or "out/tour.jsonl" not in words:
            continue
        with pytest.raises(SystemExit) as end:
            main(words)
        assert not end.value.code
        printed = capsys.readouterr().out.splitlines()
        assert [line for line in lines if line not in printed] == []
        compared += len(lines)
    assert compared > 10


def members_of(protocol: type) -> set[str]:
    """What a protocol asks for."""
    return {name for name in (*vars(protocol), *protocol.__annotations__) if not name.startswith("_")}


@pytest.mark.parametrize("protocol", [Engine, Launcher])
def test_the_page_on_extending_has_every_member_and_no_other(protocol: type) -> None:
    """The table of a protocol's members in docs/extending.md is complete and current."""
    table = page("extending.md").partition(f"Members of `{protocol.__name__}`:")[2].strip().partition("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", table)) == members_of(protocol)


def test_the_page_on_extending_names_what_exists() -> None:
    """Every path in it is a module or a test of the checkout."""
    paths = re.findall(r"`([a-z_/]+\.py)`", page("extending.md"))
    roots = (ROOT / "src" / "cascadeinfer", ROOT, ROOT / "tests" / "contracts")
    assert len(paths) > 10
    assert [path for path in paths if not any((root / path).exists() for root in roots)] == []
