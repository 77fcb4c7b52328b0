"""The table's figures, from made-up steps and ranks."""

import io

from rich.console import Console

from pikv_megatron.inference import report
from pikv_megatron.inference.progress import progress
from pikv_megatron.inference.report import RankUsage, RunClock, report_table
from pikv_megatron.types import Recalled


def clock_of(monkeypatch, steps, times):
    """A clock that saw `steps` at the seconds `times`, the first one being its start."""
    seconds = iter(times)
    now = [0.0]
    monkeypatch.setattr(report.time, "perf_counter", lambda: now[0])
    now[0] = next(seconds)
    clock = RunClock(num_prompts=len(steps[0]))
    for tokens, now[0] in zip(steps, seconds):
        clock.step(tokens)
    clock.meter.stop()
    return clock


def rendered(table) -> str:
    console = Console(file=io.StringIO(), width=100)
    console.print(table)
    return console.file.getvalue()


def test_decoding_begins_when_every_prompt_has_its_first_token(monkeypatch):
    steps = [[None, None], [4, None], [None, 5], [6, 7], [8, None]]
    clock = clock_of(monkeypatch, steps, [10.0, 11.0, 12.0, 14.0, 14.5, 15.0])
    assert clock.prefill_seconds == 4.0 and clock.decode_seconds == 1.0
    assert clock.num_decode_steps == 2 and clock.num_decoded_tokens == 3


def test_table_shows_ranges_over_ranks(monkeypatch):
    clock = clock_of(monkeypatch, [[1], [2], [3]], [0.0, 1.0, 2.0, 3.0])
    usages = [
        RankUsage(1000, 4000, {"pikv_query": 200, "pikv_flush": 0}),
        RankUsage(
            2000, 4000, {"pikv_query": 200, "pikv_flush": 100}, 9000, 0, Recalled(6, 3, 1, 0.03)
        ),
    ]
    text = rendered(report_table(clock, 1234, 3, usages))
    for expected in (
        "1,234 in 1.00 s", "1.0 kB to 2.0 kB", "4.0 kB", "0.500", "100 bytes to 150 bytes",
        "0 bytes to 50 bytes", "0 bytes to 9.0 kB", "3.0 of host memory, 1.5 of files, 0.5 read",
        "15.00 ms",
    ):
        assert expected in text


def test_table_of_a_run_without_decode_steps(monkeypatch):
    clock = clock_of(monkeypatch, [[1]], [0.0, 1.0])
    text = rendered(report_table(clock, 5, 1, [RankUsage(10, 0, {"pikv_query": 0})]))
    assert "none decoded" in text and "held / dense" not in text


def test_progress_is_one_line_where_there_is_no_terminal():
    console = Console(file=io.StringIO())
    with progress("loading", True, console) as advance:
        advance(1, 2)
    assert console.file.getvalue().startswith("loading: ")
    assert console.file.getvalue().count("\n") == 1


def test_progress_is_a_bar_on_a_terminal_and_nothing_on_other_ranks():
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    with progress("loading", True, console) as advance:
        advance(1, 2)
    assert "1/2" in console.file.getvalue()
    silent = Console(file=io.StringIO())
    with progress("loading", False, silent) as advance:
        advance(1, 2)
    assert silent.file.getvalue() == ""
