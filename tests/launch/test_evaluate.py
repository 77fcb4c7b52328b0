"""launch/evaluate.py on a tiny model: complete with and without the launcher, and it refuses."""

import json
from functools import partial
from pathlib import Path

import pytest
from launcher import launch, run_alone
from tiny_directory import save_tiny_mixtral
from tokenizers import Tokenizer, models

from pikv_megatron.evaluation.options import parse_options

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "launch/evaluate.py"
SIZES = "shard_after: 0\npage_size: 4\nnum_sinks: 2\nwindow: 8\nflush_interval: 3\n"
SMALL = ["--length", "64", "--samples", "3"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model, and caches that read a part of their pages and store them in fewer bits."""
    folder = tmp_path_factory.mktemp("evaluate")
    save_tiny_mixtral(folder / "model")
    (folder / "third.yaml").write_text(SIZES + "selector: {name: budget, share: 0.3}\n")
    (folder / "eight_bits.yaml").write_text(SIZES + "codec: {format: int8}\n")
    return folder


@pytest.fixture(autouse=True)
def without_ranks(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def arguments(folder: Path, *caches: str) -> list[str]:
    return ["--model", str(folder / "model"), "--pikv", *caches, *SMALL]


def results(folder: Path) -> dict[tuple[str, str], dict]:
    records = json.loads((folder / "results.json").read_text())["records"]
    return {(record["name"], record["task"]): record for record in records}


def test_one_rank_and_two_find_the_same_and_nothing_is_run_twice(folder, tmp_path):
    caches = [str(folder / name) for name in ("third.yaml", "eight_bits.yaml")]
    found = []
    for name, run in (("one", run_alone), ("two", partial(launch, timeout=240))):
        done = run(PROGRAM, *arguments(folder, *caches), "--out", str(tmp_path / name))
        assert done.returncode == 0, done.stderr
        for cell in ("lossless", "third", "recall", "held / dense"):
            assert cell in done.stdout
        found.append(results(tmp_path / name))
        assert "| third |" in (tmp_path / name / "report.md").read_text()
        for file in ("report.html", "held.svg"):
            assert "</svg>" in (tmp_path / name / file).read_text()
    one, two = found
    check_records(one)
    assert {record["figures"]["sent_bytes"] for record in one.values()} == {0}
    assert all(record["figures"]["sent_bytes"] > 0 for record in two.values())
    for key, record in two.items():
        assert record["command"].startswith("deepspeed --num_accelerators 2 ")
        figures, others = record["figures"], one[key]["figures"]
        if key[0] == "lossless":
            assert figures["perplexity"] == pytest.approx(others["perplexity"], rel=1e-5)
            assert figures["accuracy"] == others["accuracy"]
    check_that_it_resumes(folder, tmp_path / "one", caches, one)


def check_that_it_resumes(
    folder: Path, out: Path, caches: list[str], known: dict[tuple[str, str], dict]
) -> None:
    """After an interruption before one record, that one alone is measured, and as it was."""
    lost = known["third", "text"]
    kept = [record for record in known.values() if record is not lost]
    (out / "results.json").write_text(json.dumps({"records": kept}))
    done = run_alone(PROGRAM, *arguments(folder, *caches), "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert "text: third: " in done.stderr and "eight_bits: " not in done.stderr
    again = results(out)
    assert set(again) == set(known)
    found = again["third", "text"]["figures"]
    assert found | {"step_ms": 0.0} == lost["figures"] | {"step_ms": 0.0}


def check_records(records: dict) -> None:
    caches, tasks = ("lossless", "third", "eight_bits"), ("recall", "text", "greedy")
    assert set(records) == {(cache, task) for cache in caches for task in tasks}
    for record in records.values():
        assert "launch/evaluate.py --model" in record["command"] and record["machine"]["cpu"]
        settings = record["settings"]
        assert settings["dtype"] == "float32" and settings["length"] == 64
        assert settings["expert_parallel_size"] == 1
    text = {cache: records[cache, "text"]["figures"] for cache in caches}
    assert records["lossless", "text"]["pikv"]["page_size"] == 4
    assert records["third", "text"]["pikv"]["selector"]["share"] == 0.3
    assert all(0.3 <= share < 0.5 for share in text["third"]["pages_read"])
    assert text["eight_bits"]["held_bytes"] < text["lossless"]["held_bytes"]
    assert text["lossless"]["divergence"] == 0 and text["third"]["divergence"] > 0


def test_wrong_input_ends_with_one_line_and_code_2(folder):
    run = run_alone(PROGRAM, *arguments(folder, "/does/not/exist.yaml"))
    assert run.returncode == 2
    assert run.stderr.splitlines()[-1].startswith("error: /does/not/exist.yaml: cannot read")
    assert "Traceback" not in run.stderr


def test_reads_files_and_presets(folder):
    options = parse_options(arguments(folder, "lossless", str(folder / "third.yaml")))
    assert list(options.caches) == ["lossless", "third"]
    assert options.caches["lossless"].page_size == 64 and options.tasks[0] == "recall"
    options = parse_options(arguments(folder, str(folder / "third.yaml")))
    assert options.caches["lossless"].page_size == 4
    assert options.caches["third"].page_size == 4


@pytest.mark.parametrize(
    "text, message",
    [
        ("window: 8\nwidow: 9\n", "widow"),
        ("max_sequence_length: 32\n", "max_sequence_length 32 is less than --length 64"),
        ("expert_shards: 4\nreplicas: 3\n", "replicas 3 must not exceed the 2 experts"),
    ],
)
def test_refuses_a_cache(folder, tmp_path, text, message):
    (tmp_path / "cache.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        parse_options(arguments(folder, str(tmp_path / "cache.yaml")))


@pytest.mark.parametrize(
    "changes, message",
    [
        (["--model", "/does/not/exist"], "--model /does/not/exist"),
        (["--pikv", "unheard_of"], "preset 'unheard_of' is unknown"),
        (["--pikv", "lossless", "lossless"], "--pikv lossless: another one"),
        (["--pikv"], "--pikv"),
        (["--length", "4096"], "--length 4096"),
        (["--samples", "0"], "--samples"),
        (["--tasks", "chess"], "--tasks chess: the tasks are needle"),
        (["--tasks", "needle"], "--tasks needle: it needs a tokenizer of words"),
        (["--tasks", "json_lines"], "--tasks json_lines: it needs a file: --lines FILE"),
        (["--text", "/does/not/exist"], "--text /does/not/exist: there is no such file"),
        (["--dtype", "int4"], "int4"),
        (["--out", str(PROGRAM)], f"--out {PROGRAM}: cannot write a folder there"),
    ],
)
def test_refuses(folder, changes, message):
    with pytest.raises(ValueError) as error:
        parse_options([*arguments(folder, "lossless"), *changes])
    assert message in str(error.value)


def test_refuses_ranks_that_cannot_share(folder, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="3 ranks were launched: .* 4 experts"):
        parse_options(arguments(folder, "lossless"))


def test_another_tokenizer_has_other_tasks(folder, tmp_path):
    save_tiny_mixtral(tmp_path)
    Tokenizer(models.WordLevel({"word": 0}, "word")).save(str(tmp_path / "tokenizer.json"))
    options = parse_options([*arguments(folder, "lossless"), "--model", str(tmp_path)])
    assert "needle" in options.tasks and "recall" not in options.tasks


def test_refuses_a_lossy_cache_of_the_reference_s_name(tmp_path, folder):
    (tmp_path / "lossless.yaml").write_text(SIZES + "codec: {format: int8}\n")
    with pytest.raises(ValueError, match="it is not lossless; rename it"):
        parse_options(arguments(folder, str(tmp_path / "lossless.yaml")))


CACHES_WITH_SHARES = {
    "third": ("selector: {name: budget, pages: 3}\n", lambda pikv: pikv.selector.share),
    "h2o": ("retention: h2o\n", lambda pikv: pikv.budget.keep),
    "routed": ("token_shards: 8\nrouter: hash\n", lambda pikv: pikv.router.k / 8),
    "flexgen": (
        "retention: flexgen\nselector: budget\n",
        lambda pikv: max(pikv.budget.keep, pikv.selector.share),
    ),
}


@pytest.mark.parametrize("name", CACHES_WITH_SHARES)
def test_a_cache_is_run_at_every_share(folder, tmp_path, name):
    text, share_of = CACHES_WITH_SHARES[name]
    (tmp_path / f"{name}.yaml").write_text(SIZES + text)
    caches = str(tmp_path / f"{name}.yaml"), str(folder / "eight_bits.yaml")
    found = parse_options([*arguments(folder, *caches), "--shares", "0.5", "0.125"]).caches
    assert list(found) == ["lossless", f"{name} 1/2", f"{name} 1/8", "eight_bits"]
    assert [share_of(found[f"{name} {share}"]) for share in ("1/2", "1/8")] == [0.5, 0.125]


def test_refuses_a_share_that_cannot_be_had(folder, tmp_path):
    (tmp_path / "routed.yaml").write_text(SIZES + "token_shards: 8\nrouter: hash\n")
    given = arguments(folder, str(tmp_path / "routed.yaml"))
    with pytest.raises(ValueError, match="--shares 0.0625: .*routed.yaml: router hash .* of 8 is "
                       "1/2: set token_shards.* to a multiple of 16"):
        parse_options([*given, "--shares", "0.0625"])
    with pytest.raises(ValueError, match="--shares 1.5: there is no more than 1"):
        parse_options([*given, "--shares", "1.5"])
