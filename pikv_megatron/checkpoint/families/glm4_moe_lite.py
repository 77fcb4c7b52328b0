"""GLM-4.7-Flash: DeepSeek-V3's attention and router, dense layers that are listed."""

from pikv_megatron.checkpoint.families.base import (
    TensorNames,
    expert_groups,
    listed_dense_layers,
    sigmoid_router,
    written_mlp_layer_types,
)
from pikv_megatron.checkpoint.families.latent import LatentFamily, shared_experts, written_latent


class Glm4MoeLite(LatentFamily):
    """GLM-4.7-Flash."""

    name = "glm4_moe_lite"
    class_name = "Glm4MoeLiteForCausalLM"
    defaults = {
        "vocab_size": 154880, "hidden_size": 2048, "intermediate_size": 10240,
        "moe_intermediate_size": 1536, "num_hidden_layers": 47, "num_attention_heads": 20,
        "max_position_embeddings": 202752, "rms_norm_eps": 1e-5, "num_experts_per_tok": 4,
        "n_routed_experts": 64, "n_shared_experts": 1, "routed_scaling_factor": 1.8,
        "kv_lora_rank": 512, "q_lora_rank": 768, "qk_rope_head_dim": 64, "v_head_dim": 256,
        "qk_nope_head_dim": 192, "n_group": 1, "topk_group": 1, "norm_topk_prob": True,
    }
    has_prediction_layers = True
    names = TensorNames(expert_bias=("gate.e_score_correction_bias",) * 2)

    def experts(self, fields):
        return {
            **shared_experts(fields),
            **sigmoid_router(fields, "routed_scaling_factor"),
            **expert_groups(fields),
            **listed_dense_layers(fields),
        }

    def refuse_unsupported(self, fields):
        super().refuse_unsupported(fields)
        fields.refuse("norm_topk_prob", True, "sigmoid scores are always normalised, set it true")
        fields.refuse("topk_method", "noaux_tc", "experts are chosen with a bias, noaux_tc")

    def write(self, architecture):
        return {
            **written_latent(architecture),
            "mlp_layer_types": written_mlp_layer_types(architecture),
            "norm_topk_prob": True,
        }
