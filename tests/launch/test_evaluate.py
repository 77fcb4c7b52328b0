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
SMALL = ["--length", "64", "--questions", "8", "--texts", "3"]


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


def test_one_rank_and_two_find_the_same(folder, tmp_path):
    caches = [str(folder / name) for name in ("third.yaml", "eight_bits.yaml")]
    found = []
    for name, run in (("one", run_alone), ("two", partial(launch, timeout=240))):
        output = tmp_path / f"{name}.json"
        done = run(PROGRAM, *arguments(folder, *caches), "--output", str(output))
        assert done.returncode == 0, done.stderr
        for cell in ("lossless", "third", "recall"):
            assert cell in done.stdout
        found.append(json.loads(output.read_text()))
    check_report(found[0])
    assert found[1]["command"].startswith("deepspeed --num_accelerators 2 ")
    one, two = (report["results"][0] for report in found)
    assert two["text"]["perplexity"] == pytest.approx(one["text"]["perplexity"], rel=1e-5)
    assert two["recall"]["accuracy"] == one["recall"]["accuracy"]


def check_report(report: dict) -> None:
    assert "launch/evaluate.py --model" in report["command"] and report["machine"]["cpu"]
    assert report["dtype"] == "float32" and report["length"] == 64
    results = {result["name"]: result for result in report["results"]}
    assert list(results) == ["lossless", "third", "eight_bits"]
    assert results["lossless"]["perplexity_change"] == 0
    assert results["lossless"]["pikv"]["page_size"] == 4
    assert results["third"]["pikv"]["selector"]["share"] == 0.3
    assert all(0.3 <= share < 0.5 for share in results["third"]["text"]["pages_read"])
    assert results["eight_bits"]["bytes_over_lossless"] < 1
    for result in report["results"]:
        assert result["recall"]["num_judged"] == 8 and result["text"]["num_judged"] == 96
        assert result["text"]["step_ms"] > 0


def test_wrong_input_ends_with_one_line_and_code_2(folder):
    run = run_alone(PROGRAM, *arguments(folder, "/does/not/exist.yaml"))
    assert run.returncode == 2
    assert run.stderr.splitlines()[-1].startswith("error: /does/not/exist.yaml: cannot read")
    assert "Traceback" not in run.stderr


def test_reads_files_and_presets(folder):
    options = parse_options(arguments(folder, "lossless", str(folder / "third.yaml")))
    assert list(options.caches) == ["lossless", "third"]
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
        (["--length", "8"], "--length 8 must lie between 16 and"),
        (["--length", "4096"], "--length 4096"),
        (["--questions", "0"], "--questions"),
        (["--texts", "few"], "--texts"),
        (["--dtype", "int4"], "int4"),
        (["--output", "/does/not/exist/out.json"], "--output /does/not/exist/out.json"),
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


def test_refuses_tokens_that_are_no_bytes(folder, tmp_path):
    save_tiny_mixtral(tmp_path)
    Tokenizer(models.WordLevel({"word": 0}, "word")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="byte-level tokenizer"):
        parse_options([*arguments(folder, "lossless"), "--model", str(tmp_path)])
