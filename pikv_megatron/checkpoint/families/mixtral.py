"""Mixtral: experts only, of which a token visits two."""

from pikv_megatron.checkpoint.families.base import Family, TensorNames, sliding_layers


class Mixtral(Family):
    """8x7B, 8x22B."""

    name = "mixtral"
    class_name = "MixtralForCausalLM"
    defaults = {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "max_position_embeddings": 4096 * 32, "rms_norm_eps": 1e-5, "num_experts_per_tok": 2,
        "num_local_experts": 8, "bos_token_id": 1, "eos_token_id": 2,
    }
    rotary_base = 1e6
    names = TensorNames(block="block_sparse_moe.", expert=("w1", "w3", "w2"))

    def attention(self, fields):
        return {"qk_layernorm": "none", **sliding_layers(fields)}

    def experts(self, fields):
        return {
            "num_experts": fields.integer("num_local_experts", "num_experts"),
            "moe_router_topk": fields.integer("num_experts_per_tok"),
            "moe_router_pre_softmax": False,
            "moe_ffn_hidden_size": fields.integer("intermediate_size"),
        }

    def write(self, architecture):
        return {
            "num_local_experts": architecture.num_experts,
            "intermediate_size": architecture.moe_ffn_hidden_size,
            "sliding_window": architecture.sliding_window,
        }
