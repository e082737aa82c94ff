"""Public trace formats: what is read, and how what is malformed is told."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cascadeinfer.core.errors import TraceError
from cascadeinfer.workload.jsonl import to_jsonl
from cascadeinfer.workload.readers import (
    draw_trace,
    parse_client,
    read_azure,
    read_burstgpt,
    read_csv,
    read_hash_ids,
    read_mooncake,
    read_sharegpt,
    read_trace,
    sniff,
)

CSV = ["arrival_s,prompt_tokens,output_tokens,row_id", "0.5,10,3,0", "2.0,20,4,1", "1.0,30,5,2"]
AZURE_2023 = [
    "TIMESTAMP,ContextTokens,GeneratedTokens",
    "2023-11-16 18:17:03.9799600,4808,10",
    "2023-11-16 18:17:04.0000100,110,27",
]
AZURE_2024 = [
    "TIMESTAMP,ContextTokens,GeneratedTokens",
    "2024-05-10 23:59:59.500000+00:00,100,10",
    "2024-05-11 02:00:01+02:00,200,20",
]
BURSTGPT = [
    "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type",
    "5,s,1,ChatGPT,472,18,490,Conversation log",
    "45,s,1,GPT-4,1087,0,1087,API log",
    "118,s,1,GPT-4,417,276,693,Conversation log",
]
MOONCAKE = [
    json.dumps({"timestamp": 1000, "input_length": 1030, "output_length": 5, "hash_ids": [0, 1, 2]}),
    json.dumps({"timestamp": 2500, "input_length": 600, "output_length": 7, "hash_ids": [0, 9]}),
]


def test_common_csv() -> None:
    """Rows are sorted by time, and times start at the earliest."""
    trace = read_csv(CSV)
    assert trace.arrival_s.tolist() == [0.0, 0.5, 1.5]
    assert trace.prompt_tokens.tolist() == [10, 30, 20]
    assert trace.has_arrivals


def test_common_csv_without_times() -> None:
    """Empty times in every row are a trace without times, in the file's order; in some rows they are an error."""
    trace = read_csv(["arrival_s,prompt_tokens,output_tokens", ",10,3", ",5,4"])
    assert not trace.has_arrivals
    assert trace.prompt_tokens.tolist() == [10, 5]
    with pytest.raises(TraceError, match="line 3: some rows have an arrival time and some have none"):
        read_csv(["arrival_s,prompt_tokens,output_tokens", "0.0,10,3", ",5,4"])
    with pytest.raises(TraceError, match="line 3: some rows"):
        read_csv(["arrival_s,prompt_tokens,output_tokens", ",10,3", "0.0,5,4"])


def test_common_csv_with_hashes_follows_the_sort() -> None:
    """Prefix hashes are joined by row_id and stay with their rows."""
    hashes = read_hash_ids([json.dumps({"row_id": i, "hash_ids": [i, i + 10]}) for i in range(3)])
    trace = read_csv(CSV, hashes=hashes)
    assert trace.prefix_hashes == ((0, 10), (2, 12), (1, 11))
    assert trace.prefix_block_tokens == 512
    del hashes[1]
    with pytest.raises(TraceError, match="line 3: no prefix hashes for row_id 1"):
        read_csv(CSV, hashes=hashes)
    with pytest.raises(TraceError, match="line 2: row_id 0 comes twice"):
        read_hash_ids(['{"row_id": 0, "hash_ids": []}'] * 2)


def test_azure_2023_has_seven_decimals() -> None:
    """20.05 ms lie between the two."""
    trace = read_azure(AZURE_2023)
    assert trace.arrival_s.tolist() == pytest.approx([0.0, 0.02005], abs=1e-6)
    assert trace.prompt_tokens.tolist() == [4808, 110]
    assert trace.output_tokens.tolist() == [10, 27]


def test_azure_2024_has_time_zones() -> None:
    """Half a second before midnight UTC and 2:00:01 in +02:00 are 1.5 s apart."""
    assert read_azure(AZURE_2024).arrival_s.tolist() == pytest.approx([0.0, 1.5], abs=1e-6)


def test_burstgpt_drops_failures_and_says_how_many() -> None:
    """A request without response tokens failed; columns are found by name."""
    trace = read_burstgpt(BURSTGPT)
    assert trace.prompt_tokens.tolist() == [472, 417]
    assert trace.arrival_s.tolist() == [0.0, 113.0]
    assert trace.dropped_rows == 1
    only = read_burstgpt(BURSTGPT, model="GPT-4", log_type="Conversation log")
    assert (only.prompt_tokens.tolist(), only.dropped_rows) == ([417], 0)


