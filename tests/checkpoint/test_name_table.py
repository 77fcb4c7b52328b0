"""Packing of Hugging Face tensors into Megatron-Core parameters, and back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from tiny_models import FAMILIES

from pikv_megatron.checkpoint.architecture import Architecture
from pikv_megatron.checkpoint.huggingface_config import read_architecture
from pikv_megatron.checkpoint.name_table import global_name, name_table

SIZES = dict(num_layers=2, hidden_size=16, num_experts=4, vocab_size=31, max_sequence_length=8)


@settings(max_examples=40, deadline=None)
@given(
    groups=st.sampled_from([1, 2, 4]),
    heads_per_group=st.integers(1, 3),
    width=st.sampled_from([2, 4, 6]),
    ffn=st.sampled_from([4, 12]),
    split=st.sampled_from([1, 2, 4]),
)
def test_pack_and_unpack_are_inverse_whole_and_split(groups, heads_per_group, width, ffn, split):
    architecture = Architecture(
        num_attention_heads=groups * heads_per_group, num_query_groups=groups, kv_channels=width,
        moe_ffn_hidden_size=ffn, **SIZES,
    )
    for slot in name_table(architecture).values():
        sources = [torch.randn(source.shape) for source in slot.sources]
        whole = slot.pack(sources)
        assert all(map(torch.equal, slot.unpack(whole), sources))
        if slot.tp_axis is not None and len(sources) > 1 and groups % split == 0:
            parts = [source.chunk(split, slot.tp_axis) for source in sources]
            packed = [slot.pack(list(part)) for part in zip(*parts, strict=True)]
            assert sum(part.shape[0] for part in packed) == whole.shape[0]
            if slot.group_dim:  # a rank's groups are neighbours in the whole
                assert torch.equal(torch.cat(packed), whole)


def test_queries_keys_and_values_lie_group_by_group():
    architecture = Architecture(
        num_attention_heads=4, num_query_groups=2, kv_channels=2, moe_ffn_hidden_size=4, **SIZES
    )
    slot = name_table(architecture)["decoder.layers.0.self_attention.linear_qkv.weight"]
    q, k, v = (torch.arange(rows)[:, None] + start for rows, start in ((8, 0), (4, 100), (4, 200)))
    packed = slot.pack([q, k, v]).flatten().tolist()
    assert packed == [0, 1, 2, 3, 100, 101, 200, 201, 4, 5, 6, 7, 102, 103, 202, 203]


@pytest.mark.parametrize("original", [True, False], ids=["usual", "fused"])
@pytest.mark.parametrize("build", FAMILIES)
def test_the_table_names_what_transformers_writes(tmp_path, build, original):
    build().save_pretrained(tmp_path, save_original_format=original)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        written = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    slots = name_table(read_architecture(tmp_path)).values()
    named = {}
    for source in (source for slot in slots for source in slot.sources):
        usual = source.other_name is None or (original and source.name != source.other_name)
        named[source.name if usual else source.other_name] = (
            source.shape if usual else source.other_shape
        )
    assert named == written


def test_global_names():
    local = "decoder.layers.3.mlp.experts.local_experts.1.linear_fc1.weight"
    assert global_name(local, 4) == local.replace("experts.1", "experts.5")
    fused = "decoder.layers.3.self_attention.linear_qkv.layer_norm_weight"
    assert global_name(fused, 4) == "decoder.layers.3.input_layernorm.weight"
    fused = "decoder.layers.3.mlp.linear_fc1.layer_norm_weight"
    assert global_name(fused, 0) == "decoder.layers.3.pre_mlp_layernorm.weight"


def test_layer_norm_has_no_names():
    architecture = Architecture(
        num_attention_heads=4, num_query_groups=2, moe_ffn_hidden_size=4,
        normalization="LayerNorm", **SIZES,
    )
    with pytest.raises(ValueError, match="normalization"):
        name_table(architecture)
