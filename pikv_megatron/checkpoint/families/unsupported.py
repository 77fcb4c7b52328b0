"""Models that people ask for and that do not load yet, with what each of them needs."""

HYBRID = "linear attention (a recurrent state in place of keys and values) in some layers"
INDEXER = "latent attention (MLA) whose tokens a learned indexer chooses"
CHUNKED = "chunked attention, and layers without rotary embeddings among the others"
OWN_NAMES = "an import of its own tensor names (fused query_key_value), to be tested against"

# By the name of the model's class, and by model_type.
UNSUPPORTED = {
    "DeepseekV32ForCausalLM": INDEXER,
    "GlmMoeDsaForCausalLM": INDEXER,
    "KimiLinearForCausalLM": HYBRID,
    "Qwen3NextForCausalLM": HYBRID,
    "Qwen3_5MoeForCausalLM": HYBRID,
    "MiniMaxForCausalLM": HYBRID,
    "GraniteMoeHybridForCausalLM": HYBRID,
    "BailingHybridForCausalLM": HYBRID,
    "BailingMoeV2ForCausalLM": OWN_NAMES,
    "Llama4ForCausalLM": CHUNKED,
    "Llama4ForConditionalGeneration": CHUNKED,
    "deepseek_v32": INDEXER,
    "glm_moe_dsa": INDEXER,
    "kimi_linear": HYBRID,
    "qwen3_next": HYBRID,
    "qwen3_5_moe": HYBRID,
    "minimax": HYBRID,
    "granitemoehybrid": HYBRID,
    "bailing_hybrid": HYBRID,
    "bailing_moe_v2": OWN_NAMES,
    "llama4": CHUNKED,
    "llama4_text": CHUNKED,
}
