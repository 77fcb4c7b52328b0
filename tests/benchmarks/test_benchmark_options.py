"""The command line of launch/benchmark.py."""

import pytest
from benchmark_files import parse, write_cache, write_files

from pikv_megatron.benchmarks.model.options import GROUPED, SDPA, STOCK


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[str]:
    return write_files(tmp_path_factory.mktemp("configs"))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model", "/does/not/exist.yaml"], "--model /does/not/exist.yaml"),
        (["--pikv", "/does/not/exist.yaml"], "/does/not/exist.yaml"),
        (["--pikv", "lossless", "h2o", "lossless"], "--pikv lossless: another contestant is named"),
        (["--lengths", "16", "0"], "--lengths"),
        (["--lengths", "65536"], "--lengths 65536"),
        (["--contexts", "0"], "--contexts"),
        (["--contexts", "many"], "--contexts"),
        (["--contexts", "65536"], "--contexts 65536"),
        (["--batch-size", "0"], "--batch-size"),
        (["--steps", "20"], "--steps 20 must be a multiple of flush_interval 16"),
        (["--steps", "0"], "--steps"),
        (["--dtype", "int4"], "int4"),
        (["--threads", "0"], "--threads"),
        (["--clock", "sun"], "sun"),
        (["--clock", "cpu", "--threads", "2"], "--clock cpu needs --threads 1"),
        (["--clock", "cpu"], "--clock cpu needs --threads 1"),
        (["--seed", "-1"], "--seed"),
        (["--output", "/does/not/exist/out.json"], "--output /does/not/exist/out.json"),
        (["--speed", "9"], "--speed"),
    ],
)
def test_refuses(arguments, message):
    with pytest.raises(ValueError) as error:
        parse(*arguments)
    assert message in str(error.value)


def test_names_the_file_of_a_broken_model(tmp_path):
    for content in ("- 1", "num_layers: 0", "{"):
        (tmp_path / "model.yaml").write_text(content)
        with pytest.raises(ValueError, match=f"--model {tmp_path}/model.yaml"):
            parse("--model", str(tmp_path / "model.yaml"))


def test_defaults():
    options = parse()
    assert list(options.pikv) == ["lossless"] and options.lengths == ()
    assert options.contexts == (1024, 8192, 32768) and options.batch_sizes == (1,)
    assert options.steps == 64 and options.extra_steps == 16
    assert options.architecture.num_layers == 4 and options.architecture.hidden_size == 512


def test_a_mixed_batch_is_measured_alone_unless_contexts_are_given():
    options = parse("--lengths")
    assert options.contexts == ()
    assert len(options.lengths) == 16 and options.lengths[::15] == (16, 8192)
    assert all(1.4 < b / a < 1.6 for a, b in zip(options.lengths, options.lengths[1:]))
    options = parse("--lengths", "9", "16", "--contexts", "64")
    assert options.contexts == (64,) and options.lengths == (9, 16)


def test_a_cache_must_suit_the_ranks(files, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match=f"--pikv {files[3]}: expert_parallel_size 3"):
        parse(*files)


def test_names_of_presets_and_files(files):
    options = parse("--pikv", "h2o", files[3], "select_boxes")
    assert list(options.pikv) == ["h2o", "plain", "select_boxes"]
    assert options.names == [GROUPED, SDPA, "h2o", "plain", "select_boxes", STOCK]
    assert options.pikv["h2o"].budget.keep == options.pikv["select_boxes"].selector.share == 0.125


def test_steps_are_whole_flush_intervals_of_every_cache(files, tmp_path):
    other = write_cache(tmp_path, "other", flush_interval=3)
    assert parse(*files, "--pikv", files[3], other).steps == 24
    with pytest.raises(ValueError, match="--steps 4 must be a multiple of flush_interval 6"):
        parse(*files, "--pikv", files[3], other, "--steps", "4")
