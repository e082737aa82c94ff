"""What the GPU check's engine parts make of their measurements, on a simulated engine or none."""

# ruff: noqa: E402 - the modules lie outside of the package

import asyncio
import json
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

for folder in ("tools/gpu_check", "tests/loadgen", "tests/profiling", "tests/results"):
    sys.path.insert(0, str(Path(__file__).parents[2] / folder))

import serving
from fake_openai import FakeServer, running
from profiled_engine import TRUTH, started
from record_rows import live_records
from row_log import RowLog
from serving import PLANS, SYSTEMS, figures_of, node_words, run_one, write_trace
from stand_ins import SHAPES, SMALL, largest_for, write_model
from step_times import Plan, measure_engine, write_profile, write_rows

from cascadeinfer.core.cost.latency import BatchFeatures
from cascadeinfer.core.cost.profile import decode_profile
from cascadeinfer.profiling.grid import BatchKind
from cascadeinfer.profiling.log import SampleLog
from cascadeinfer.results.record_files import write_records
from support.virtual_time import run as in_virtual_time

PROMPTS = (16, 64)
KINDS = (BatchKind("both", (48,) * 6, PROMPTS), BatchKind("both", (16,) * 5 + (208,), PROMPTS))


def steps_of(tmp_path: Path, *, profiles: bool) -> list[dict[str, Any]]:
    """Measure a simulated engine in virtual time; the rows."""
    plan = Plan({"eager": ()}, (), KINDS, profiles=profiles)

    async def measured() -> list[dict[str, Any]]:
        subject = await started()
        with SampleLog(tmp_path / "s.samples.jsonl") as samples, RowLog(tmp_path / "rows.jsonl", {}) as log:
            n_kinds = await measure_engine(subject, plan, samples, lambda: 60.0)
            write_rows(log, "eager", "simulated", plan, samples, None)
            if profiles:
                write_profile(subject, samples, n_kinds, tmp_path / "steps-eager.json", log, "eager")
            await subject.engine.stop(1.0)
            return log.rows

    return in_virtual_time(measured())


def test_steps_beside_a_prompt_are_those_of_the_engine(tmp_path: Path) -> None:
    """One row per batch and prompt; step times and their ratios are those of the engine's own model."""
    rows = steps_of(tmp_path, profiles=False)
    assert [(row["longest"], row["prompt_tokens"]) for row in rows] == [
        (longest, prompt) for longest in (48, 208) for prompt in (0, *PROMPTS)
    ]
    for row in rows:
        pairs = row["prompt_tokens"] * (row["prompt_tokens"] + 1) / 2
        batch = BatchFeatures(6, row["kv_tokens"], row["kv_tokens_max"], row["prompt_tokens"], pairs)
        assert row["step_s"] == pytest.approx(TRUTH.step_s(batch), rel=1e-3)
        assert row["over_alone"] >= 1.0
        assert row["steps"] >= 9


def test_the_steps_make_a_profile(tmp_path: Path) -> None:
    """The grid is measured too; the profile is one that the package takes, and its errors are a row."""
    rows = steps_of(tmp_path, profiles=True)
    assert rows[-1]["profile"] == "steps-eager.json"
    assert rows[-1]["errors"]["all"]["median"] < 0.05
    profile = decode_profile((tmp_path / "steps-eager.json").read_bytes(), origin="steps-eager.json")
    assert profile.step_model.base_s == pytest.approx(TRUTH.base_s, rel=0.2)


def test_a_larger_gpu_gets_a_larger_model() -> None:
    """From Llama-3.1-8B on 80 GB down to 3.2-1B; weights and KV of the longest batch fit into nine tenths."""
    assert [largest_for(gigabytes * 1e9).name for gigabytes in (141, 80, 48, 24)] == [
        "llama-3.1-8b", "llama-3.1-8b", "llama-3.2-3b", "llama-3.2-1b",
    ]  # fmt: skip


