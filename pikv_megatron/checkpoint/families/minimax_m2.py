"""MiniMax-M2: sigmoid scores with a bias, norms over whole projections, partial rotation."""

from pikv_megatron.checkpoint.families.base import Family, TensorNames, sigmoid_router


class MiniMaxM2(Family):
    """M2, M2.1."""

    name = "minimax_m2"
    class_name = "MiniMaxM2ForCausalLM"
    defaults = {
        "vocab_size": 200064, "hidden_size": 3072, "intermediate_size": 1536,
        "num_hidden_layers": 62, "num_attention_heads": 48, "num_key_value_heads": 8,
        "head_dim": 128, "max_position_embeddings": 196608, "rms_norm_eps": 1e-6,
        "num_experts_per_tok": 8, "num_local_experts": 256, "bos_token_id": 200034,
        "eos_token_id": 200020,
    }
    rotary_base = 5e6
    has_partial_rotary = True
    names = TensorNames(
        block="block_sparse_moe.", expert=("w1", "w3", "w2"),
        expert_bias=("e_score_correction_bias",) * 2,
    )

    def attention(self, fields):
        return {"qk_layernorm": "projection"}

    def experts(self, fields):
        return {
            "num_experts": fields.integer("num_local_experts", "num_experts"),
            "moe_ffn_hidden_size": fields.integer("intermediate_size"),
            **sigmoid_router(fields),
        }

    def write(self, architecture):
        return {
            "num_local_experts": architecture.num_experts,
            "intermediate_size": architecture.moe_ffn_hidden_size,
        }