def test_mooncake() -> None:
    """Milliseconds become seconds, hashes cover 512 tokens each."""
    trace = read_mooncake(MOONCAKE)
    assert trace.arrival_s.tolist() == [0.0, 1.5]
    assert trace.prefix_hashes == ((0, 1, 2), (0, 9))
    assert trace.prefix_block_tokens == 512
    bare = read_mooncake(['{"timestamp": 0, "input_length": 3, "output_length": 1}'])
    assert bare.prefix_hashes is None
    with pytest.raises(TraceError, match="line 2: some rows have hash_ids and some have none"):
        read_mooncake([MOONCAKE[0], '{"timestamp": 0, "input_length": 3, "output_length": 1}'])


def test_sharegpt_counts_first_turns() -> None:
    """First turn to second; what has no answer, or an empty turn, is left out and counted."""
    document = json.dumps(
        [
            {"id": "a", "conversations": [{"from": "human", "value": "one two"}, {"from": "gpt", "value": "three"}]},
            {"id": "b", "conversations": [{"from": "human", "value": "alone"}]},
            {"id": "c", "conversations": [{"from": "human", "value": ""}, {"from": "gpt", "value": "x"}]},
            {"id": "d", "conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": ""}]},
        ]
    )
    trace = read_sharegpt(document, lambda text: len(text.split()))
    assert (trace.prompt_tokens.tolist(), trace.output_tokens.tolist()) == ([2], [1])
    assert trace.dropped_rows == 3
    assert not trace.has_arrivals
    for wrong in ("{", '{"a": 1}', '[{"conversations": [{"from": "human"}]}]'):
        with pytest.raises(TraceError, match="not a ShareGPT document"):
            read_sharegpt(wrong, len)


@pytest.mark.parametrize(
    ("reader", "lines", "complaint"),
    [
        (read_csv, [], "the file is empty"),
        (read_csv, CSV[:1], "the trace has no requests"),
        (read_csv, ["arrival_s,prompt_tokens", "0,1"], "line 1: missing column 'output_tokens'"),
        (read_csv, [*CSV, "3.0,10"], "line 5: 2 fields where the header has 4"),
        (read_csv, [*CSV, "3.0,ten,3,3"], "line 5: prompt_tokens is not a number: 'ten'"),
        (read_csv, [*CSV, "3.0,10.5,3,3"], "line 5: prompt_tokens is not a whole number"),
        (read_csv, [*CSV, "3.0,-10,3,3"], "line 5: prompt_tokens is negative"),
        (read_csv, [*CSV, "nan,10,3,3"], "line 5: arrival_s is not finite"),
        (read_csv, [*CSV, "3.0,0,3,3"], "line 5: the prompt has no tokens"),
        (read_csv, [*CSV, "3.0,inf,3,3"], "line 5: prompt_tokens is not finite"),
        (read_csv, [*CSV, '"' + "x" * 200_000], "line 5: not CSV: field larger than field limit"),
        (read_azure, [*AZURE_2023, "yesterday,1,1"], "line 4: TIMESTAMP is not a time: 'yesterday'"),
        (read_azure, [*AZURE_2023, "2023-13-16 18:17:03,1,1"], "line 4: TIMESTAMP is not a time"),
        (read_azure, CSV, "line 1: missing column 'TIMESTAMP'"),
        (read_burstgpt, [*BURSTGPT, "x,s,1,GPT-4,1,1,2,API log"], "line 5: Timestamp is not a number"),
        (read_mooncake, [*MOONCAKE, "{"], "line 3: not a JSON object"),
        (read_mooncake, [*MOONCAKE, "[1]"], "line 3: not a JSON object"),
        (read_mooncake, ['{"timestamp": 0, "input_length": 3}'], "line 1: field 'output_length' is missing"),
        (
            read_mooncake,
            ['{"timestamp": true, "input_length": 3, "output_length": 1}'],
            "line 1: timestamp is not a number",
        ),
        (
            read_mooncake,
            ['{"timestamp": 0, "input_length": 3, "output_length": 1, "hash_ids": 7}'],
            "line 1: hash_ids is not a list",
        ),
    ],
)
def test_malformed_traces_are_refused_with_their_line(reader: object, lines: list[str], complaint: str) -> None:
    """Line number and what is wrong."""
    with pytest.raises(TraceError, match=complaint):
        reader(lines)  # type: ignore[operator]


def test_formats_are_recognised_by_their_first_line() -> None:
    """Every reader's own example is sniffed as its format, and blank lines before it do not matter."""
    own = list(to_jsonl(read_csv(CSV)))
    for name, lines in (
        ("csv", CSV),
        ("azure", AZURE_2023),
        ("burstgpt", BURSTGPT),
        ("mooncake", MOONCAKE),
        ("jsonl", own),
    ):
        assert sniff(lines[0]) == name
        assert len(read_trace(["", *lines])) >= 2
    with pytest.raises(TraceError, match=r"unknown trace format .*it starts with 'a,b,c'"):
        read_trace(["a,b,c", "1,2,3"])
    with pytest.raises(TraceError, match="the file is empty"):
        read_trace(["", " "])


