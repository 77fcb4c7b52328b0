"""`torch_dist` checkpoints: any layout reads what any other wrote, and broken ones are refused."""

import shutil
from pathlib import Path

import pytest
import torch.distributed as dist
from megatron_ranks import error_of, forward, layout
from ranks import run_ranks
from tiny_models import VOCAB_SIZE, olmoe, prompts, qwen3_moe

from pikv_megatron.checkpoint.huggingface import load_huggingface
from pikv_megatron.checkpoint.huggingface_config import read_architecture
from pikv_megatron.checkpoint.megatron import load_megatron, save_megatron
from pikv_megatron.checkpoint.model_builder import build_model
from pikv_megatron.runtime.process_groups import destroy_process_groups

LAYOUTS = {"ep1": (1, 1), "ep2": (2, 1), "tp2": (1, 2)}  # expert parallel, tensor parallel
MODELS = ["olmoe", "qwen3"]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    olmoe().save_pretrained(root / "olmoe")
    qwen3_moe(mlp_only_layers=[1]).save_pretrained(root / "qwen3")
    return run_ranks(_write_and_read, 2, root, timeout=240)[0]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("written", LAYOUTS)
@pytest.mark.parametrize("read", LAYOUTS)
def test_any_layout_reads_any_other(report, model, written, read):
    assert report["difference"][model, written, read] < 1e-5


def test_errors_name_the_file_and_the_tensor(report):
    errors = report["errors"]
    assert "metadata.json does not exist" in errors["empty"]
    assert "already holds a checkpoint" in errors["saved twice"]
    assert ".distcp is cut short within tensor " in errors["cut"]
    assert ".distcp does not exist, and should hold tensor" in errors["file gone"]
    assert ".metadata cannot be read" in errors["metadata cut"]
    assert "layers.self_attention.q_layernorm.weight is missing" in errors["missing"]
    assert "embeddings.weight has shape (97, 32), the model asks for (120," in errors["vocabulary"]
    assert "has shape (3," in errors["more layers"] and "asks for (4," in errors["more layers"]
    assert "decoder.layers.2." in errors["fewer layers"]
    assert "belongs to no part of the model" in errors["fewer layers"]


def _write_and_read(root: Path) -> dict:
    result, expected = {"difference": {}, "errors": {}}, {}
    for name in MODELS:
        architecture = read_architecture(root / name)
        for written, sizes in LAYOUTS.items():
            with layout(*sizes) as groups:
                model = load_huggingface(root / name, groups)
                save_megatron(model, root / f"{name}_{written}")
                expected.setdefault(name, forward(model, prompts()))
        for read, sizes in LAYOUTS.items():
            with layout(*sizes) as groups:
                for written in LAYOUTS:
                    model = build_model(architecture, groups)
                    load_megatron(model, root / f"{name}_{written}")
                    found = forward(model, prompts())[..., :VOCAB_SIZE]
                    difference = (found - expected[name]).abs().max().item()
                    result["difference"][name, written, read] = difference
    with layout() as groups:
        result["errors"] = _errors(root, groups)
    destroy_process_groups()
    return result


def _errors(root: Path, groups) -> dict[str, str]:
    architecture = read_architecture(root / "olmoe")
    model = build_model(architecture, groups)
    errors = {
        "empty": error_of(load_megatron, model, root / "olmoe"),
        "saved twice": error_of(save_megatron, model, root / "olmoe_ep1"),
    }
    for name, harm in (("cut", _cut), ("file gone", Path.unlink), ("metadata cut", _cut_metadata)):
        errors[name] = error_of(load_megatron, model, _harmed(root, name, harm))
    plain = architecture.model_copy(update={"qk_layernorm": "none"})
    save_megatron(build_model(plain, groups), root / "plain_ep1")
    for name, written, changes in (
        ("missing", "plain", {}),
        ("vocabulary", "olmoe", {"vocab_size": 120}),
        ("more layers", "olmoe", {"num_layers": 4}),
        ("fewer layers", "qwen3", {"num_layers": 2}),
    ):
        wanted = read_architecture(root / ("qwen3" if written == "qwen3" else "olmoe"))
        model = build_model(wanted.model_copy(update=changes), groups)
        errors[name] = error_of(load_megatron, model, root / f"{written}_ep1")
    return errors


def _harmed(root: Path, name: str, harm) -> Path:
    """A copy of a checkpoint whose largest file was harmed."""
    directory = root / name.replace(" ", "_")
    if dist.get_rank() == 0:
        shutil.copytree(root / "olmoe_ep1", directory)
        harm(max(directory.glob("*.distcp"), key=lambda path: path.stat().st_size))
    dist.barrier()
    return directory


def _cut(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1)


def _cut_metadata(path: Path) -> None:
    with (path.parent / ".metadata").open("r+b") as file:
        file.truncate(100)
