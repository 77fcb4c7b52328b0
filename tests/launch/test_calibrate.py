"""launch/calibrate.py on a tiny model: ranks find what one finds, and codecs are fitted to it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launcher import launch
from safetensors.torch import save_file
from tiny_directory import EOS, save_tiny_mixtral

from pikv_megatron import PiKVConfig, PiKVInferenceContext, pikv_layer_spec, process_groups
from pikv_megatron.calibration import run
from pikv_megatron.calibration.options import parse_allocation, parse_options
from pikv_megatron.calibrated import load_calibrated
from pikv_megatron.checkpoint.huggingface import load_huggingface
from pikv_megatron.codec.calibration import read_moments
from pikv_megatron.layer_spec import LayerShape
from pikv_megatron.retention.scorer import HIDDEN
from pikv_megatron.types import KVShape

PROGRAM = Path(__file__).parents[2] / "launch/calibrate.py"
KV = KVShape(2, 8, 8, torch.float32, torch.device("cpu"))


@pytest.fixture(autouse=True)
def without_ranks(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("calibrate")
    save_tiny_mixtral(folder / "model")
    return folder


def arguments(folder: Path, *more: str) -> list[str]:
    return ["--model", str(folder / "model"), "--length", "128", "--windows", "4", *more]


def run_alone(program: Path, *values: str) -> subprocess.CompletedProcess:
    """Without the launcher, and from elsewhere."""
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(program), *values],
        capture_output=True, text=True, timeout=240, env=environment, cwd="/",
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def calibration(folder) -> Path:
    """Made by one rank."""
    file = folder / "one.safetensors"
    alone = run_alone(PROGRAM, *arguments(folder, "--per-expert", "--output", str(file)))
    assert "2 layers, 512 tokens" in alone.stdout
    return file


def test_one_rank_and_two_find_the_same(folder, calibration):
    files = calibration, folder / "two.safetensors"
    wanted = arguments(folder, "--per-expert", "--output", str(files[1]))
    pair = launch(PROGRAM, *wanted, timeout=240)
    assert pair.returncode == 0, pair.stderr
    one, two = (load_calibrated(file) for file in files)
    assert one.manifest == two.manifest and one.manifest["model"] == "model"
    assert one.manifest["settings"]["recall"] == 0.5 and one.manifest["rotary"] == "halves"
    for number in range(2):
        assert one.layers[number].keys() == two.layers[number].keys()
        for name, part in one.layers[number].items():
            torch.testing.assert_close(part, two.layers[number][name], rtol=1e-4, atol=1e-4)
        assert int(one.layers[number]["experts.keys.count"].sum()) == 4 * 127
    moments = [read_moments(files[0], number, one.layers[number], KV) for number in range(2)]
    for mine in (part for layer in moments for part in layer):
        assert mine.count == 4 * 127 and torch.linalg.eigvalsh(mine.metric).min() > -1e-4
    check_configuration(files[0], moments)
    check_it_is_this_model(folder / "model", files[0])


def check_it_is_this_model(model: Path, file: Path) -> None:
    """A fine-tuned model has the same shapes."""
    pikv = PiKVConfig(calibration=file)
    with process_groups(expert_parallel_size=1) as groups:
        loaded = load_huggingface(
            model, groups, torch.bfloat16, spec_transform=lambda spec: pikv_layer_spec(spec, pikv)
        )
        PiKVInferenceContext.for_model(loaded, pikv, 1, 64)
        loaded.decoder.layers[1].self_attention.linear_proj.weight.data *= 1.1
        with pytest.raises(ValueError, match="made of the model 'model', and layer 1 of this one"):
            PiKVInferenceContext.for_model(loaded, pikv, 1, 64)


def test_an_interrupted_run_goes_on_and_ends_with_the_same_file(folder, monkeypatch):
    monkeypatch.setattr(run, "EVERY", 2)
    options = parse_options(arguments(folder, "--output", str(folder / "x"), "--windows", "7"))
    unfinished = folder / "x.unfinished"

    def stop(done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with process_groups(expert_parallel_size=1) as groups:
        model = load_huggingface(
            options.model, groups, torch.float32,
            spec_transform=lambda spec: pikv_layer_spec(spec, PiKVConfig()),
        ).eval()
        fields = model, options.ids, EOS + 1, options.manifest
        chosen = [[] for _ in model.decoder.layers]
        hooks = [
            layer.mlp.register_forward_hook(
                lambda mlp, args, output, own=own: own.append(mlp.choice.best(1).flatten())
            ) for layer, own in zip(model.decoder.layers, chosen)
        ]
        whole = run.calibrate(*fields, per_expert=True)
        for hook in hooks:
            hook.remove()
        for number, own in enumerate(chosen):
            count = whole[number]["experts.keys.count"]
            assert torch.equal(count, torch.cat(own).bincount(minlength=len(count)))
        with pytest.raises(KeyboardInterrupt):
            run.calibrate(*fields, unfinished, stop, per_expert=True)
        assert not any(layer.mlp._forward_hooks for layer in model.decoder.layers)
        told = []
        resumed = run.calibrate(
            *fields, unfinished, lambda done, total: told.append(done), per_expert=True
        )
        assert told == [5, 6, 7], "what was written down was done again"
        for number, layer in whole.items():
            assert all(torch.equal(part, resumed[number][name]) for name, part in layer.items())
        others = *fields[:3], {**options.manifest, "data_sha256": "other"}
        with pytest.raises(ValueError, match="model 'model' is there, made with other data_"):
            run.calibrate(*others, unfinished)


def test_what_is_expected_is_found(folder):
    """Heads that see everything alike have their share of far tokens, and the scorer learns."""
    layers = load_calibrated(folder / "one.safetensors").layers
    for layer in layers.values():
        assert (layer["heads.far"] >= 0).all() and (layer["heads.far"] < 1).all()
        spectrum = torch.linalg.eigvalsh(layer["queries.covariance"])
        assert layer["queries.mean"].shape == (4, 8) and spectrum.min() > -1e-5
        assert layer["scorer.first"].shape == (2, 16, HIDDEN)
        assert layer["gate.weight"].abs().max() > 0
        assert layer["rotary.angles"].shape == (8,) and layer["rotary.angles"][0] == 1


def check_configuration(file: Path, layers) -> None:
    config = PiKVConfig(calibration=file, codec={"transform": {"name": "svd", "rank": 4}})
    specs = config.resolve([LayerShape(KV, 4, 0.3)] * 2)
    for spec, layer in zip(specs, layers):
        codec = spec.options.codec.build(spec.kv, 8, 3, spec.moments)
        assert codec.is_fitted(0) and codec.is_fitted(2)
        shift = codec.tensors()[0]
        assert shift.shape[0] == 1 and torch.equal(shift[0], layer.keys.mean)
    with pytest.raises(ValueError, match="layer 0 has 2 KV heads of keys of width 4"):
        config.resolve([LayerShape(KV._replace(key_width=4), 4, 0.3)])
    old = file.with_name("old.safetensors")
    save_file({"0.keys.mean": torch.zeros(2, 8)}, old)
    with pytest.raises(ValueError, match="old.safetensors: it has no manifest: make it with"):
        PiKVConfig(calibration=old).resolve([LayerShape(KV, 4, 0.3)])
    missing = PiKVConfig(calibration=file.with_name("none.safetensors"))
    with pytest.raises(ValueError, match="calibration .*none.safetensors: cannot read it"):
        missing.resolve([LayerShape(KV, 4, 0.3)])


@pytest.mark.parametrize("more, named", [
    (["--length", "300"], "--length 300 exceeds"), (["--text", "/nowhere"], "--text /nowhere"),
    (["--windows", "999", "--text", __file__], "--windows 500: the text has"),
    (["--output", "/nowhere/x"], "--output /nowhere/x: cannot write"),
    (["--recall", "2"], "argument --recall: must be between 0 and 1, got 2"),
])
def test_bad_options_are_refused(folder, more, named):
    output = [] if "--output" in more else ["--output", str(folder / "x")]
    with pytest.raises(ValueError, match=named):
        parse_options(arguments(folder, *output, *more))


def test_a_budget_is_spent_and_held(folder, calibration, tmp_path):
    sizes, output = folder / "sizes.yaml", tmp_path / "budget.yaml"
    sizes.write_text(
        "shard_after: 0\npage_size: 8\nnum_sinks: 2\nwindow: 8\n"
        f"calibration: {calibration.name}\n"
    )
    values = arguments(folder, "--pikv", str(sizes), "--output", str(output))
    done = run_alone(PROGRAM.with_name("allocate.py"), *values, "--bytes", "100")
    assert "layer 1: keys " in done.stdout and "bytes a token, of 100" in done.stdout
    config = PiKVConfig.from_file(output)
    assert config.page_size == 8 and len(config.layers) == 2
    specs = config.resolve([LayerShape(KV, 4, 0.3)] * 2)
    assert all(spec.moments is not None for spec in specs)
    pools = [spec.options.codec.build(spec.kv, 8, 1).allocate(1) for spec in specs]
    assert 60 <= sum(x.nbytes for pool in pools for x in pool if x is not None) / 8 <= 100
    with pytest.raises(ValueError, match="--bytes"):
        parse_allocation(values)
