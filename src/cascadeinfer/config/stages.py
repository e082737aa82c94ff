"""
The stages that an operator gives: as text, as a TOML file, or as the JSON file of `cascadeinfer plan --roles`.

Text is `[prefill@]RANGE[/BUDGET]:INSTANCES`, separated by commas. A stage with `prefill@` computes the prompts of these
lengths and nothing else; all other stages tile the lengths at which requests decode. BUDGET is the chunk budget: tokens
of a step at most, less than the instances were started with. A TOML file holds `[[stages]]` tables with `range`,
`instances` and, if wanted, `kind = "prefill"` and `max_num_batched_tokens`.
"""

import json
import re
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from cascadeinfer.core.errors import ConfigError, PlanError
from cascadeinfer.core.kind import InstanceTerms, Role
from cascadeinfer.core.layout import RoleLayout, Stage, StageKind, StageLayout
from cascadeinfer.core.types import InstanceId, LengthRange

OPTION: Final = "--stages"
TOML: Final = ".toml"
JSON: Final = ".json"
_PART: Final = re.compile(r"(?:(?P<kind>[a-z]+)\s*@)?(?P<range>[^/@]*)(?:/(?P<budget>[^/:@]*))?:(?P<instances>[^/:@]*)")
_ROLES: Final = {StageKind.MIXED: Role.MIXED, StageKind.DECODE: Role.DECODE}
_NEEDED: Final = frozenset({"range", "instances"})
_ALLOWED: Final = _NEEDED | {"kind", "max_num_batched_tokens"}


class WantedStage(NamedTuple):
    """
    One stage as the operator wants it.

    Attributes:
        is_prefill: Whether it computes prompts only.
        lengths: Of prompts for a prefill stage, of sequences otherwise.
        n_instances: Number of instances.
        budget_tokens: Tokens of a step at most; None: as many as the instances were started with.
    """

    is_prefill: bool
    lengths: LengthRange
    n_instances: int
    budget_tokens: int | None

    @property
    def is_plain(self) -> bool:
        """Whether it has neither a role nor a budget."""
        return not self.is_prefill and self.budget_tokens is None

    def __str__(self) -> str:
        """The form of the command line."""
        role = f"{StageKind.PREFILL}@" if self.is_prefill else ""
        budget = "" if self.budget_tokens is None else f"/{self.budget_tokens}"
        return f"{role}{self.lengths}{budget}:{self.n_instances}"


def read_stages(given: str) -> list[WantedStage]:
    """
    The stages in a text, or in the file that it names.

    Raises:
        ConfigError: It is no such text, or there is no such file or it is malformed.
    """
    if given.endswith(TOML):
        return _stages_of_toml(Path(given))
    if given.endswith(JSON):
        return _stages_of_plan(Path(given))
    return [_stage_of_text(part.strip()) for part in given.split(",")]


def without_file(given: str) -> str:
    """
    The same stages as text, so that a file is read once, and a process that starts later has the same.

    Raises:
        ConfigError: See `read_stages`; text is returned as it is.
    """
    return text_of(read_stages(given)) if given.endswith((TOML, JSON)) else given


def text_of(stages: Sequence[WantedStage]) -> str:
    """The form of the command line."""
    return ",".join(map(str, stages))


def layout_of(wanted: Sequence[WantedStage], instance_ids: Sequence[InstanceId]) -> RoleLayout:
    """
    The stages over these instances, dealt out in the given order.

    Raises:
        ConfigError: Ranges of stages of one role overlap or leave a gap, none decodes, or the number of instances is
            another one.
    """
    dealt = _dealt(wanted, instance_ids)
    prefill = tuple(sorted((Stage(s.lengths, ids) for s, ids in dealt if s.is_prefill), key=_start))
    others = tuple(Stage(s.lengths, ids) for s, ids in dealt if not s.is_prefill)
    if not others:
        raise ConfigError("no stage decodes", option=OPTION, fix="add one without prefill@, such as 0-:1")
    try:
        return RoleLayout(StageLayout(others), prefill)
    except PlanError as error:
        raise ConfigError(
            str(error), option=OPTION, fix="ranges must follow on each other, as in 0-512:1,512-:1"
        ) from error


def terms_of(wanted: Sequence[WantedStage], instance_ids: Sequence[InstanceId]) -> dict[InstanceId, InstanceTerms]:
    """The roles and chunk budgets of these instances. Raises ConfigError, as `layout_of`."""
    roles = layout_of(wanted, instance_ids)
    return {
        instance_id: InstanceTerms(
            Role.PREFILL if stage.is_prefill else _ROLES[roles.kind_of(stage.lengths)], stage.budget_tokens
        )
        for stage, ids in _dealt(wanted, instance_ids)
        for instance_id in ids
    }


