"""Experts that a family stores as one transposed tensor are written as they are read."""

import torch
from safetensors.torch import load_file
from tiny_models import gpt_oss, logits
from transformers import GptOssForCausalLM

from pikv_megatron.checkpoint.export import save_huggingface
from pikv_megatron.checkpoint.huggingface import load_huggingface
from pikv_megatron.checkpoint.huggingface_config import read_architecture


def test_gpt_oss_goes_there_and_back(one_rank, tmp_path):
    theirs = gpt_oss()
    theirs.save_pretrained(tmp_path / "theirs")
    model = load_huggingface(tmp_path / "theirs", one_rank, torch.float32)
    architecture = read_architecture(tmp_path / "theirs")
    save_huggingface(model, architecture, tmp_path / "ours", torch.float32)
    before, after = (
        load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "ours")
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert read_architecture(tmp_path / "ours") == architecture
    again = GptOssForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    torch.testing.assert_close(logits(again), logits(theirs), rtol=0, atol=1e-5)
