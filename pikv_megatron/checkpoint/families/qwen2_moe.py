"""Qwen2-MoE: a shared expert behind a gate of its own, biases of queries, keys and values."""

from pikv_megatron.checkpoint.families.base import (
    Family,
    TensorNames,
    sliding_layers,
    softmax_router,
    stepped_dense_layers,
    written_layer_types,
    written_stepped_experts,
)


class Qwen2Moe(Family):
    """Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B."""

    name = "qwen2_moe"
    class_name = "Qwen2MoeForCausalLM"
    defaults = {
        "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 5632,
        "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632,
        "num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 16,
        "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "num_experts_per_tok": 4,
        "num_experts": 60, "decoder_sparse_step": 1, "sliding_window": 4096, "qkv_bias": True,
        "max_window_layers": 28,
    }
    names = TensorNames(
        shared=("shared_expert.", "shared_expert."), shared_gate="shared_expert_gate.weight"
    )

    def attention(self, fields):
        windows = {}
        if fields.flag("use_sliding_window"):
            last = fields.integer("max_window_layers", least=0)
            windows = sliding_layers(fields, lambda layer: layer % 2 == 0 and layer < last)
        return {"qk_layernorm": "none", "qkv_bias": fields.flag("qkv_bias"), **windows}

    def experts(self, fields):
        return {
            "num_experts": fields.integer("num_local_experts", "num_experts"),
            "moe_ffn_hidden_size": fields.integer("moe_intermediate_size"),
            "moe_shared_expert_intermediate_size": fields.integer(
                "shared_expert_intermediate_size"
            ),
            "moe_shared_expert_gate": True,
            **softmax_router(fields),
            **stepped_dense_layers(fields),
        }

    def write(self, architecture):
        return {
            **written_stepped_experts(architecture),
            "shared_expert_intermediate_size": architecture.moe_shared_expert_intermediate_size,
            "qkv_bias": architecture.qkv_bias,
            "layer_types": written_layer_types(architecture),
        }
