"""Architectures: read from `config.json` and YAML, refused where Megatron-Core cannot follow."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import (
    GROUPED,
    LATENT_YARN,
    LINEAR,
    LLAMA3,
    YARN,
    deepseek_v3,
    glm4_moe,
    gpt_oss,
    hy_v3,
    mixtral,
    olmoe,
    qwen2_moe,
    qwen3_moe,
)
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import (
    _yarn_get_concentration_factor,
)
from transformers import AutoConfig, MixtralConfig, OlmoeConfig, Qwen3MoeConfig

from pikv_megatron.checkpoint.architecture import Architecture
from pikv_megatron.checkpoint.config_writer import write_config
from pikv_megatron.checkpoint.huggingface_config import read_architecture
from pikv_megatron.checkpoint.rotary import RotaryScaling

MODELS = sorted((Path(__file__).parents[2] / "configs" / "model").glob("*.yaml"))
CONFIGS = {
    "mixtral": mixtral().config.to_dict() | {"architectures": ["MixtralForCausalLM"]},
    "qwen3": qwen3_moe().config.to_dict() | {"architectures": ["Qwen3MoeForCausalLM"]},
    "olmoe": olmoe().config.to_dict() | {"architectures": ["OlmoeForCausalLM"]},
    "qwen2": qwen2_moe().config.to_dict() | {"architectures": ["Qwen2MoeForCausalLM"]},
    "deepseek": deepseek_v3().config.to_dict() | {"architectures": ["DeepseekV3ForCausalLM"]},
    "glm4": glm4_moe(**GROUPED).config.to_dict() | {"architectures": ["Glm4MoeForCausalLM"]},
    "hy_v3": hy_v3().config.to_dict() | {"architectures": ["HYV3ForCausalLM"]},
    "gpt_oss": gpt_oss().config.to_dict() | {"architectures": ["GptOssForCausalLM"]},
}


def read(tmp_path: Path, family: str, drop: tuple[str, ...] = (), **changes) -> Architecture:
    config = {k: v for k, v in CONFIGS[family].items() if k not in drop} | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    return read_architecture(tmp_path)


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_every_model_file_loads_and_explains_every_key(path):
    Architecture.from_yaml(path)
    lines = path.read_text().splitlines()
    keys = [line.split(":")[0] for line in lines if line and line[0] not in "# "]
    assert set(keys) == set(Architecture.model_fields)
    for i, line in enumerate(lines):
        if line and line[0] not in "# ":
            comment = " ".join(_comment_above(lines, i))
            assert "Default:" in comment or "Required" in comment, line


def test_unknown_key_is_refused(tmp_path):
    path = tmp_path / "model.yaml"
    path.write_text(MODELS[0].read_text() + "num_heads: 4\n")
    with pytest.raises(ValueError, match="num_heads"):
        Architecture.from_yaml(path)


def test_yaml_without_keys_is_refused(tmp_path):
    path = tmp_path / "model.yaml"
    path.write_text("4\n")
    with pytest.raises(ValueError, match="keys and values"):
        Architecture.from_yaml(path)


def test_rotary_settings_of_older_releases(tmp_path):
    old = read(tmp_path, "qwen3", ("rope_parameters",), rope_theta=5e5, rope_scaling=None)
    assert (old.rotary_base, old.rotary_scaling) == (5e5, None)
    scaling = {"type": "linear", "factor": 4.0}
    old = read(tmp_path, "qwen3", ("rope_parameters",), rope_theta=5e5, rope_scaling=scaling)
    assert old.rotary_scaling == RotaryScaling(kind="linear", factor=4.0)
    assert read(tmp_path, "mixtral", ("rope_parameters",)).rotary_base == 1e6


def test_expert_count_under_either_name(tmp_path):
    new = read(tmp_path, "qwen3", ("num_experts", "num_local_experts"), num_local_experts=8)
    old = read(tmp_path, "qwen3", ("num_experts", "num_local_experts"), num_experts=8)
    assert new == old and new.num_experts == 8


def test_dense_layers_follow_both_rules(tmp_path):
    stepped = read(tmp_path, "qwen3", decoder_sparse_step=2, num_hidden_layers=5)
    assert stepped.dense_layers == (0, 2, 4)
    listed = read(tmp_path, "qwen3", mlp_only_layers=[1])
    assert listed.is_moe_layer == [True, False, True]


def test_several_end_tokens(tmp_path):
    assert read(tmp_path, "mixtral", eos_token_id=[2, 5]).eos_ids == (2, 5)
    assert read(tmp_path, "mixtral", eos_token_id=None).eos_ids == ()


def test_sliding_window_as_wide_as_the_context_changes_nothing(tmp_path):
    assert read(tmp_path, "mixtral", sliding_window=256) == read(tmp_path, "mixtral")
    off = read(tmp_path, "qwen3", sliding_window=4, use_sliding_window=False)
    assert off == read(tmp_path, "qwen3")


def test_layers_with_sliding_windows(tmp_path):
    mixtral = read(tmp_path, "mixtral", sliding_window=128)
    assert (mixtral.sliding_window, mixtral.sliding_layers) == (128, (0, 1, 2))
    qwen3 = read(tmp_path, "qwen3", sliding_window=16, use_sliding_window=True)
    assert (qwen3.sliding_window, qwen3.sliding_layers) == (16, (0, 1, 2))
    slides = {"sliding_window": 16, "use_sliding_window": True}
    assert read(tmp_path, "qwen2", ("layer_types",), **slides).sliding_layers == (0, 2)
    early = read(tmp_path, "qwen2", ("layer_types",), **slides, max_window_layers=2)
    assert early.sliding_layers == (0,)
    assert read(tmp_path, "gpt_oss").sliding_layers == (0, 2)
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    assert read(tmp_path, "gpt_oss", layer_types=kinds).sliding_layers == (1,)


def test_what_a_file_leaves_out_is_the_familys_default(tmp_path):
    names = {"mixtral": MixtralConfig, "qwen3": Qwen3MoeConfig, "olmoe": OlmoeConfig}
    for family, config_class in names.items():
        config = config_class()
        (tmp_path / "config.json").write_text(json.dumps({"model_type": config.model_type}))
        empty = read_architecture(tmp_path)
        fields = {
            "num_layers": config.num_hidden_layers, "hidden_size": config.hidden_size,
            "num_attention_heads": config.num_attention_heads,
            "num_query_groups": config.num_key_value_heads, "vocab_size": config.vocab_size,
            "moe_router_topk": config.num_experts_per_tok, "num_experts": config.num_experts,
            "layernorm_epsilon": config.rms_norm_eps,
            "max_sequence_length": config.max_position_embeddings,
            "rotary_base": config.rope_parameters["rope_theta"],
            "eos_ids": () if config.eos_token_id is None else (config.eos_token_id,),
        }
        assert {name: getattr(empty, name) for name in fields} == fields, family


def test_a_file_as_people_have_it(tmp_path):
    plain = read(tmp_path, "mixtral")
    inert = {"clip_qkv": 8.0, "norm_topk_prob": False, "attention_bias": True}  # of other families
    assert read(tmp_path, "mixtral", **inert) == plain
    assert read(tmp_path, "mixtral", ("architectures",)) == plain
    half = read(tmp_path, "mixtral", ("dtype", "torch_dtype"), torch_dtype="torch.bfloat16")
    assert half.dtype == "bfloat16"
    assert read(tmp_path, "qwen3", ("rms_norm_eps",)).layernorm_epsilon == 1e-6
    biased = read(tmp_path, "qwen3", attention_bias=True)
    assert biased.qkv_bias and biased.attention_output_bias


def test_yarns_factor_may_be_the_checkpoints_own(tmp_path):
    parameters = YARN | {"attention_factor": 1.7}
    scaling = read(tmp_path, "mixtral", rope_parameters=parameters).rotary_scaling
    assert scaling.attention_factor == 1.7
    assert _yarn_get_concentration_factor(4.0, *scaling.mscales()) == pytest.approx(1.7)


@pytest.mark.parametrize(
    "family, changes, message",
    [
        ("mixtral", {"architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM.*Mixtral.*Olmoe"),
        ("mixtral", {"architectures": None, "model_type": "llama"}, "model_type = llama.*Mixtral"),
        ("mixtral", {"architectures": ["DeepseekV32ForCausalLM"]}, "not supported yet.*indexer"),
        ("deepseek", {"attention_bias": True}, "attention_bias = True"),
        ("deepseek", {"rope_interleave": False}, "rope_interleave = False"),
        ("deepseek", {"topk_method": "greedy"}, "topk_method = 'greedy'"),
        ("deepseek", {"kv_lora_rank": None}, "kv_lora_rank is missing"),
        ("deepseek", {"rope_parameters": LATENT_YARN | {"mscale": None}}, "mscale_all_dim = 0.9"),
        ("deepseek", {"rope_parameters": LATENT_YARN | {"attention_factor": 2.0}}, "yarn is, with"),
        ("deepseek", {"rope_parameters": LINEAR}, "linear is not supported with latent_attention"),
        ("mixtral", {"architectures": ["Qwen3NextForCausalLM"]}, "not supported yet.*linear atten"),
        ("mixtral", {"architectures": ["Llama4ForCausalLM"]}, "not supported yet.*chunked"),
        ("mixtral", {"architectures": None, "model_type": "bailing_moe_v2"}, "not supported yet"),
        ("mixtral", {"architectures": "LlamaForCausalLM"}, "LlamaForCausalLM is not supported"),
        ("mixtral", {"sliding_window": "wide"}, "sliding_window = 'wide'"),
        ("mixtral", {"layer_types": ["linear_attention"] * 3}, "'linear_attention'.*not supported"),
        ("mixtral", {"layer_types": ["full_attention"]}, "layer_types = .* each of 3 layers"),
        ("glm4", {"n_group": 8, "topk_group": 4}, "moe_router_group_judges 2 must be among"),
        ("glm4", {"n_group": 8, "topk_group": 1}, "moe_router_topk 4 exceeds the experts of"),
        ("glm4", {"norm_topk_prob": False}, "norm_topk_prob = False"),
        ("hy_v3", {"mlp_layer_types": ["dense"]}, "mlp_layer_types = "),
        ("hy_v3", {"mlp_bias": True}, "mlp_bias = True"),
        ("gpt_oss", {"swiglu_alpha": 1.5}, "swiglu_alpha = 1.5"),
        ("gpt_oss", {"attention_bias": False}, "attention_bias = False"),
        ("qwen3", {"attention_bias": "yes"}, "attention_bias = 'yes'"),
        ("qwen3", {"decoder_sparse_step": 0}, "decoder_sparse_step = 0"),
        ("qwen3", {"decoder_sparse_step": None}, "decoder_sparse_step is missing"),
        ("qwen3", {"mlp_only_layers": 1}, "mlp_only_layers = 1"),
        ("mixtral", {"num_hidden_layers": "3"}, "num_hidden_layers = '3'"),
        ("mixtral", {"vocab_size": 9.5}, "vocab_size = 9.5"),
        ("mixtral", {"rms_norm_eps": "small"}, "rms_norm_eps = 'small'"),
        ("mixtral", {"rope_parameters": 3}, "rope_parameters = 3"),
        ("mixtral", {"eos_token_id": "</s>"}, "eos_token_id = '</s>'"),
        ("mixtral", {"eos_token_id": [2, None]}, r"eos_token_id = \[2, None\]"),
        ("mixtral", {"eos_token_id": -1}, "eos_token_id = -1"),
        ("mixtral", {"bos_token_id": "<s>"}, "bos_token_id = '<s>'"),
        ("olmoe", {"head_dim": 16}, "head_dim = 16"),
        ("olmoe", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ("olmoe", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("olmoe", {"dtype": "float8"}, "dtype = 'float8'"),
        ("mixtral", {"hidden_size": None}, "hidden_size is missing"),
        ("mixtral", {"num_experts_per_tok": 9}, "moe_router_topk 9 exceeds num_experts 8"),
        ("mixtral", {"num_experts_per_tok": 1}, "moe_router_topk = 1"),
        ("mixtral", {"num_key_value_heads": 3}, "num_query_groups 3"),
        ("mixtral", {"rope_parameters": {"rope_type": "longrope"}}, "rope_type = 'longrope'"),
        ("mixtral", {"rope_parameters": {"rope_type": "linear"}}, "lacks factor"),
        ("mixtral", {"rope_parameters": LLAMA3 | {"low_freq_factor": 2}}, "low_freq_factor = 2"),
        ("mixtral", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ],
)
def test_what_cannot_be_expressed_is_refused_by_name(tmp_path, family, changes, message):
    with pytest.raises(ValueError, match=f"(?s)config.json.*{message}"):
        read(tmp_path, family, **changes)


@pytest.mark.parametrize("content", [None, "", "[1]", "{"])
def test_broken_config_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match="config.json"):
        read_architecture(tmp_path)


SCALINGS = st.none() | st.builds(
    RotaryScaling, kind=st.sampled_from(["linear", "llama3"]), factor=st.floats(1.0, 16.0)
) | st.builds(
    RotaryScaling, kind=st.just("yarn"), factor=st.floats(1.0, 16.0),
    original_max_positions=st.integers(32, 4096), beta_fast=st.floats(8, 64),
    mscale=st.just(0.7), mscale_all_dim=st.just(1.2),
    attention_factor=st.none() | st.floats(0.5, 2.0),
)
COMMON = dict(
    num_layers=st.just(4), hidden_size=st.just(32), num_attention_heads=st.just(4),
    num_query_groups=st.sampled_from([1, 2, 4]), num_experts=st.integers(2, 9),
    moe_ffn_hidden_size=st.integers(1, 99), layernorm_epsilon=st.sampled_from([1e-5, 1e-6]),
    rotary_base=st.floats(100.0, 1e7), rotary_scaling=SCALINGS, vocab_size=st.integers(1, 999),
    max_sequence_length=st.integers(1, 9999), tie_embeddings=st.booleans(),
    bos_id=st.none() | st.integers(0, 9), eos_ids=st.lists(st.integers(0, 9)).map(tuple),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
)
BIASES = ("qkv_bias", "attention_output_bias")
ARCHITECTURES = st.one_of(
    st.builds(
        Architecture, family=st.just("mixtral"), kv_channels=st.none() | st.just(16), **COMMON
    ),
    st.builds(
        Architecture, family=st.just("qwen3_moe"), qk_layernorm=st.just("head"),
        dense_layers=st.just((1, 3)), ffn_hidden_size=st.just(40),
        moe_router_pre_softmax=st.booleans(), **COMMON,
    ).map(lambda a: a.model_copy(update=dict.fromkeys(BIASES, bool(a.num_experts % 2)))),
    st.builds(
        Architecture, family=st.just("olmoe"), qk_layernorm=st.just("projection"),
        clip_qkv=st.none() | st.just(8.0), moe_router_pre_softmax=st.booleans(), **COMMON,
    ),
)


@settings(max_examples=60, deadline=None)
@given(ARCHITECTURES)
def test_written_configs_read_back_equal(tmp_path_factory, architecture):
    directory = tmp_path_factory.mktemp("config")
    write_config(architecture, directory, architecture.dtype)
    assert read_architecture(directory) == architecture


def test_written_configs_load_in_transformers(tmp_path):
    write_config(Architecture.from_yaml(MODELS[-1]), tmp_path, "bfloat16")
    config = AutoConfig.from_pretrained(tmp_path)
    assert (config.model_type, config.rope_parameters["rope_theta"]) == ("mixtral", 10000.0)


@pytest.mark.parametrize(
    "changes, field",
    [
        ({"qk_layernorm": "head"}, "qk_layernorm"),
        ({"normalization": "LayerNorm"}, "normalization"),
        ({"moe_router_pre_softmax": True}, "moe_router_pre_softmax"),
        ({"dense_layers": [0], "ffn_hidden_size": 8}, "dense_layers"),
    ],
)
def test_what_a_family_cannot_say_is_not_written(tmp_path, changes, field):
    architecture = Architecture(**Architecture.from_yaml(MODELS[0]).model_dump() | changes)
    with pytest.raises(ValueError, match=field):
        write_config(architecture, tmp_path, "float32")


def _comment_above(lines: list[str], i: int) -> list[str]:
    comment = []
    while i > 0 and lines[i - 1].startswith("#"):
        i -= 1
        comment.append(lines[i])
    return comment