@pytest.mark.parametrize("own_tokens", [True, False])
def test_a_model_without_weights(tmp_path: Path, own_tokens: bool) -> None:
    """A folder with the sizes of the shape and no weights; its vocabulary may be the tokenizer's."""
    folder = write_model(tmp_path, SMALL, own_tokens=own_tokens)
    config = json.loads((folder / "config.json").read_text())
    assert (config["num_hidden_layers"], config["hidden_size"]) == (SMALL.layers, SMALL.hidden)
    assert config["vocab_size"] == (SMALL.vocabulary if own_tokens else 512)
    assert not list(folder.glob("*.safetensors"))
    assert (folder / "tokenizer.json").is_file()


def test_shapes_have_the_parameters_of_their_names() -> None:
    """Counted from the sizes, in billions."""
    counted = []
    for s in SHAPES:
        attention = 2 * s.hidden * s.head_dim * (s.q_heads + s.kv_heads)
        embeddings = s.vocabulary * s.hidden * (1 if s.tied else 2)
        counted.append((s.layers * (attention + 3 * s.hidden * s.ffn) + embeddings) / 1e9)
    assert counted == pytest.approx([8.03, 3.21, 1.24], abs=0.01)


def test_nodes_of_data_parallelism() -> None:
    """Only the first has an entry; the others start behind it, all with one engine and one address."""
    plan = PLANS["cuda"]
    nodes = [node_words(plan, number, 29_550) for number in range(plan.instances)]
    assert "--headless" not in nodes[0]
    assert [node[-2:] for node in nodes[1:]] == [["--data-parallel-start-rank", str(n)] for n in (1, 2, 3)]
    assert all(node[:4] == ["--data-parallel-size", "4", "--data-parallel-size-local", "1"] for node in nodes)


def test_figures_of_a_run(tmp_path: Path) -> None:
    """Group by group, without the first tenth; a failed request counts, and has no latency."""
    n = 20
    file = tmp_path / "run.parquet"
    e2e = np.r_[np.full(n - 1, 2.0), np.nan]
    records = live_records(np.arange(n, dtype=float), np.full(n, 0.5), e2e, [16] * 10 + [900] * 10, [16] * n)
    write_records(file, records, [""] * (n - 1) + ["status: 500"], {"label": "x"})
    figures = figures_of(file, PLANS["cpu"])
    assert (figures["all"]["requests"], figures["all"]["failed"]) == (18, 1)
    assert (figures["short"]["requests"], figures["long"]["requests"]) == (8, 10)
    assert figures["short"]["ttft_s_mean"] == pytest.approx(0.5)
    assert figures["all"]["e2e_s_mean"] == pytest.approx(2.0)
    assert figures["errors"] == {"status": 1}


async def test_a_system_is_warmed_up_and_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trace is replayed twice, with other words; the row has the figures of the second time."""
    plan = PLANS["cpu"]
    trace = tmp_path / "trace-0.jsonl"
    write_trace(plan.workload, 0, 20.0, trace)
    options = Namespace(device="cpu", logs=tmp_path)
    server = FakeServer()

    @contextmanager
    def already_running(system: str, *_: object) -> Iterator[str]:
        assert system == SYSTEMS[0]
        yield server.url

    monkeypatch.setattr(serving, "running", already_running)
    async with running(server):
        with RowLog(tmp_path / "rows.jsonl", {}) as log:
            await asyncio.to_thread(run_one, SYSTEMS[0], 0, 0, trace, options, plan, tmp_path, log)
            (row,) = log.rows
    assert row["system"] == SYSTEMS[0]
    assert (row["all"]["requests"], row["all"]["failed"], row["errors"]) == (8, 0, {})
    assert {asked["model"] for asked in server.asked} == {serving.MODEL_NAME}
    assert len({str(asked["prompt"]) for asked in server.asked}) == len(server.asked) == 16
