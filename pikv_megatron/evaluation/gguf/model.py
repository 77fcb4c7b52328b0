"""A dense Llama from a GGUF file, in Mixtral's format: a real model to judge caches by.

Every token visits every expert, and an expert is a slice of the dense block's hidden channels: a
router of zeros gives each the same weight 1 / E, and the output of a slice is stored E times as
large. So the logits are those of the dense model, at its size and its cost. Its routing means
nothing.

Legend: E experts, f hidden channels of the dense block, h hidden size, np query heads, ng KV heads,
hn head width.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from pikv_megatron.checkpoint.architecture import Architecture

ARCHITECTURE = "llama"
# Gives the values of a tensor by its name in the file, float32.
Weights = Callable[[str], Tensor]


def mixtral_architecture(metadata: Mapping[str, Any], num_experts: int) -> Architecture:
    """Sizes of the model in Mixtral's terms.

    Args:
        metadata: fields of the GGUF file.
        num_experts: E.

    Raises:
        ValueError: the file holds another kind of model, a field is missing, or E does not divide
            f.
    """
    kind = _field(metadata, "general.architecture")
    if kind != ARCHITECTURE:
        raise ValueError(f"general.architecture is {kind!r}: only {ARCHITECTURE!r} is supported")
    sizes = {
        name: _field(metadata, f"{ARCHITECTURE}.{name}") for name in (
            "block_count", "embedding_length", "feed_forward_length", "context_length",
            "attention.head_count", "attention.head_count_kv", "rope.freq_base",
            "attention.layer_norm_rms_epsilon",
        )
    }
    channels = sizes["feed_forward_length"]
    if num_experts < 2 or channels % num_experts:
        raise ValueError(f"--experts {num_experts}: must be 2 or more, and divide {channels}")
    eos = metadata.get("tokenizer.ggml.eos_token_id")
    return Architecture(
        family="mixtral",
        num_layers=sizes["block_count"],
        hidden_size=sizes["embedding_length"],
        num_attention_heads=sizes["attention.head_count"],
        num_query_groups=sizes["attention.head_count_kv"],
        num_experts=num_experts,
        moe_router_topk=num_experts,
        moe_ffn_hidden_size=channels // num_experts,
        # The file has it in float32, which is not the decimal that was meant.
        layernorm_epsilon=float(f"{sizes['attention.layer_norm_rms_epsilon']:.6g}"),
        vocab_size=len(_field(metadata, "tokenizer.ggml.tokens")),
        max_sequence_length=sizes["context_length"],
        rotary_base=sizes["rope.freq_base"],
        tie_embeddings=True,
        bos_id=metadata.get("tokenizer.ggml.bos_token_id"),
        eos_ids=() if eos is None else (eos,),
    )


def mixtral_tensors(weights: Weights, architecture: Architecture) -> dict[str, Tensor]:
    """The tensors of `model.safetensors`, under transformers' names."""
    tensors = {
        "model.embed_tokens.weight": weights("token_embd.weight"),
        "model.norm.weight": weights("output_norm.weight"),
    }
    for layer in range(architecture.num_layers):
        found = _layer_tensors(lambda name: weights(f"blk.{layer}.{name}.weight"), architecture)
        tensors |= {f"model.layers.{layer}.{name}.weight": x for name, x in found.items()}
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _layer_tensors(weights: Weights, architecture: Architecture) -> dict[str, Tensor]:
    experts, hidden = architecture.num_experts, architecture.hidden_size
    groups = {"q": architecture.num_attention_heads, "k": architecture.num_query_groups}
    tensors = {
        "input_layernorm": weights("attn_norm"),
        "post_attention_layernorm": weights("ffn_norm"),
        **{f"self_attn.{x}_proj": _halves(weights(f"attn_{x}"), n) for x, n in groups.items()},
        "self_attn.v_proj": weights("attn_v"),
        "self_attn.o_proj": weights("attn_output"),
        "block_sparse_moe.gate": torch.zeros(experts, hidden),
    }
    gate, up = weights("ffn_gate").chunk(experts), weights("ffn_up").chunk(experts)
    down = (experts * weights("ffn_down")).chunk(experts, dim=1)
    for expert, parts in enumerate(zip(gate, down, up)):
        names = (f"block_sparse_moe.experts.{expert}.w{i}" for i in (1, 2, 3))
        # Slices of one tensor would be refused as shared memory.
        tensors |= {name: part.clone() for name, part in zip(names, parts)}
    return tensors


def _halves(weight: Tensor, num_heads: int) -> Tensor:
    """[n * hn, h], from rotary pairs side by side (GGUF) to pairs half a head apart."""
    pairs = weight.unflatten(0, (num_heads, -1, 2))
    return pairs.transpose(1, 2).flatten(0, 2)


def _field(metadata: Mapping[str, Any], name: str) -> Any:
    if name not in metadata:
        raise ValueError(f"field {name} is missing")
    return metadata[name]
