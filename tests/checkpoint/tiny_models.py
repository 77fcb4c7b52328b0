"""Small random models of transformers, saved as users find them, with the logits to meet."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    Glm4MoeLiteConfig,
    Glm4MoeLiteForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    HYV3Config,
    HYV3ForCausalLM,
    MiniMaxM2Config,
    MiniMaxM2ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

VOCAB_SIZE = 97  # odd, so that tensor parallelism has to pad it
SIZES = dict(
    vocab_size=VOCAB_SIZE,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_experts_per_tok=2,
    max_position_embeddings=256,
    initializer_range=0.1,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
YARN = dict(
    rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=64,
    beta_fast=16.0, beta_slow=1.0,
)
OSS_YARN = dict(
    rope_type="yarn", rope_theta=1.5e5, factor=4.0, original_max_position_embeddings=64,
    beta_fast=32.0, beta_slow=1.0, truncate=False,
)
LINEAR = dict(rope_type="linear", rope_theta=1e4, factor=2.0)
LLAMA3 = dict(
    rope_type="llama3", rope_theta=500.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)


def mixtral(**changes: Any) -> PreTrainedModel:
    return _model(
        MixtralForCausalLM, MixtralConfig, changes, num_local_experts=8, intermediate_size=24
    )


def qwen3_moe(**changes: Any) -> PreTrainedModel:
    return _model(
        Qwen3MoeForCausalLM, Qwen3MoeConfig, changes, num_experts=8, moe_intermediate_size=24,
        intermediate_size=40, head_dim=16,
    )


def olmoe(**changes: Any) -> PreTrainedModel:
    return _model(OlmoeForCausalLM, OlmoeConfig, changes, num_experts=8, intermediate_size=24)


def qwen2_moe(**changes: Any) -> PreTrainedModel:
    return _model(
        Qwen2MoeForCausalLM, Qwen2MoeConfig, changes, num_experts=8, moe_intermediate_size=24,
        intermediate_size=40, shared_expert_intermediate_size=28,
    )


def glm4_moe(**changes: Any) -> PreTrainedModel:
    return _model(
        Glm4MoeForCausalLM, Glm4MoeConfig, changes, n_routed_experts=8, moe_intermediate_size=24,
        intermediate_size=40, head_dim=16, n_shared_experts=2, routed_scaling_factor=2.5,
        attention_bias=True, use_qk_norm=True,
    )


def minimax_m2(**changes: Any) -> PreTrainedModel:
    rope = dict(rope_type="default", rope_theta=5e6, partial_rotary_factor=0.5)
    return _model(
        MiniMaxM2ForCausalLM, MiniMaxM2Config, changes, num_local_experts=8, intermediate_size=24,
        head_dim=16, rope_parameters=rope,
    )


def hy_v3(**changes: Any) -> PreTrainedModel:
    return _model(
        HYV3ForCausalLM, HYV3Config, changes, num_experts=8, moe_intermediate_size=24,
        intermediate_size=40, head_dim=16,
    )


def gpt_oss(**changes: Any) -> PreTrainedModel:
    return _model(
        GptOssForCausalLM, GptOssConfig, changes, num_local_experts=8, intermediate_size=24,
        head_dim=16, sliding_window=12, rope_parameters=OSS_YARN,
    )


LATENT = dict(
    num_key_value_heads=4, moe_intermediate_size=24, intermediate_size=40, n_routed_experts=8,
    kv_lora_rank=20, qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=10, rms_norm_eps=1e-5,
)
GROUPED = dict(n_group=4, topk_group=2, num_experts_per_tok=4)
LATENT_YARN = dict(
    rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=64,
    beta_fast=32.0, beta_slow=1.0, mscale=0.707, mscale_all_dim=0.9,
)


def deepseek_v2(**changes: Any) -> PreTrainedModel:
    fields = dict(q_lora_rank=None, n_shared_experts=2, routed_scaling_factor=1.5)
    return _model(
        DeepseekV2ForCausalLM, DeepseekV2Config, changes, **LATENT, **fields,
        rope_parameters=LATENT_YARN, first_k_dense_replace=1,
    )


def deepseek_v3(**changes: Any) -> PreTrainedModel:
    return _model(
        DeepseekV3ForCausalLM, DeepseekV3Config, changes, **LATENT, **GROUPED, q_lora_rank=14,
        rope_parameters=LATENT_YARN, first_k_dense_replace=1,
    )


def glm4_moe_lite(**changes: Any) -> PreTrainedModel:
    sizes = LATENT | dict(v_head_dim=24, q_lora_rank=14)
    return _model(Glm4MoeLiteForCausalLM, Glm4MoeLiteConfig, changes, **sizes)


FAMILIES = (
    mixtral, qwen2_moe, qwen3_moe, olmoe, glm4_moe, minimax_m2, hy_v3, gpt_oss, deepseek_v2,
    deepseek_v3, glm4_moe_lite,
)


def save_all(root: Path) -> dict[str, torch.Tensor]:
    """Save one model of each kind under `root`; returns each one's logits for `prompts()`."""
    saved = {
        "mixtral": (mixtral(), {}),
        "mixtral_sharded_llama3": (mixtral(rope_parameters=LLAMA3), dict(max_shard_size="20KB")),
        "mixtral_fused_tied": (mixtral(tie_word_embeddings=True), dict(save_original_format=False)),
        "qwen3_dense_among": (qwen3_moe(mlp_only_layers=[1], norm_topk_prob=True), {}),
        "qwen3_fused_yarn": (qwen3_moe(rope_parameters=YARN), dict(save_original_format=False)),
        "olmoe_sharded_linear": (olmoe(rope_parameters=LINEAR), dict(max_shard_size="50KB")),
        "olmoe_clipped": (olmoe(clip_qkv=0.5, norm_topk_prob=True), {}),
        "qwen2": (qwen2_moe(norm_topk_prob=True, mlp_only_layers=[2]), {}),
        "qwen2_fused": (qwen2_moe(), dict(save_original_format=False)),
        "glm4_fused": (glm4_moe(), dict(save_original_format=False)),
        "glm4_grouped": (glm4_moe(use_qk_norm=False, **GROUPED), {}),
        "minimax": (minimax_m2(), {}),
        "minimax_fused": (minimax_m2(), dict(save_original_format=False)),
        "hy_biased": (hy_v3(attention_bias=True), {}),
        "hy_fused": (
            hy_v3(mlp_layer_types=["sparse", "dense", "sparse"]), dict(save_original_format=False)
        ),
        "deepseek_v2_grouped": (
            deepseek_v2(topk_method="group_limited_greedy", **GROUPED), {}
        ),
        "deepseek_v3_fused": (
            deepseek_v3(n_group=2, topk_group=1), dict(save_original_format=False)
        ),
        "glm4_lite": (glm4_moe_lite(mlp_layer_types=["sparse", "dense", "sparse"]), {}),
        "qwen3_biased_yarn": (
            qwen3_moe(attention_bias=True, rope_parameters=YARN | {"attention_factor": 1.4}), {}
        ),
    }
    for name, (model, options) in saved.items():
        model.save_pretrained(root / name, **options)
    return {name: logits(model) for name, (model, _) in saved.items()}


def prompts() -> torch.Tensor:
    """Two prompts of 70 tokens, longer than yarn's original length. `[b, sq]`"""
    return torch.randint(0, VOCAB_SIZE, (2, 70), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    """transformers' logits for `prompts()`, every token. `[b, sq, vocab]`"""
    return model(prompts()).logits


def _model(model_class: type, config_class: type, changes: dict, **sizes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model = model_class(config_class(**SIZES | sizes | changes)).eval()
    with torch.no_grad():  # ones and zeros would hide a norm or a bias put in the wrong place
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            if name.endswith("bias") or name.endswith("sinks"):
                parameter.uniform_(-0.5, 0.5)
            if name.endswith(("gate.weight", "router.weight")):  # some routers start as zeros, too
                parameter.normal_(std=0.3)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.uniform_(-0.2, 0.2)
    return model
