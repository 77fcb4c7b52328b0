"""DeepSeek-V2: a softmax over all experts, the chosen ones scaled, leading dense layers."""

from pikv_megatron.checkpoint.families.base import expert_groups, leading_dense_layers
from pikv_megatron.checkpoint.families.latent import LatentFamily, shared_experts, written_latent

GREEDY, GROUPED = "greedy", "group_limited_greedy"


class DeepseekV2(LatentFamily):
    """DeepSeek-V2, V2-Lite."""

    name = "deepseek_v2"
    class_name = "DeepseekV2ForCausalLM"
    defaults = {
        "vocab_size": 102400, "hidden_size": 4096, "intermediate_size": 11008,
        "moe_intermediate_size": 1407, "num_hidden_layers": 32, "num_attention_heads": 32,
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "n_routed_experts": 64,
        "n_shared_experts": 2, "routed_scaling_factor": 1.0, "kv_lora_rank": 512,
        "q_lora_rank": 1536, "qk_rope_head_dim": 64, "v_head_dim": 128, "qk_nope_head_dim": 128,
        "first_k_dense_replace": 0, "topk_method": GREEDY,
    }

    def experts(self, fields):
        # A group is as good as its best expert.
        is_grouped = fields.get("topk_method") == GROUPED
        return {
            **shared_experts(fields),
            "moe_router_topk": fields.integer("num_experts_per_tok"),
            "moe_router_pre_softmax": True,
            "moe_router_topk_scaling_factor": fields.number("routed_scaling_factor"),
            **(expert_groups(fields, best=1) if is_grouped else {}),
            **leading_dense_layers(fields),
        }

    def refuse_unsupported(self, fields):
        super().refuse_unsupported(fields)
        fields.refuse("norm_topk_prob", False, "scores of the chosen are not normalised")
        fields.refuse("scoring_func", "softmax", "only a softmax is")
        if fields.get("topk_method") not in (GREEDY, GROUPED):
            raise ValueError(
                f"topk_method = {fields.get('topk_method')!r} is not supported: only {GREEDY!r} "
                f"and {GROUPED!r} are"
            )

    def write(self, architecture):
        has_groups = architecture.moe_router_num_groups is not None
        return {
            **written_latent(architecture),
            "first_k_dense_replace": len(architecture.dense_layers),
            "norm_topk_prob": False,
            "topk_method": GROUPED if has_groups else GREEDY,
        }
