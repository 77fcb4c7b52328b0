"""launch/calibrate.py on a tiny model: ranks find what one finds, and codecs are fitted to it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launcher import launch
from tiny_directory import save_tiny_mixtral

from pikv_megatron import PiKVConfig
from pikv_megatron.calibration.options import parse_allocation, parse_options
from pikv_megatron.codec.calibration import load_moments
from pikv_megatron.layer_spec import LayerShape
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
    return ["--model", str(folder / "model"), "--length", "64", "--windows", "4", *more]


def test_one_rank_and_two_find_the_same(folder):
    files = folder / "one.safetensors", folder / "two.safetensors"
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    alone = subprocess.run(
        [sys.executable, str(PROGRAM), *arguments(folder, "--output", str(files[0]))],
        capture_output=True, text=True, timeout=240, env=environment, cwd="/",
    )
    assert alone.returncode == 0, alone.stderr
    assert "2 layers, 256 tokens" in alone.stdout
    pair = launch(PROGRAM, *arguments(folder, "--output", str(files[1])), timeout=240)
    assert pair.returncode == 0, pair.stderr
    one, two = (load_moments(file, [KV, KV]) for file in files)
    for ours, theirs in zip(one, two):
        for mine, other in zip(ours, theirs):
            assert mine.count == other.count == 4 * 63
            for part, same in zip(mine, other):
                torch.testing.assert_close(part, same, rtol=1e-4, atol=1e-4)
            assert torch.linalg.eigvalsh(mine.metric).min() > -1e-4
    check_configuration(files[0], one)


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
    missing = PiKVConfig(calibration=file.with_name("none.safetensors"))
    with pytest.raises(ValueError, match="calibration .*none.safetensors: cannot read it"):
        missing.resolve([LayerShape(KV, 4, 0.3)])


@pytest.mark.parametrize("more, named", [
    (["--length", "300"], "--length 300 exceeds"), (["--text", "/nowhere"], "--text /nowhere"),
    (["--windows", "99", "--text", __file__], "--windows 99: the text has"),
    (["--output", "/nowhere/x"], "--output /nowhere/x: cannot write"),
])
def test_bad_options_are_refused(folder, more, named):
    output = [] if "--output" in more else ["--output", str(folder / "x")]
    with pytest.raises(ValueError, match=named):
        parse_options(arguments(folder, *output, *more))


def test_a_budget_is_spent_and_held(folder):
    program = PROGRAM.with_name("allocate.py")
    (folder / "sizes.yaml").write_text("shard_after: 0\npage_size: 8\nnum_sinks: 2\nwindow: 8\n")
    output = folder / "budget.yaml"
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    values = arguments(folder, "--pikv", str(folder / "sizes.yaml"), "--output", str(output))
    done = subprocess.run(
        [sys.executable, str(program), *values, "--bytes", "100"], capture_output=True, text=True,
        timeout=240, env=environment, cwd="/",
    )
    assert done.returncode == 0, done.stderr
    assert "layer 1: keys " in done.stdout and "bytes a token, of 100" in done.stdout
    config = PiKVConfig.from_file(output)
    assert config.page_size == 8 and len(config.layers) == 2
    specs = config.resolve([LayerShape(KV, 4, 0.3)] * 2)
    pools = [spec.options.codec.build(spec.kv, 8, 1).allocate(1) for spec in specs]
    assert 60 <= sum(x.nbytes for pool in pools for x in pool if x is not None) / 8 <= 100
    with pytest.raises(ValueError, match="--bytes"):
        parse_allocation(values)
