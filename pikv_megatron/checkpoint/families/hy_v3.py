"""Hy3: sigmoid scores with a bias, shared experts, a norm of each head, one dense layer."""

from pikv_megatron.checkpoint.families.base import (
    Family,
    TensorNames,
    attention_biases,
    listed_dense_layers,
    sigmoid_router,
    written_mlp_layer_types,
    written_widths,
)


class HYV3(Family):
    """Hy3-preview."""

    name = "hy_v3"
    class_name = "HYV3ForCausalLM"
    defaults = {
        "vocab_size": 120832, "hidden_size": 4096, "intermediate_size": 13312,
        "moe_intermediate_size": 1536, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5, "num_experts_per_tok": 8, "num_experts": 192,
        "num_shared_experts": 1, "router_scaling_factor": 2.826,
    }
    rotary_base = 11_158_840.0
    has_prediction_layers = True
    names = TensorNames(
        router=("router.gate.weight", "gate.weight"),
        expert_bias=("expert_bias", "e_score_correction_bias"),
        shared=("shared_mlp.", "shared_experts."),
    )

    def attention(self, fields):
        return {"qk_layernorm": "head", **attention_biases(fields)}

    def experts(self, fields):
        width = fields.integer("moe_intermediate_size")
        return {
            "num_experts": fields.integer("num_experts", "num_local_experts"),
            "moe_ffn_hidden_size": width,
            "moe_shared_expert_intermediate_size": width * fields.integer("num_shared_experts"),
            **sigmoid_router(fields, "router_scaling_factor"),
            **listed_dense_layers(fields),
        }

    def refuse_unsupported(self, fields):
        fields.refuse("mlp_bias", False, "biases of experts are not loaded for this family")

    def write(self, architecture):
        width = architecture.moe_ffn_hidden_size
        return {
            "num_experts": architecture.num_experts,
            **written_widths(architecture),
            "num_shared_experts": (architecture.moe_shared_expert_intermediate_size or 0) // width,
            "router_scaling_factor": architecture.moe_router_topk_scaling_factor,
            "mlp_layer_types": written_mlp_layer_types(architecture),
            "attention_bias": architecture.qkv_bias,
        }
