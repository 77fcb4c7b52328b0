"""Qwen3-MoE: a norm of each head's queries and keys, dense layers among the others."""

from pikv_megatron.checkpoint.families.base import (
    Family,
    attention_biases,
    sliding_layers,
    softmax_router,
    stepped_dense_layers,
    written_stepped_experts,
)


class Qwen3Moe(Family):
    """30B-A3B, 235B-A22B."""

    name = "qwen3_moe"
    class_name = "Qwen3MoeForCausalLM"
    defaults = {
        "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144,
        "moe_intermediate_size": 768, "num_hidden_layers": 24, "num_attention_heads": 32,
        "num_key_value_heads": 4, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6,
        "num_experts_per_tok": 8, "num_experts": 128, "decoder_sparse_step": 1,
        "sliding_window": 4096,
    }

    def attention(self, fields):
        windows = sliding_layers(fields) if fields.flag("use_sliding_window") else {}
        return {"qk_layernorm": "head", **attention_biases(fields), **windows}

    def experts(self, fields):
        return {
            "num_experts": fields.integer("num_local_experts", "num_experts"),
            "moe_ffn_hidden_size": fields.integer("moe_intermediate_size"),
            **softmax_router(fields),
            **stepped_dense_layers(fields),
        }

    def write(self, architecture):
        biases = {"attention_bias": architecture.qkv_bias}
        return written_stepped_experts(architecture) | biases
