"""A directory that is not what it should be is refused with the file and the tensor named."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from megatron_ranks import forward
from safetensors.torch import load_file, save_file
from tiny_models import VOCAB_SIZE, gpt_oss, logits, mixtral, prompts, qwen3_moe
from transformers import AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from pikv_megatron.checkpoint.huggingface import load_huggingface
from pikv_megatron.checkpoint.huggingface_config import read_architecture
from pikv_megatron.checkpoint.name_table import name_table
from pikv_megatron.checkpoint.tensor_reader import TensorReader

TENSOR = "model.layers.1.self_attn.k_proj.weight"
EXPERT = "model.layers.2.block_sparse_moe.experts.5.w2.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("saved")
    model = mixtral()
    model.save_pretrained(root / "single")
    model.save_pretrained(root / "sharded", max_shard_size="20KB")
    return root


@pytest.fixture
def single(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved / "single", tmp_path / "model"))


@pytest.fixture
def sharded(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved / "sharded", tmp_path / "model"))


def load_error(directory: Path) -> str:
    """The error of a load; all of these come before the process groups are looked at."""
    with pytest.raises(ValueError) as error:
        load_huggingface(directory, pg_collection=None)
    return str(error.value)


def change(directory: Path, function) -> None:
    """Rewrite the single file with `function` applied to its tensors."""
    tensors = load_file(directory / "model.safetensors")
    function(tensors)
    save_file(tensors, directory / "model.safetensors")


def shard_of(directory: Path, tensor: str) -> Path:
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    return directory / index["weight_map"][tensor]


def cut(path: Path, size: int) -> None:
    with path.open("r+b") as file:
        file.truncate(size)


@pytest.mark.parametrize("name", [TENSOR, EXPERT, "model.norm.weight", "lm_head.weight"])
def test_missing_tensor(single, name):
    change(single, lambda tensors: tensors.pop(name))
    message = load_error(single)
    assert name in message and "model.safetensors" in message and "missing" in message


def test_wrong_shape(single):
    change(single, lambda tensors: tensors.update({TENSOR: torch.zeros(17, 32)}))
    message = load_error(single)
    assert TENSOR in message and "(17, 32)" in message and "(16, 32)" in message
    assert str(single / "model.safetensors") in message


def test_integer_tensor(single):
    change(single, lambda t: t.update({TENSOR: torch.zeros(16, 32, dtype=torch.int8)}))
    assert TENSOR in load_error(single)


def test_tensor_that_the_architecture_has_no_place_for(single):
    bias = "model.layers.1.self_attn.k_proj.bias"
    change(single, lambda tensors: tensors.update({bias: torch.zeros(16)}))
    assert bias in load_error(single)


def test_truncated_file_names_the_first_tensor_lost(single):
    path = single / "model.safetensors"
    last = max(header(path).items(), key=lambda entry: entry[1]["data_offsets"][1])[0]
    cut(path, path.stat().st_size - 1)
    message = load_error(single)
    assert str(path) in message and last in message


@pytest.mark.parametrize("size", [0, 4, 100])
def test_file_cut_within_its_header(single, size):
    cut(single / "model.safetensors", size)
    assert str(single / "model.safetensors") in load_error(single)


def test_corrupt_header(single):
    path = single / "model.safetensors"
    with path.open("r+b") as file:
        file.seek(8)
        file.write(b"#" * 40)
    assert str(path) in load_error(single)


def test_truncated_shard(sharded):
    path = shard_of(sharded, EXPERT)
    cut(path, 20)
    message = load_error(sharded)
    assert str(path) in message and "model.layers." in message


def test_missing_shard(sharded):
    path = shard_of(sharded, EXPERT)
    path.unlink()
    message = load_error(sharded)
    assert str(path) in message and "should hold tensor" in message


def test_shard_without_the_tensor_that_the_index_puts_there(sharded):
    path = shard_of(sharded, EXPERT)
    tensors = load_file(path)
    tensors.pop(EXPERT)
    save_file(tensors, path)
    message = load_error(sharded)
    assert str(path) in message and EXPERT in message


def test_index_that_names_a_file_elsewhere(sharded):
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][EXPERT] = "../other.safetensors"
    path.write_text(json.dumps(index))
    assert EXPERT in load_error(sharded)


def test_shards_without_an_index(saved, sharded):
    (sharded / "model.safetensors.index.json").unlink()
    (sharded / "consolidated.safetensors").touch()  # somebody else's, and no shard
    whole, reader = load_file(saved / "single" / "model.safetensors"), TensorReader(sharded)
    assert set(reader.files.file_of) == set(whole)
    path = shard_of(saved / "sharded", EXPERT)
    (sharded / path.name).unlink()
    assert "shards of the model, and no index file" in load_error(sharded)


def test_files_of_any_name_without_an_index(single):
    tensors = load_file(single / "model.safetensors")
    (single / "model.safetensors").unlink()
    save_file({TENSOR: tensors.pop(TENSOR)}, single / "a.safetensors")
    save_file(tensors, single / "b.safetensors")
    assert TensorReader(single).files.file_of.keys() == tensors.keys() | {TENSOR}
    save_file(tensors, single / "c.safetensors")
    assert "c.safetensors" in load_error(single) and "b.safetensors" in load_error(single)


def test_not_a_number_is_found_while_loading(single, one_rank):
    change(single, lambda tensors: tensors[EXPERT].view(-1).__setitem__(7, float("nan")))
    with pytest.raises(ValueError, match=f"model.safetensors: tensor {EXPERT}: NaN"):
        load_huggingface(single, one_rank)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": 3}'])
def test_broken_index(sharded, content):
    (sharded / "model.safetensors.index.json").write_text(content)
    assert "model.safetensors.index.json" in load_error(sharded)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickles_are_never_loaded(single, name):
    (single / "model.safetensors").rename(single / name)
    message = load_error(single)
    assert name in message and "never loaded" in message


def test_directory_without_weights(single):
    (single / "model.safetensors").unlink()
    assert "no weights" in load_error(single)


def test_slices_equal_slices_of_the_whole(saved):
    architecture = read_architecture(saved / "sharded")
    whole = load_file(saved / "single" / "model.safetensors")
    reader = TensorReader(saved / "sharded")
    for slot in name_table(architecture).values():
        for source in slot.sources:
            assert torch.equal(reader.read(source), whole[source.name])
            part = reader.read(source, 0, 3, 7)
            assert torch.equal(part, whole[source.name][3:7])


def header(path: Path) -> dict:
    """The header of a safetensors file, without its metadata."""
    with path.open("rb") as file:
        entries = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    entries.pop("__metadata__", None)
    return entries


def quantise(tensors: dict[str, torch.Tensor], block: tuple[int, int]) -> None:
    """Put every weight of an attention or an expert into float8 with a scale a block; the tensors
    become what the file then means."""
    stored = {}
    for name, weight in tensors.items():
        if "proj" not in name:
            continue
        padded = torch.nn.functional.pad(
            weight, (0, -weight.shape[1] % block[1], 0, -weight.shape[0] % block[0])
        )
        tiles = padded.unflatten(0, (-1, block[0])).unflatten(2, (-1, block[1]))
        scale = tiles.abs().amax((1, 3)) / 448
        values = (tiles / scale[:, None, :, None]).to(torch.float8_e4m3fn)
        meant = (values.float() * scale[:, None, :, None]).flatten(2).flatten(0, 1)
        rows, columns = weight.shape
        flat = values.flatten(2).flatten(0, 1)[:rows, :columns].contiguous()
        stored |= {name: flat, f"{name}_scale_inv": scale}
        tensors[name] = meant[:rows, :columns].contiguous()
    plain = {name: tensor for name, tensor in tensors.items() if name not in stored}
    tensors["stored"] = stored | plain


FP8 = {"quant_method": "fp8", "weight_block_size": [10, 16], "fmt": "e4m3"}


@pytest.fixture
def float8(tmp_path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A checkpoint in float8, and its tensors as they are meant; blocks divide no shape."""
    qwen3_moe().save_pretrained(tmp_path / "float8")
    directory = tmp_path / "float8"
    tensors = load_file(directory / "model.safetensors")
    quantise(tensors, tuple(FP8["weight_block_size"]))
    save_file(tensors.pop("stored"), directory / "model.safetensors")
    configure(directory, FP8)
    return directory, tensors


