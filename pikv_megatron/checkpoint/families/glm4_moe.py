"""GLM-4.5 and its successors: sigmoid scores with a bias, groups, shared experts, half rotation."""

from pikv_megatron.checkpoint.families.base import (
    Family,
    TensorNames,
    expert_groups,
    leading_dense_layers,
    sigmoid_router,
    written_widths,
)


class Glm4Moe(Family):
    """GLM-4.5, 4.6, 4.7, and 4.5-Air."""

    name = "glm4_moe"
    class_name = "Glm4MoeForCausalLM"
    defaults = {
        "vocab_size": 151552, "hidden_size": 4096, "intermediate_size": 10944,
        "moe_intermediate_size": 1408, "num_hidden_layers": 46, "num_attention_heads": 96,
        "num_key_value_heads": 8, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
        "num_experts_per_tok": 8, "n_routed_experts": 128, "n_shared_experts": 1,
        "routed_scaling_factor": 1.0, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
        "norm_topk_prob": True, "partial_rotary_factor": 0.5,
    }
    has_partial_rotary = True
    has_prediction_layers = True
    names = TensorNames(expert_bias=("gate.e_score_correction_bias",) * 2)

    def attention(self, fields):
        return {
            "qk_layernorm": "head" if fields.flag("use_qk_norm") else "none",
            "qkv_bias": fields.flag("attention_bias"),
        }

    def experts(self, fields):
        width = fields.integer("moe_intermediate_size")
        return {
            "num_experts": fields.integer("n_routed_experts", "num_local_experts", "num_experts"),
            "moe_ffn_hidden_size": width,
            "moe_shared_expert_intermediate_size": width * fields.integer("n_shared_experts"),
            **sigmoid_router(fields, "routed_scaling_factor"),
            **expert_groups(fields),
            **leading_dense_layers(fields),
        }

    def refuse_unsupported(self, fields):
        fields.refuse("norm_topk_prob", True, "sigmoid scores are always normalised, set it true")

    def write(self, architecture):
        width = architecture.moe_ffn_hidden_size
        return {
            "n_routed_experts": architecture.num_experts,
            **written_widths(architecture),
            "n_shared_experts": (architecture.moe_shared_expert_intermediate_size or 0) // width,
            "routed_scaling_factor": architecture.moe_router_topk_scaling_factor,
            "n_group": architecture.moe_router_num_groups or 1,
            "topk_group": architecture.moe_router_group_topk or 1,
            "first_k_dense_replace": len(architecture.dense_layers),
            "norm_topk_prob": True,
            "attention_bias": architecture.qkv_bias,
            "use_qk_norm": architecture.qk_layernorm == "head",
        }
