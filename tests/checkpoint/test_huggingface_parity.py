"""Loaded models give transformers' logits, at every layout of ranks; exports give them back."""

import re
import shutil
import tempfile
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from megatron_ranks import error_of, forward, layout
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from tiny_models import VOCAB_SIZE, logits, prompts, save_all
from transformers import AutoModelForCausalLM

from pikv_megatron.checkpoint.export import save_huggingface
from pikv_megatron.checkpoint.huggingface import load_huggingface
from pikv_megatron.checkpoint.huggingface_config import read_architecture
from pikv_megatron.checkpoint.model_builder import build_model
from pikv_megatron.checkpoint.tensor_reader import TensorReader
from pikv_megatron.runtime.process_groups import destroy_process_groups

LAYOUTS = [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2)]  # expert parallel, tensor parallel


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """One job of four ranks goes through every layout and every model."""
    root = tmp_path_factory.mktemp("models")
    expected = save_all(root)
    return root, expected, run_ranks(_every_layout, 4, root, expected, timeout=240)


@pytest.mark.parametrize("sizes", LAYOUTS, ids=lambda s: f"ep{s[0]}-tp{s[1]}")
def test_logits_equal_transformers(report, sizes):
    _, expected, results = report
    for rank, result in enumerate(results):
        for name in expected:
            assert result["difference"][sizes, name] < 1e-4, (rank, name)


def test_a_rank_reads_only_its_experts(report):
    for rank, result in enumerate(report[2]):
        assert result["experts_read"] == {2 * rank, 2 * rank + 1}


def test_an_output_layer_of_its_own_counts_whatever_the_config_says(report):
    """transformers takes the file's, too."""
    assert report[2][0]["untied"] < 1e-4


def test_progress_counts_every_parameter_once(report):
    calls = report[2][0]["progress"]
    assert [done for done, _, _ in calls] == list(range(1, len(calls) + 1))
    assert {total for _, total, _ in calls} == {len(calls)}
    assert len({name for _, _, name in calls}) == len(calls)


def test_dtype_is_the_checkpoints_unless_given(report):
    assert report[2][0]["dtypes"] == [{torch.float32}, {torch.bfloat16}]
    assert report[2][0]["bfloat16_logits"] == torch.bfloat16


def test_spec_transform_gets_and_gives_the_block_spec(report):
    assert report[2][0]["transformed_layers"] == 3


def test_exports_load_in_transformers(report):
    root, expected, _ = report
    for name in expected:
        model = AutoModelForCausalLM.from_pretrained(root / f"{name}_exported", dtype=torch.float32)
        torch.testing.assert_close(logits(model), expected[name], rtol=0, atol=1e-5)


def test_exports_keep_the_architecture(report):
    root, expected, _ = report
    for name in expected:
        exported = read_architecture(root / f"{name}_exported")
        assert exported == read_architecture(root / name)


def test_sizes_that_do_not_fit_are_refused(report):
    for result in report[2]:
        assert "expert parallel size 4 must divide num_experts 6" in result["experts_error"]
        assert "tensor parallel size 2 must divide num_query_groups 1" in result["groups_error"]
        assert "expert_model_parallel_size is 2" in result["export_error"]


def _every_layout(root: Path, expected: dict[str, torch.Tensor]) -> dict:
    result = {"difference": {}}
    for sizes in LAYOUTS:
        with layout(*sizes) as groups:
            for name in expected:
                model = load_huggingface(root / name, groups)
                found = forward(model, prompts())[..., :VOCAB_SIZE]
                result["difference"][sizes, name] = (found - expected[name]).abs().max().item()
                if sizes == (1, 1) and dist.get_rank() == 0:
                    architecture = read_architecture(root / name)
                    save_huggingface(model, architecture, root / f"{name}_exported", torch.float32)
            result |= CHECKS.get(sizes, lambda *_: {})(root / "mixtral", groups)
    destroy_process_groups()
    return result


def _check_options(directory: Path, groups) -> dict:
    calls, layers = [], []

    def transform(spec):
        layers.extend(spec.layer_specs)
        return spec

    models = [
        load_huggingface(directory, groups, progress=lambda *call: calls.append(call)),
        load_huggingface(directory, groups, torch.bfloat16, transform),
    ]
    dtypes = [{p.dtype for p in model.parameters()} for model in models]
    bfloat16_logits = forward(models[1], prompts()).dtype
    return {
        "progress": calls,
        "dtypes": dtypes,
        "bfloat16_logits": bfloat16_logits,
        "transformed_layers": len(layers),
        "untied": _untied_difference(directory.parent / "mixtral_fused_tied", groups),
    }


def _untied_difference(tied: Path, groups) -> float:
    """From transformers, with another output layer in a tied checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(shutil.copytree(tied, Path(folder) / "untied"))
        tensors = load_file(directory / "model.safetensors")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(0).contiguous()
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        expected = logits(AutoModelForCausalLM.from_pretrained(directory))
        found = forward(load_huggingface(directory, groups), prompts())[..., :VOCAB_SIZE]
    return (found - expected).abs().max().item()


def _check_export(directory: Path, groups) -> dict:
    model = load_huggingface(directory, groups)
    architecture = read_architecture(directory)
    return {"export_error": error_of(save_huggingface, model, architecture, directory / "out")}


def _check_experts(directory: Path, groups) -> dict:
    names, read = [], TensorReader.read

    def recording_read(self, source, *args):
        names.append(source.name)
        return read(self, source, *args)

    with mock.patch.object(TensorReader, "read", recording_read):
        load_huggingface(directory, groups)
    experts = {int(e) for name in names for e in re.findall(r"experts\.(\d+)\.", name)}
    architecture = read_architecture(directory).model_copy(update={"num_experts": 6})
    return {"experts_read": experts, "experts_error": error_of(build_model, architecture, groups)}


def _check_groups(directory: Path, groups) -> dict:
    architecture = read_architecture(directory)
    architecture = architecture.model_copy(update={"num_query_groups": 1})
    return {"groups_error": error_of(build_model, architecture, groups)}


CHECKS = {
    (1, 1): _check_options,
    (2, 1): _check_export,
    (4, 1): _check_experts,
    (1, 2): _check_groups,
}
