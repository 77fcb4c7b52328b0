"""Settings and the command line, refused before anything is computed."""

from pathlib import Path

import pytest
import yaml

from pikv_megatron.demo.options import parse_options
from pikv_megatron.demo.settings import TrainingSettings

CONFIGS = Path(__file__).parents[2] / "configs"
FIELDS = yaml.safe_load((CONFIGS / "demo/training.yaml").read_text())


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def test_defaults(tmp_path):
    options = parse_options(["--output", str(tmp_path / "new")], CONFIGS)
    assert options.settings == TrainingSettings(**FIELDS) and options.seed == 0
    assert options.architecture.num_experts == 8 and options.architecture.moe_router_topk == 2
    assert not options.output.exists()


def test_scale_shortens_every_stage(tmp_path):
    options = parse_options(["--output", str(tmp_path), "--scale", "0.1"], CONFIGS)
    steps = [stage.steps for stage in options.settings.stages]
    assert steps == [round(stage["steps"] / 10) for stage in FIELDS["stages"]]


def test_learning_rate_rises_then_falls():
    settings = TrainingSettings(**FIELDS)
    rates = [settings.learning_rate_at(step) for step in range(settings.num_steps)]
    peak = rates.index(max(rates))
    assert rates[0] < settings.learning_rate / 50 and abs(peak - settings.warmup_steps) <= 1
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[-1] == pytest.approx(settings.final_learning_rate, rel=0.01)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--scale", "0"], "--scale 0"),
        (["--scale", "nan"], "--scale nan"),
        (["--threads", "0"], "--threads 0"),
        (["--seed", "x"], "--seed"),
        (["--output", __file__], "not a directory"),
        (["--output", __file__ + "/deeper"], "not a directory"),
        (["--training", "/does/not/exist"], "/does/not/exist: No such file"),
        (["--model", str(CONFIGS / "demo/training.yaml")], "training.yaml: "),
        (["--tpyo", "1"], "--tpyo"),
    ],
)
def test_bad_arguments_are_refused(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        parse_options(["--output", str(tmp_path), *arguments], CONFIGS)


def test_launchers_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="one process"):
        parse_options(["--output", str(tmp_path)], CONFIGS)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(min_pairs=9, max_pairs=8), "min_pairs 9 exceeds max_pairs 8"),
        (dict(lengths=[8192]), "a length of 8192 needs"),
        (dict(lengths=[32]), "max_pairs 8 may take 64 tokens, lengths has 32"),
        (dict(task="recite"), "task"),
        (dict(batch=1), "batch"),
    ],
)
def test_stages_that_cannot_be_are_refused(changes, message):
    stage = {**FIELDS["stages"][0], **changes}
    with pytest.raises(ValueError, match=message):
        TrainingSettings(**{**FIELDS, "stages": [stage]})


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(vocab_size=256), "vocab_size 256 must be at least 259"),
        (dict(max_sequence_length=256), "above max_sequence_length 256"),
        (dict(qk_layernorm="head"), "qk_layernorm = 'head' cannot be written for mixtral"),
    ],
)
def test_models_that_cannot_be_trained_or_saved_are_refused(tmp_path, changes, message):
    fields = yaml.safe_load((CONFIGS / "model/demo.yaml").read_text())
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(fields | changes))
    with pytest.raises(ValueError, match=message):
        parse_options(
            ["--output", str(tmp_path), "--model", str(tmp_path / "model.yaml")], CONFIGS
        )
