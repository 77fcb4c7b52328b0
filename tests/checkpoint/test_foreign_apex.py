"""A package named apex that is not NVIDIA's changes nothing."""

from pathlib import Path

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron_ranks import forward
from parity_models import build, plain_logits
from ranks import run_ranks
from tiny_models import logits, mixtral, prompts

from pikv_megatron import PiKVConfig
from pikv_megatron.checkpoint.huggingface import load_huggingface
from pikv_megatron.checkpoint.huggingface_config import read_architecture
from pikv_megatron.checkpoint.model_builder import build_model
from pikv_megatron.runtime.process_groups import process_groups


def test_models_build_and_compute_beside_it(tmp_path, monkeypatch):
    model = mixtral()
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "packages" / "apex").mkdir(parents=True)
    (tmp_path / "packages" / "apex" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path / "packages")  # the rank's process inherits it
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))
    [found] = run_ranks(
        _build_beside_apex, 1, tmp_path / "model", logits(model), start="spawn"
    )
    apex, difference, norm, own_norms = found
    assert apex.startswith(str(tmp_path))
    assert difference < 1e-4
    assert norm is torch.nn.LayerNorm
    assert own_norms == [{torch.nn.RMSNorm}, {torch.nn.LayerNorm}]


def _build_beside_apex(directory: Path, expected: torch.Tensor) -> tuple[str, float, type, list]:
    import apex

    with process_groups() as groups:
        found = forward(load_huggingface(directory, groups), prompts())
        architecture = read_architecture(directory)
        architecture = architecture.model_copy(update={"normalization": "LayerNorm"})
        layer_norm = build_model(architecture, groups).decoder.final_layernorm
        difference = (found - expected).abs().max().item()
        return apex.__file__, difference, type(layer_norm), _norms_of_own_models(groups)


def _norms_of_own_models(groups) -> list[set[type]]:
    """Norms of models from a user's own layer spec, by what the models ask for."""
    kinds = []
    for normalization in ("RMSNorm", "LayerNorm"):
        spec = get_gpt_layer_local_spec(num_experts=8, normalization=normalization)
        model = build(groups, PiKVConfig(), spec=spec, normalization=normalization)
        assert plain_logits(model, [1, 2, 3]).isfinite().all()
        kinds.append({type(m) for m in model.modules() if "Norm" in type(m).__name__})
    return kinds