@settings(max_examples=50)
@given(text=st.text(max_size=200))
def test_no_text_does_anything_but_read_or_raise_trace_error(text: str) -> None:
    """Whatever the bytes, readers raise nothing else."""
    for head in (
        "",
        "arrival_s,prompt_tokens,output_tokens\n",
        "TIMESTAMP,ContextTokens,GeneratedTokens\n",
        MOONCAKE[0] + "\n",
    ):
        try:
            read_trace((head + text).splitlines(keepends=True))
        except TraceError:
            continue


SERVEGEN_TRACE = [
    "0,2.0,1.0,Gamma,1.0,0.5",
    "600,0,0,,0,0",
    "1200,5.0,2.0,Weibull,0.7,0.1",
    "1800,1.0,1.0,Exponential,1,1",
]
SERVEGEN_DATA = json.dumps(
    {
        "0": {"input_tokens": "{10: 0.5, 30: 0.5}", "output_tokens": "{5: 1.0}"},
        "1200": {"input_tokens": "{100: 1.0}", "output_tokens": "{7: 0.9, 0: 0.1}", "other": "{}"},
        "1500": {"input_tokens": "{}", "output_tokens": "{7: 1.0}"},
    }
)


def test_servegen_draws_each_client_by_its_laws() -> None:
    """Counts follow the rates, lengths the window's law, idle windows are empty, and a seed is a trace."""
    clients = [parse_client(i, SERVEGEN_TRACE, SERVEGEN_DATA) for i in (1, 0)]
    trace = draw_trace(clients, 0.0, 2400.0, np.random.default_rng(3))
    count = np.histogram(trace.arrival_s, [0, 600, 1200, 1800, 2400])[0]
    assert count[0] == pytest.approx(2400, abs=5 * np.sqrt(2400))
    assert count[1] == 0
    assert count[2] == pytest.approx(6000, abs=8 * np.sqrt(6000))
    assert count[3] == pytest.approx(1200, abs=5 * np.sqrt(1200))
    early = trace.window(0.0, 600.0)
    assert set(early.prompt_tokens.tolist()) == {10, 30}
    assert early.prompt_tokens.mean() == pytest.approx(20, rel=0.05)
    late = trace.window(1200.0, 2400.0)
    assert set(late.prompt_tokens.tolist()) == {100}
    assert set(late.output_tokens.tolist()) == {7}
    again = draw_trace(clients[::-1], 0.0, 2400.0, np.random.default_rng(3))
    np.testing.assert_array_equal(again.arrival_s, trace.arrival_s)
    double = draw_trace(clients, 0.0, 600.0, np.random.default_rng(3), rate_scale=2.0)
    assert len(double) == pytest.approx(4800, abs=5 * np.sqrt(4800))


@pytest.mark.parametrize(
    ("trace_lines", "dataset", "complaint"),
    [
        (["0,1,1,Gamma,1"], SERVEGEN_DATA, "line 1: 5 fields instead of 6"),
        (["0,1,1,Pareto,1,1"], SERVEGEN_DATA, "line 1: unknown law of gaps 'Pareto'"),
        (["0,x,1,Gamma,1,1"], SERVEGEN_DATA, "line 1: rate is not a number"),
        (["0,1,1,Gamma,0,1"], SERVEGEN_DATA, "line 1: rate 1 or shape 0 is out of range"),
        (["9,1,1,Gamma,1,1", "0,1,1,Gamma,1,1"], SERVEGEN_DATA, "line 2: window 0 is not after"),
        (SERVEGEN_TRACE, "{", "not JSON of the expected shape"),
        (SERVEGEN_TRACE, '{"0": {"input_tokens": "{1: 1}"}}', "window 0: no law 'output_tokens'"),
        (SERVEGEN_TRACE, '{"0": {"input_tokens": "rm()", "output_tokens": "{1: 1}"}}', "input_tokens is not a dict"),
        (SERVEGEN_TRACE, '{"0": {"input_tokens": "{1: -1}", "output_tokens": "{1: 1}"}}', "input_tokens is not a dict"),
    ],
)
def test_malformed_servegen_files_are_refused(trace_lines: list[str], dataset: str, complaint: str) -> None:
    """Line or window, and what is wrong."""
    with pytest.raises(TraceError, match=complaint):
        parse_client(0, trace_lines, dataset)


def test_servegen_windows_without_requests_are_refused() -> None:
    """An empty window, an idle one, and one before any law of lengths."""
    client = parse_client(0, SERVEGEN_TRACE, SERVEGEN_DATA)
    with pytest.raises(TraceError, match="is empty"):
        draw_trace([client], 5.0, 5.0, np.random.default_rng(0))
    with pytest.raises(TraceError, match="no client asks"):
        draw_trace([client], 600.0, 1200.0, np.random.default_rng(0))
    lawless = parse_client(0, SERVEGEN_TRACE, "{}")
    with pytest.raises(TraceError, match="before its first length law"):
        draw_trace([lawless], 0.0, 600.0, np.random.default_rng(0))
