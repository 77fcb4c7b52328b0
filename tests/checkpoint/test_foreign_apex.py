"""A package named apex that is not NVIDIA's changes nothing."""

from pathlib import Path

import torch
from megatron_ranks import forward
from ranks import run_ranks
from tiny_models import logits, mixtral, prompts

from pikv_megatron.checkpoint.architecture import Architecture
from pikv_megatron.checkpoint.huggingface import load_huggingface
from pikv_megatron.checkpoint.model_builder import build_model
from pikv_megatron.parallel.process_groups import process_groups


def test_models_build_and_compute_beside_it(tmp_path, monkeypatch):
    model = mixtral()
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "packages" / "apex").mkdir(parents=True)
    (tmp_path / "packages" / "apex" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path / "packages")  # the rank's process inherits it
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))
    [(apex, difference, norm)] = run_ranks(_load_beside_apex, 1, tmp_path / "model", logits(model))
    assert apex.startswith(str(tmp_path))
    assert difference < 1e-4
    assert norm is torch.nn.LayerNorm


def _load_beside_apex(directory: Path, expected: torch.Tensor) -> tuple[str, float, type]:
    import apex

    with process_groups() as groups:
        found = forward(load_huggingface(directory, groups), prompts())
        architecture = Architecture.from_huggingface(directory)
        architecture = architecture.model_copy(update={"normalization": "LayerNorm"})
        layer_norm = build_model(architecture, groups).decoder.final_layernorm
        return apex.__file__, (found - expected).abs().max().item(), type(layer_norm)
