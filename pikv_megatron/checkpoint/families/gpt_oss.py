"""gpt-oss: a sink logit a head, every other layer a sliding window, biases, clamped SwiGLU."""

from pikv_megatron.checkpoint.families.base import (
    Family,
    TensorNames,
    sliding_layers,
    written_layer_types,
)

YARN = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096,
}
ALPHA = 1.702  # of Megatron-Core's quick_gelu


class GptOss(Family):
    """20b, 120b."""

    name = "gpt_oss"
    class_name = "GptOssForCausalLM"
    defaults = {
        "vocab_size": 201088, "hidden_size": 2880, "intermediate_size": 2880,
        "num_hidden_layers": 36, "num_attention_heads": 64, "num_key_value_heads": 8,
        "head_dim": 64, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
        "num_experts_per_tok": 4, "num_local_experts": 128, "sliding_window": 128,
        "attention_bias": True, "swiglu_alpha": ALPHA, "swiglu_limit": 7.0,
        "rope_parameters": YARN,
    }
    rotary_base = 150000.0
    names = TensorNames(router=("router.weight", "router.weight"), has_stacked_experts=True)

    def attention(self, fields):
        return {
            "qk_layernorm": "none",
            "linear_bias": True,
            "qkv_bias": True,
            "attention_output_bias": True,
            "attention_sink": True,
            **sliding_layers(fields, lambda layer: layer % 2 == 0),
        }

    def experts(self, fields):
        return {
            "num_experts": fields.integer("num_local_experts", "num_experts"),
            "moe_router_topk": fields.integer("num_experts_per_tok"),
            "moe_ffn_hidden_size": fields.integer("intermediate_size"),
            "activation": "clamped_swiglu",
            "activation_limit": fields.number("swiglu_limit"),
        }

    def refuse_unsupported(self, fields):
        fields.refuse("attention_bias", True, "the model's linear layers all have biases")
        fields.refuse("swiglu_alpha", ALPHA, f"Megatron-Core's quick GELU has {ALPHA}")

    def write(self, architecture):
        return {
            "num_local_experts": architecture.num_experts,
            "intermediate_size": architecture.moe_ffn_hidden_size,
            "sliding_window": architecture.sliding_window,
            "layer_types": written_layer_types(architecture),
            "attention_bias": True,
            "swiglu_alpha": ALPHA,
            "swiglu_limit": architecture.activation_limit,
        }
