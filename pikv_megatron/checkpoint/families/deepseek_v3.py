"""DeepSeek-V3 and what has its shape: sigmoid scores with a bias, groups, leading dense layers."""

from pikv_megatron.checkpoint.families.base import leading_dense_layers
from pikv_megatron.checkpoint.families.latent_sigmoid import LatentSigmoidFamily


class DeepseekV3(LatentSigmoidFamily):
    """DeepSeek-V3, R1, V3.1, Kimi K2, Moonlight."""

    name = "deepseek_v3"
    class_name = "DeepseekV3ForCausalLM"
    other_names = ("kimi_k2", "KimiK2ForCausalLM")
    defaults = {
        "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432,
        "moe_intermediate_size": 2048, "num_hidden_layers": 61, "num_attention_heads": 128,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "num_experts_per_tok": 8,
        "n_routed_experts": 256, "n_shared_experts": 1, "routed_scaling_factor": 2.5,
        "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "qk_nope_head_dim": 128, "n_group": 8, "topk_group": 4, "first_k_dense_replace": 3,
        "norm_topk_prob": True,
    }

    def dense_layers(self, fields):
        return leading_dense_layers(fields)

    def written_dense_layers(self, architecture):
        return {"first_k_dense_replace": len(architecture.dense_layers)}

    def refuse_unsupported(self, fields):
        super().refuse_unsupported(fields)
        fields.refuse("scoring_func", "sigmoid", "only sigmoid scores are")
