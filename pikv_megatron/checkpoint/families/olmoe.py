"""OLMoE: norms over whole projections, and clipped queries, keys and values."""

from pikv_megatron.checkpoint.families.base import Family, attention_biases, softmax_router


class Olmoe(Family):
    """1B-7B."""

    name = "olmoe"
    class_name = "OlmoeForCausalLM"
    defaults = {
        "vocab_size": 50304, "hidden_size": 2048, "intermediate_size": 2048,
        "num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 16,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "num_experts_per_tok": 8,
        "num_experts": 64, "eos_token_id": 50279,
    }

    def attention(self, fields):
        clip = fields.get("clip_qkv")
        return {
            "qk_layernorm": "projection",
            "clip_qkv": None if clip is None else fields.number("clip_qkv"),
            **attention_biases(fields),
        }

    def experts(self, fields):
        return {
            "num_experts": fields.integer("num_local_experts", "num_experts"),
            "moe_ffn_hidden_size": fields.integer("intermediate_size"),
            **softmax_router(fields),
        }

    def refuse_unsupported(self, fields):
        width = fields.get("head_dim")
        if width is not None and width * fields.integer("num_attention_heads") != fields.integer(
            "hidden_size"
        ):
            raise ValueError(
                f"head_dim = {width} is not supported: times num_attention_heads it must be "
                "hidden_size"
            )

    def write(self, architecture):
        return {
            "num_experts": architecture.num_experts,
            "intermediate_size": architecture.moe_ffn_hidden_size,
            "norm_topk_prob": not architecture.moe_router_pre_softmax,
            "clip_qkv": architecture.clip_qkv,
            "attention_bias": architecture.qkv_bias,
        }
