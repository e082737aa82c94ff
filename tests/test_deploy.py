"""Dashboard and alerts: every query reads series that `/metrics` exports, by labels that they have."""

import importlib.util
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from support.exported_metrics import exported_series
from support.promql import uses_of

ROOT = Path(__file__).parent.parent
ALERTS = ROOT / "deploy" / "prometheus" / "alerts.yaml"
DASHBOARD = ROOT / "deploy" / "grafana" / "cascadeinfer.json"
TARGET_LABELS = {"job"}
"""Labels that Prometheus adds; it also adds `instance`, which ours replaces with `honor_labels`."""
VARIABLES = {"$__rate_interval": "5m", "$job": ".*"}


def rules() -> list[dict[str, Any]]:
    """All alerting rules."""
    groups: list[dict[str, Any]] = yaml.safe_load(ALERTS.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def panels() -> list[dict[str, Any]]:
    """All panels with queries."""
    found: list[dict[str, Any]] = json.loads(DASHBOARD.read_text())["panels"]
    return [panel for panel in found if panel["type"] != "row"]


def expressions_in_docs() -> list[str]:
    """The queries of docs/operating.md; a comment or an empty line ends one."""
    text = (ROOT / "docs" / "operating.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```promql\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    return [line for block in blocks for line in block.splitlines() if line and not line.startswith("#")]


def all_expressions() -> Iterator[tuple[str, str]]:
    """Every query, with where it stands."""
    yield from ((rule["alert"], rule["expr"]) for rule in rules())
    for panel in panels():
        yield from ((panel["title"], with_values(target["expr"])) for target in panel["targets"])
    yield from (("docs/operating.md", expression) for expression in expressions_in_docs())


def with_values(expression: str) -> str:
    """A dashboard's query with its variables filled in."""
    for name, value in VARIABLES.items():
        expression = expression.replace(name, value)
    return expression


def labels_of(expression: str) -> set[str]:
    """All labels that series of an expression have."""
    known = exported_series()
    return TARGET_LABELS.union(*(known.get(use.name, {"le"}) for use in uses_of(expression).series))


@pytest.mark.parametrize(("where", "expression"), list(all_expressions()))
def test_queries_read_what_is_exported(where: str, expression: str) -> None:
    """Each series of ours exists, has the labels it is selected by, and one of an expression those it is grouped by."""
    known, uses = exported_series(), uses_of(expression)
    assert uses.series, where
    for use in uses.series:
        if use.name.startswith("vllm:"):
            continue
        assert use.name in known, f"{where}: no series {use.name}"
        assert use.labels <= known[use.name] | TARGET_LABELS, f"{where}: {use}"
    assert uses.groups <= labels_of(expression), f"{where}: {uses.groups}"


def test_series_of_vllm_exist() -> None:
    """Names of vLLM's metrics in the queries occur in its source."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("vLLM is not installed")
    root = Path(spec.submodule_search_locations[0])
    folders = [root / "v1" / "metrics", root / "distributed" / "kv_transfer"]
    source = "".join(path.read_text(encoding="utf-8") for folder in folders for path in folder.rglob("*.py"))
    names = {use.name for _, expr in all_expressions() for use in uses_of(expr).series if use.name.startswith("vllm:")}
    assert names
    for name in names:
        assert f'"{re.sub(r"_(bucket|sum|count|total)$", "", name)}' in source, name


def test_texts_name_labels_that_there_are() -> None:
    """Labels in legends and in the texts of alerts are labels of their series."""
    for rule in rules():
        named = set(re.findall(r"\$labels\.(\w+)", " ".join(rule["annotations"].values())))
        assert named <= labels_of(rule["expr"]), rule["alert"]
        assert rule["labels"]["severity"] in {"warning", "critical"}
    for panel in panels():
        for target in panel["targets"]:
            named = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            assert named <= labels_of(with_values(target["expr"])), panel["title"]


def test_every_signal_is_on_the_dashboard_or_in_an_alert() -> None:
    """What this server measures is shown: all metrics, except what the tables of docs/metrics.md are for."""
    used = {use.name for _, expression in all_expressions() for use in uses_of(expression).series}
    shown = {re.sub(r"_(bucket|sum|count)$", "", name) for name in used}
    names = {re.sub(r"_(bucket|sum|count)$", "", name) for name in exported_series() if not name.endswith("_created")}
    left_out = names - shown
    assert left_out <= {
        "cascadeinfer_instance_build",
        "cascadeinfer_instance_kind",
        "cascadeinfer_instance_kv_pulls",
        "cascadeinfer_instance_pinned",
        "cascadeinfer_instance_waiting",
        "cascadeinfer_stage_upper_bound_tokens",
        "cascadeinfer_shared_requests_total",
        "cascadeinfer_suspected_requests",
        "cascadeinfer_event_log_dropped_total",
    }, left_out


def test_panels_do_not_overlap() -> None:
    """Each panel has an id and a place of its own."""
    everything = json.loads(DASHBOARD.read_text())["panels"]
    assert len({panel["id"] for panel in everything}) == len(everything)
    cells = [
        (x, y)
        for panel in everything
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24


def test_alerts_are_valid_rules(tmp_path: Path) -> None:
    """Prometheus's own checker accepts the alerts, and every other query as a recording rule."""
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian: apt-get install prometheus)")
    recorded = [{"record": f"query:{n}", "expr": expr} for n, (_, expr) in enumerate(all_expressions())]
    rest = tmp_path / "rest.yaml"
    rest.write_text(yaml.safe_dump({"groups": [{"name": "rest", "rules": recorded}]}))
    subprocess.run([promtool, "check", "rules", str(ALERTS), str(rest)], check=True, capture_output=True)


@pytest.mark.parametrize(
    ("expression", "series", "groups"),
    [
        ("a == 0", {"a": set()}, set()),
        ('sum by (x, y) (rate(a_total{b="c", d=~"e|f"}[5m])) > 2.5e3', {"a_total": {"b", "d"}}, {"x", "y"}),
        ("a / ignoring (r) group_left sum(b:c[15m])", {"a": set(), "b:c": set()}, {"r"}),
        ("topk(5, a unless on (z) b) offset 5m", {"a": set(), "b": set()}, {"z"}),
    ],
)
def test_what_expressions_refer_to(expression: str, series: dict[str, set[str]], groups: set[str]) -> None:
    """Functions, words and durations are no series; labels in braces and in groupings are told apart."""
    uses = uses_of(expression)
    assert ({use.name: use.labels for use in uses.series}, uses.groups) == (series, groups)
