"""Records are kept by what they were measured with, and shown in tables and pictures."""

import json
import re
from xml.etree import ElementTree

import pytest

from pikv_megatron import PiKVConfig
from pikv_megatron.evaluation.figures import Figures, Record
from pikv_megatron.evaluation.report.page import html_report
from pikv_megatron.evaluation.report.results import Results
from pikv_megatron.evaluation.report.svg import Point, heat_map, pareto, scatter
from pikv_megatron.evaluation.report.tables import Grid, accuracy_table, cost_table

CACHES = {"lossless": PiKVConfig(), "a < b": PiKVConfig(codec=dict(format="int4"))}
TASKS = ["needle", "text", "greedy"]


def figures(accuracy: float = 1.0, num_answers: int = 8, held: int = 50) -> Figures:
    return Figures(
        num_answers=num_answers, exact=accuracy / 2, num_judged=8, accuracy=accuracy,
        perplexity=3.0 / accuracy, divergence=1 - accuracy, agreed_tokens=5.0,
        pages_read=[1.0, 0.5], pages_kept=[1.0, 1.0], mass_read=[1.0, 0.75], held_bytes=held,
        dense_bytes=100, read_bytes=held / 2, dense_read_bytes=100, token_bytes=held,
        errors=[[[0.1], [0.2]], [[0.3], [0.4]]], sent_bytes=3.0 * 1024 * held, step_ms=held / 8,
        batch_size=4,
        tokens_by_shard=[[3, 4], [5, 6]], kept_by_position=[[1.0, -1.0], [0.5, 0.0]],
        tokens_by_expert=[[1, 2], [3, 4]],
    )


@pytest.fixture
def grid() -> Grid:
    values = {"lossless": (1.0, 100), "a < b": (0.8, 25)}
    return Grid(list(CACHES), TASKS, {
        (name, task): Record.of(
            name, task, CACHES[name], figures(accuracy, 2 if task == "needle" else 8, held)
        )
        for name, (accuracy, held) in values.items() for task in TASKS
    })


def test_records_are_found_by_what_they_were_measured_with(tmp_path):
    path, settings = tmp_path / "out/results.json", {"seed": 0}
    results, pikv = Results(path, settings), CACHES["a < b"]
    assert results.find("a", "needle", pikv) is None
    record = Record.of("a", "needle", pikv, figures())
    results.add(record, pikv, {"command": "run"})
    assert Results(path, settings).find("a", "needle", pikv) == record
    assert Results(path, settings).find("b", "needle", pikv).name == "b"
    for other in (
        Results(path, {"seed": 1}).find("a", "needle", pikv),
        Results(path, settings).find("a", "text", pikv),
        Results(path, settings).find("a", "needle", PiKVConfig(window=64)),
    ):
        assert other is None
    Results(path, {"seed": 1}).add(record, pikv, {})
    assert len(json.loads(path.read_text())["records"]) == 2
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="other.json: is not the results of an evaluation"):
        Results(tmp_path / "other.json", settings)


def test_tables_say_what_was_measured(grid):
    accuracy, cost = accuracy_table(grid), cost_table(grid)
    assert accuracy.columns == ["cache", "average", "needle", "text"]
    assert accuracy.rows[1] == ["a < b", "80.0", "80.0 (40)", "80.0"]
    row = dict(zip(cost.columns, cost.rows[1]))
    assert row["perplexity"] == "3.750 (+25.00%)" and row["KL"] == "0.2000"
    assert row["read / dense"] == "0.125" and row["held / dense"] == "0.250 (1/4.0)"
    assert row["KiB sent a step"] == "75.0" and row["ms a step"] == "3.12"
    # What is the same for all says nothing.
    assert not {"pages read %", "kept %", "mass %", "greedy", "bound %"} & set(cost.columns)
    assert accuracy.markdown().splitlines()[2].startswith("| cache | average |")


def test_the_front_holds_what_no_other_beats():
    points = [Point("a", 1, 5), Point("b", 2, 4), Point("c", 2, 7), Point("d", 4, 7)]
    assert [point.name for point in pareto(points)] == ["a", "c"]


def test_pictures_name_every_mark():
    picture = scatter("Title", "x", "y", [Point("one", 0.25, 90.0), Point("two", 1.0, 95.0, True)])
    root = ElementTree.fromstring(picture)
    assert [t.text for t in root.findall(".//{*}title")] == ["two: 1, 95", "one: 0.25, 90"]
    assert {"one", "two", "1/4", "1/2", "1"} <= {t.text for t in root.findall(".//{*}text")}
    root = ElementTree.fromstring(heat_map("Map", ["r"], ["c", "d"], [[2.0, -1.0]], " %"))
    assert [t.text for t in root.findall(".//{*}title")] == ["r, c: 2 %", "r, d: -"]
    assert [r.get("fill") for r in root.findall(".//{*}rect")][1:] == ["rgb(23,52,120)", "#ffffff"]


def test_the_page_needs_nothing_from_elsewhere(grid):
    page = html_report(grid, "model & more", ["python launch/evaluate.py"])
    assert page.count("<svg") == 3 + 4 * 2 and "a &lt; b" in page and "a < b" not in page
    assert not re.search(r"(src|href)=|@import|<script", page)
    assert "model &amp; more" in page