def check_plain(wanted: Sequence[WantedStage], policy: str) -> None:
    """
    Check that no stage has a role or a chunk budget.

    Raises:
        ConfigError: One has; this policy knows none.
    """
    if not all(stage.is_plain for stage in wanted):
        what = "prefill stages" if any(stage.is_prefill for stage in wanted) else "chunk budgets"
        raise ConfigError(f"policy {policy} has no {what}", option=OPTION, fix="use --policy roles")


def _start(stage: Stage) -> int:
    return stage.range.lo_tokens


def _dealt(
    wanted: Sequence[WantedStage], instance_ids: Sequence[InstanceId]
) -> list[tuple[WantedStage, tuple[InstanceId, ...]]]:
    n_wanted = sum(stage.n_instances for stage in wanted)
    if wanted and n_wanted != len(instance_ids):
        raise ConfigError(
            f"the stages have {n_wanted} instances in all, --instances says {len(instance_ids)}",
            option=OPTION,
            fix=f"use --instances {n_wanted} or change the stages",
        )
    ids = iter(instance_ids)
    return [(stage, tuple(next(ids) for _ in range(stage.n_instances))) for stage in wanted]


def _stage_of_text(part: str) -> WantedStage:
    found = _PART.fullmatch(part)
    n_instances = None if found is None else _whole(found["instances"])
    budget = None if found is None or found["budget"] is None else _whole(found["budget"])
    if (
        found is None
        or n_instances is None
        or found["kind"] not in {None, StageKind.PREFILL.value}
        or (found["budget"] is not None and budget is None)
    ):
        raise ConfigError(
            f"{part!r} is not RANGE:INSTANCES", option=OPTION, fix="write e.g. 0-512:1, prefill@512-:1 or 0-/1024:1"
        )
    return WantedStage(found["kind"] is not None, _range_of_text(found["range"]), n_instances, budget)


def _whole(text: str) -> int | None:
    text = text.strip()
    return int(text) if text.isascii() and text.isdigit() and int(text) >= 1 else None


def _range_of_text(text: str) -> LengthRange:
    lo, dash, hi = text.partition("-")
    if not dash or not lo.strip().isdigit() or (hi.strip() and not hi.strip().isdigit()):
        raise ConfigError(f"{text!r} is not a range of lengths", option=OPTION, fix="write e.g. 0-512 or 512-")
    try:
        return LengthRange(int(lo), int(hi)) if hi.strip() else LengthRange(int(lo))
    except ValueError as error:
        raise ConfigError(str(error), option=OPTION) from error


def _stages_of_toml(path: Path) -> list[WantedStage]:
    content = _content(path, tomllib.loads)
    tables = content.get("stages")
    if not isinstance(tables, list) or not tables:
        raise ConfigError(f"{path} has no [[stages]] table", option=OPTION)
    return [_stage_of_table(path, table) for table in tables]


def _stage_of_table(path: Path, table: Any) -> WantedStage:
    known = isinstance(table, dict) and set(table) >= _NEEDED and set(table) <= _ALLOWED
    if not known or not isinstance(table["range"], str) or type(table["instances"]) is not int:
        raise ConfigError(f'{path}: each [[stages]] needs range = "0-512" and instances = 1', option=OPTION)
    kind, budget = table.get("kind"), table.get("max_num_batched_tokens")
    if kind not in {None, *StageKind} or type(budget) not in {int, type(None)}:
        raise ConfigError(f'{path}: a stage may have kind = "prefill" and max_num_batched_tokens = 1024', option=OPTION)
    role = f"{kind}@" if kind == StageKind.PREFILL else ""
    chunk = "" if budget is None else f"/{budget}"
    return _stage_of_text(f"{role}{table['range']}{chunk}:{table['instances']}")


def _stages_of_plan(path: Path) -> list[WantedStage]:
    """The stages of `plan --roles --json`; its other fields do not matter here."""
    stages = _content(path, json.loads).get("stages")
    if not isinstance(stages, list) or not stages:
        raise ConfigError(f"{path} has no stages", option=OPTION, fix="plan --roles --json FILE writes them")
    wanted = []
    for stage in stages:
        try:
            hi = "" if stage["hi_tokens"] is None else stage["hi_tokens"]
            table = {
                "range": f"{stage['lo_tokens']}-{hi}",
                "instances": stage["instances"],
                "kind": stage["kind"],
                "max_num_batched_tokens": stage["max_num_batched_tokens"],
            }
        except (KeyError, TypeError) as error:
            raise ConfigError(
                f"{path}: no stage of a plan with roles is {stage}", option=OPTION, fix="plan --roles --json FILE"
            ) from error
        wanted.append(_stage_of_table(path, table))
    return wanted


def _content(path: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    try:
        content = parse(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", option=OPTION) from error
    except (tomllib.TOMLDecodeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}", option=OPTION) from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds no stages", option=OPTION)
    return content
