"""GLM-4.7-Flash: DeepSeek-V3's attention and router, dense layers that are listed."""

from pikv_megatron.checkpoint.families.base import listed_dense_layers, written_mlp_layer_types
from pikv_megatron.checkpoint.families.latent_sigmoid import LatentSigmoidFamily


class Glm4MoeLite(LatentSigmoidFamily):
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

    def dense_layers(self, fields):
        return listed_dense_layers(fields)

    def written_dense_layers(self, architecture):
        return {"mlp_layer_types": written_mlp_layer_types(architecture)}
