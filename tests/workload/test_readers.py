"""Public trace formats: what is read, and how malformed content is reported."""

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
    """Times empty in every row make a trace without times, in the file's order; empty in some, they are an error."""
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
    long = [line.replace(",10,", ",1000,").replace(",20,", ",1000,").replace(",30,", ",600,") for line in CSV]
    trace = read_csv(long, hashes=hashes)
    assert trace.prefix_hashes == ((0, 10), (2, 12), (1, 11))
    assert trace.prefix_block_tokens == 512
    del hashes[1]
    with pytest.raises(TraceError, match="line 3: no prefix hashes for row_id 1"):
        read_csv(long, hashes=hashes)
    with pytest.raises(TraceError, match="line 2: row_id 0 comes twice"):
        read_hash_ids(['{"row_id": 0, "hash_ids": []}'] * 2)


def test_azure_2023_has_seven_decimals() -> None:
    """The two arrivals are 20.05 ms apart."""
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
    """Milliseconds become seconds; each hash covers 512 tokens."""
    trace = read_mooncake(MOONCAKE)
    assert trace.arrival_s.tolist() == [0.0, 1.5]
    assert trace.prefix_hashes == ((0, 1, 2), (0, 9))
    assert trace.prefix_block_tokens == 512
    bare = read_mooncake(['{"timestamp": 0, "input_length": 3, "output_length": 1}'])
    assert bare.prefix_hashes is None
    with pytest.raises(TraceError, match="line 2: some rows have hash_ids and some have none"):
        read_mooncake([MOONCAKE[0], '{"timestamp": 0, "input_length": 3, "output_length": 1}'])


def test_sharegpt_counts_first_turns() -> None:
    """
    The first turn is the prompt, the second the output; without an answer, or with an empty turn, an entry is left out
    and counted.
    """
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
    """The error gives the line number and what is wrong."""
    with pytest.raises(TraceError, match=complaint):
        reader(lines)  # type: ignore[operator]


def test_formats_are_recognised_by_their_first_line() -> None:
    """Every reader's own example is recognised as its format, even after blank lines."""
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
    """Counts follow the rates, lengths the window's law; idle windows are empty, and a seed determines the trace."""
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
    """The error gives the line or window and what is wrong."""
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


@pytest.mark.parametrize("value", ["1e30", "9223372036854775807", "1e19", "99999999999999999999", "1" + "0" * 400])
def test_counts_beyond_any_context_are_refused(value: str) -> None:
    """A number too large for any context, or for 64 bits, is refused with its line and column."""
    for reader, line in (
        (read_csv, f"0.0,{value},5"),
        (read_azure, f"2023-11-16 18:17:03,{value},5"),
        (read_burstgpt, f"1,s,1,GPT-4,10,{value},490,API log"),
    ):
        header = {read_csv: CSV[0].removesuffix(",row_id"), read_azure: AZURE_2023[0], read_burstgpt: BURSTGPT[0]}[
            reader
        ]
        with pytest.raises(
            TraceError, match=r"line 2: (prompt_tokens|ContextTokens|Response tokens) is (above|not finite)"
        ):
            reader([header, line])
    with pytest.raises(TraceError, match=r"line 1: input_length is (above|not finite)"):
        read_mooncake([f'{{"timestamp": 0, "input_length": {value}, "output_length": 5}}'])


@pytest.mark.parametrize(
    ("value", "tokens"), [("12", 12), (" 12 ", 12), ("12.0", 12), ("1.2e1", 12), ("999999999", 999_999_999)]
)
def test_counts_are_taken_exactly(value: str, tokens: int) -> None:
    """Every way to write a whole number gives that number; none goes through a float, which would round large ones."""
    assert read_csv(["arrival_s,prompt_tokens,output_tokens", f"0,{value},1"]).prompt_tokens.tolist() == [tokens]
    ids = read_hash_ids(['{"row_id": 9007199254740993, "hash_ids": [9007199254740993, 9007199254740992]}'])
    assert ids == {2**53 + 1: [2**53 + 1, 2**53]}


@pytest.mark.parametrize(
    "lines",
    [
        ["arrival_s;prompt_tokens;output_tokens", "0.0;600;296"],
        ["arrival_s\tprompt_tokens\toutput_tokens", "0.0\t600\t296"],
        ["ARRIVAL_S,Prompt_Tokens,OUTPUT_TOKENS", "0.0,600,296"],
        ["\ufeffarrival_s,prompt_tokens,output_tokens", "0.0,600,296"],
        ["", "  ", "arrival_s,prompt_tokens,output_tokens", "", "0.0,600,296", "   "],
        ['\ufeff{"timestamp": 0, "input_length": 600, "output_length": 296}'],
    ],
    ids=["semicolons", "tabs", "upper case", "byte order mark", "blank lines", "mark before JSON"],
)
def test_what_spreadsheets_write_is_read(lines: list[str]) -> None:
    """Separator, case of the columns, a byte order mark and blank lines make no difference."""
    trace = read_trace(lines)
    assert (trace.prompt_tokens.tolist(), trace.output_tokens.tolist()) == ([600], [296])


def test_lines_are_counted_from_the_start_of_the_file() -> None:
    """Blank lines before the header count as lines."""
    with pytest.raises(TraceError, match="line 5: prompt_tokens is not a number: 'x'"):
        read_trace(["", "", "arrival_s,prompt_tokens,output_tokens", "0,5,5", "1,x,5"])


def test_failed_requests_are_counted_even_without_a_prompt() -> None:
    """BurstGPT has rows 0/0: requests that failed, like all others without an answer."""
    trace = read_burstgpt([*BURSTGPT, "120,s,1,GPT-4,0,0,0,API log"])
    assert (len(trace), trace.dropped_rows) == (2, 2)


def test_more_hashes_than_blocks_are_refused() -> None:
    """A prompt of 20 tokens begins one block of 512, so four hashes must belong to another prompt."""
    row = '{"timestamp": 0, "input_length": 20, "output_length": 5, "hash_ids": [1, 2, 3, 4]}'
    with pytest.raises(TraceError, match="line 1: 4 hash_ids for 20 prompt tokens, which fill 1 of 512"):
        read_mooncake([row])
    with pytest.raises(TraceError, match="line 2: 2 hash_ids for 10 prompt tokens"):
        read_csv(CSV, hashes={0: [1, 2], 1: [1], 2: [1]})