def configure(directory: Path, quantization: dict | None) -> None:
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = quantization
    (directory / "config.json").write_text(json.dumps(config))


def test_float8_blocks_are_dequantised_piece_by_piece(float8):
    directory, tensors = float8
    architecture, reader = read_architecture(directory), TensorReader(directory)
    for slot in name_table(architecture).values():
        reader.check_sources(slot.sources)
        for source in slot.sources:
            torch.testing.assert_close(reader.read(source), tensors[source.name], rtol=0, atol=0)
            for axis in range(len(source.shape)):
                part = reader.read(source, axis, 3, 8)
                torch.testing.assert_close(part, tensors[source.name].narrow(axis, 3, 5))


def test_a_model_in_float8_gives_the_logits_of_what_its_weights_mean(float8, one_rank):
    directory, tensors = float8
    found = forward(load_huggingface(directory, one_rank), prompts())[..., :VOCAB_SIZE]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    configure(directory, None)
    expected = logits(AutoModelForCausalLM.from_pretrained(directory))
    assert (found - expected).abs().max() < 1e-4


@pytest.mark.parametrize(
    "quantization, message",
    [
        ({"quant_method": "gptq", "bits": 4}, "quant_method = 'gptq'"),
        ({"quant_method": "fp8", "weight_block_size": None}, "weight_block_size = None"),
        (FP8 | {"weight_block_size": [16, 16]}, r"_scale_inv has shape \(\d+, \d+\)"),
        (None, "has type F8_E4M3, not a float, and config.json has no weight_block_size"),
    ],
)
def test_other_quantisation_is_refused_by_name(float8, quantization, message):
    configure(float8[0], quantization)
    with pytest.raises(ValueError, match=message):
        load_huggingface(float8[0], pg_collection=None)


def mxfp4_experts(directory: Path) -> dict[str, torch.Tensor]:
    """Store random experts of a gpt-oss in MXFP4; the tensors as transformers dequantises them."""
    gpt_oss(intermediate_size=64).save_pretrained(directory)
    stored = load_file(directory / "model.safetensors")
    meant = dict(stored)
    generator = torch.Generator().manual_seed(0)
    for name, weight in list(stored.items()):
        if not name.endswith(("gate_up_proj", "down_proj")):
            continue
        experts, columns, rows = weight.shape
        shape = experts, rows, columns // 32
        blocks = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=generator)
        scales = torch.randint(121, 125, shape, dtype=torch.uint8, generator=generator)
        del stored[name]
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        dense = convert_moe_packed_tensors(blocks.clone(), scales.clone(), dtype=torch.float32)
        meant[name] = dense.contiguous()
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
    configure(directory, {"quant_method": "mxfp4"})
    return meant


def test_mxfp4_experts_give_the_logits_of_what_they_mean(tmp_path, one_rank):
    meant = mxfp4_experts(tmp_path)
    architecture, reader = read_architecture(tmp_path), TensorReader(tmp_path)
    expert = "decoder.layers.1.mlp.experts.local_experts.5."
    slot = name_table(architecture)[expert + "linear_fc1.weight"]
    gate_up = meant["model.layers.1.mlp.experts.gate_up_proj"][5]
    for source, first in zip(slot.sources, (0, 1), strict=True):
        assert torch.equal(reader.read(source), gate_up[:, first::2].T)
        assert torch.equal(reader.read(source, 0, 3, 9), gate_up[:, first::2].T[3:9])
        assert torch.equal(reader.read(source, 1, 3, 9), gate_up[:, first::2].T[:, 3:9])
    found = forward(load_huggingface(tmp_path, one_rank), prompts())[..., :VOCAB_SIZE]
    save_file(meant, tmp_path / "model.safetensors", metadata={"format": "pt"})
    configure(tmp_path, None)
    expected = logits(AutoModelForCausalLM.from_pretrained(tmp_path))
    assert (found - expected).abs().max() < 1e-4


def test_mxfp4_of_another_shape(tmp_path):
    mxfp4_experts(tmp_path)
    name = "model.layers.0.mlp.experts.down_proj_scales"
    change(tmp_path, lambda tensors: tensors.update({name: tensors[name][:, :, :1].contiguous()}))
    message = load_error(tmp_path)
    assert name in message and "config.json asks for (8, 32, 2)" in message


def test_float8_without_its_scales(float8):
    name = "model.layers.1.mlp.experts.3.up_proj.weight_scale_inv"
    change(float8[0], lambda tensors: tensors.pop(name))
    assert f"tensor {name} is missing" in load_error(float8[0])
