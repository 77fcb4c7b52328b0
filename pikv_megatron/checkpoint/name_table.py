"""One table of tensor names, read in both directions: Hugging Face to Megatron-Core and back.

Legend: h hidden size, hn width of a head, np attention heads, ng query groups, f width of an
expert or a dense layer.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from pikv_megatron.checkpoint.architecture import Architecture
from pikv_megatron.checkpoint.families.registry import FAMILIES

# TransformerEngine fuses a norm into the linear layer behind it and renames its weight.
FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


@dataclass(frozen=True)
class Source:
    """A Hugging Face tensor, or its place in the fused tensor that newer releases may write.

    Attributes:
        name: the usual name.
        shape: the tensor's whole shape.
        other_name: the tensor's other spelling, if there is one.
        expert: its first index there, where that tensor holds all experts.
        first_row: its first row there, where that tensor also holds gate and up together.
        row_step: from one of its rows to the next there.
        is_transposed: whether rows and columns are exchanged there.
        other_shape: the whole shape of that tensor.
    """

    name: str
    shape: tuple[int, ...]
    other_name: str | None = None
    other_shape: tuple[int, ...] = ()
    expert: int | None = None
    first_row: int = 0
    row_step: int = 1
    is_transposed: bool = False


@dataclass(frozen=True)
class Slot:
    """How one Megatron-Core parameter is made of Hugging Face tensors.

    Attributes:
        sources: the tensors; more than one are packed together.
        tp_axis: the axis of every source that tensor-parallel ranks split, if any.
        group_dim: hn where q, k and v are interleaved by query group; 0 where rows are stacked.
    """

    sources: tuple[Source, ...]
    tp_axis: int | None = None
    group_dim: int = 0

    def pack(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """One parameter from its (whole, or equally split) sources."""
        if self.group_dim:
            groups = parts[1].shape[0] // self.group_dim
            return torch.cat([part.unflatten(0, (groups, -1)) for part in parts], 1).flatten(0, 1)
        return torch.cat(parts)

    def unpack(self, parameter: torch.Tensor) -> list[torch.Tensor]:
        """The sources of one whole parameter."""
        rows = [source.shape[0] for source in self.sources]
        if self.group_dim:
            groups = rows[1] // self.group_dim
            grouped = parameter.unflatten(0, (groups, -1))
            return [p.flatten(0, 1) for p in grouped.split([row // groups for row in rows], 1)]
        return list(parameter.split(rows))


def name_table(architecture: Architecture) -> dict[str, Slot]:
    """Every parameter of the whole model, under its name at expert-parallel size 1.

    Raises:
        ValueError: the architecture has parameters that no Hugging Face directory names.
    """
    if architecture.normalization != "RMSNorm":
        raise ValueError(
            f"normalization = {architecture.normalization!r} has no Hugging Face names: "
            "save it with save_megatron"
        )
    a, table = architecture, {}
    vocabulary = (a.vocab_size, a.hidden_size)
    table["embedding.word_embeddings.weight"] = _plain("model.embed_tokens.weight", vocabulary, 0)
    table["decoder.final_layernorm.weight"] = _plain("model.norm.weight", (a.hidden_size,))
    if not a.tie_embeddings:
        table["output_layer.weight"] = _plain("lm_head.weight", vocabulary, 0)
    for layer, is_moe in enumerate(a.is_moe_layer):
        prefix = f"model.layers.{layer}."
        attention = _attention_slots if a.latent_attention is None else _latent_slots
        slots = [*_norm_slots(a, prefix), *attention(a, prefix)]
        slots += _moe_slots(a, layer) if is_moe else _dense_slots(a, layer)
        table |= {f"decoder.layers.{layer}.{name}": slot for name, slot in slots}
    return table


def global_name(parameter: str, first_expert: int) -> str:
    """A parameter's name in `name_table`: local experts counted from the first of this rank."""
    for fused, plain in FUSED_NORMS.items():
        parameter = parameter.replace(fused, plain)
    return re.sub(
        r"(?<=local_experts\.)\d+", lambda m: str(int(m.group()) + first_expert), parameter
    )


def named_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What a checkpoint fills: the parameters, and the biases by which experts are chosen."""
    return {**dict(model.named_parameters()), **expert_biases(model)}


def expert_biases(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The biases by which experts are chosen, float32 in every model."""
    buffers = model.named_buffers()
    return {name: buffer for name, buffer in buffers if name.endswith("router.expert_bias")}


def _plain(name: str, shape: tuple[int, ...], tp_axis: int | None = None) -> Slot:
    return Slot((Source(name, shape),), tp_axis)


def _norm_slots(a: Architecture, prefix: str) -> Iterator[tuple[str, Slot]]:
    shape = (a.hidden_size,)
    yield "input_layernorm.weight", _plain(prefix + "input_layernorm.weight", shape)
    yield "pre_mlp_layernorm.weight", _plain(prefix + "post_attention_layernorm.weight", shape)


def _latent_slots(a: Architecture, prefix: str) -> Iterator[tuple[str, Slot]]:
    """Every projection is split by its rows, the low-rank ones too."""
    h, heads, sizes = a.hidden_size, a.num_attention_heads, a.latent_attention
    low, rank, query_rows = sizes.q_lora_rank, sizes.kv_lora_rank, heads * sizes.query_width
    value_rows = heads * sizes.v_head_dim
    projections = {
        "linear_kv_down_proj": ("kv_a_proj_with_mqa", (sizes.row_width, h)),
        "linear_kv_up_proj": ("kv_b_proj", (heads * sizes.qk_head_dim + value_rows, rank)),
    }
    norms = {"kv_layernorm": ("kv_a_layernorm", rank)}
    if low is None:
        projections["linear_q_proj"] = "q_proj", (query_rows, h)
    else:
        projections["linear_q_down_proj"] = "q_a_proj", (low, h)
        projections["linear_q_up_proj"] = "q_b_proj", (query_rows, low)
        norms["q_layernorm"] = "q_a_layernorm", low
    for name, (theirs, shape) in projections.items():
        slot = _plain(f"{prefix}self_attn.{theirs}.weight", shape, 0)
        yield f"self_attention.{name}.weight", slot
    for name, (theirs, width) in norms.items():
        slot = _plain(f"{prefix}self_attn.{theirs}.weight", (width,))
        yield f"self_attention.{name}.weight", slot
    output = _plain(prefix + "self_attn.o_proj.weight", (h, value_rows), 1)
    yield "self_attention.linear_proj.weight", output


def _attention_slots(a: Architecture, prefix: str) -> Iterator[tuple[str, Slot]]:
    h, hn = a.hidden_size, a.head_dim
    q_rows, kv_rows = a.num_attention_heads * hn, a.num_query_groups * hn
    attention = prefix + "self_attn."
    qkv = tuple(
        Source(f"{attention}{letter}_proj.weight", (rows, h))
        for letter, rows in (("q", q_rows), ("k", kv_rows), ("v", kv_rows))
    )
    yield "self_attention.linear_qkv.weight", Slot(qkv, tp_axis=0, group_dim=hn)
    projection = _plain(attention + "o_proj.weight", (h, q_rows), 1)
    yield "self_attention.linear_proj.weight", projection
    if a.qkv_bias:
        biases = tuple(
            Source(f"{attention}{letter}_proj.bias", (rows,))
            for letter, rows in (("q", q_rows), ("k", kv_rows), ("v", kv_rows))
        )
        yield "self_attention.linear_qkv.bias", Slot(biases, tp_axis=0, group_dim=hn)
    if a.attention_output_bias:
        yield "self_attention.linear_proj.bias", _plain(attention + "o_proj.bias", (h,))
    if a.attention_sink:
        sinks = _plain(attention + "sinks", (a.num_attention_heads,), 0)
        yield "self_attention.core_attention.softmax_offset", sinks
    if a.qk_layernorm != "none":
        whole = a.qk_layernorm == "projection"
        for letter, rows in (("q", q_rows), ("k", kv_rows)):
            slot = _plain(
                f"{attention}{letter}_norm.weight", (rows if whole else hn,), 0 if whole else None
            )
            yield f"self_attention.{letter}_layernorm.weight", slot


def _dense_slots(a: Architecture, layer: int) -> Iterator[tuple[str, Slot]]:
    prefix, h, f = f"model.layers.{layer}.mlp.", a.hidden_size, a.ffn_hidden_size
    gate_up = tuple(Source(f"{prefix}{name}_proj.weight", (f, h)) for name in ("gate", "up"))
    yield "mlp.linear_fc1.weight", Slot(gate_up, tp_axis=0)
    yield "mlp.linear_fc2.weight", _plain(prefix + "down_proj.weight", (h, f), 1)


def _moe_slots(a: Architecture, layer: int) -> Iterator[tuple[str, Slot]]:
    names, prefix = FAMILIES[a.family].names, f"model.layers.{layer}."
    block, newer = prefix + names.block, prefix + "mlp."
    shape = (a.num_experts, a.hidden_size)
    gate = Source(block + names.router[0], shape, newer + names.router[1], shape)
    yield "mlp.router.weight", Slot((gate,))
    if a.linear_bias:
        bias_name = names.router[0].replace("weight", "bias")
        yield "mlp.router.bias", _plain(block + bias_name, shape[:1])
    if a.moe_router_expert_bias:
        bias = Source(
            block + names.expert_bias[0], shape[:1], newer + names.expert_bias[1], shape[:1]
        )
        yield "mlp.router.expert_bias", Slot((bias,))
    if a.moe_shared_expert_intermediate_size is not None:
        yield from _shared_expert_slots(a, block, newer)
    if names.has_stacked_experts:
        yield from _stacked_expert_slots(a, f"{block}experts.")
        return
    for expert in range(a.num_experts):
        gate_up, down = _expert_sources(a, f"{block}experts.", f"{newer}experts.", expert)
        name = f"mlp.experts.local_experts.{expert}."
        yield name + "linear_fc1.weight", Slot(gate_up, tp_axis=0)
        yield name + "linear_fc2.weight", Slot((down,), tp_axis=1)


def _stacked_expert_slots(a: Architecture, prefix: str) -> Iterator[tuple[str, Slot]]:
    """gpt-oss: [experts, in, out], with biases; of out, even places are gate, odd ones up."""
    e, h, f = a.num_experts, a.hidden_size, a.moe_ffn_hidden_size

    def source(name: str, shape: tuple[int, ...], stored: tuple[int, ...], expert: int, **place):
        is_transposed = len(shape) == 2
        return Source(
            prefix + name, shape, prefix + name, (e, *stored), expert,
            is_transposed=is_transposed, **place,
        )

    for expert in range(e):
        name = f"mlp.experts.local_experts.{expert}."
        places = [{"first_row": first, "row_step": 2} for first in (0, 1)]
        fc1 = [source("gate_up_proj", (f, h), (h, 2 * f), expert, **place) for place in places]
        bias = [source("gate_up_proj_bias", (f,), (2 * f,), expert, **place) for place in places]
        yield name + "linear_fc1.weight", Slot(tuple(fc1), tp_axis=0)
        yield name + "linear_fc1.bias", Slot(tuple(bias), tp_axis=0)
        fc2 = source("down_proj", (h, f), (f, h), expert)
        yield name + "linear_fc2.weight", Slot((fc2,), tp_axis=1)
        yield name + "linear_fc2.bias", Slot((source("down_proj_bias", (h,), (h,), expert),))


def _shared_expert_slots(a: Architecture, block: str, newer: str) -> Iterator[tuple[str, Slot]]:
    names, h, f = FAMILIES[a.family].names, a.hidden_size, a.moe_shared_expert_intermediate_size
    prefix, newer_prefix = block + names.shared[0], newer + names.shared[1]
    gate, up, down = (
        Source(f"{prefix}{name}_proj.weight", shape, f"{newer_prefix}{name}_proj.weight", shape)
        for name, shape in (("gate", (f, h)), ("up", (f, h)), ("down", (h, f)))
    )
    yield "mlp.shared_experts.linear_fc1.weight", Slot((gate, up), tp_axis=0)
    yield "mlp.shared_experts.linear_fc2.weight", Slot((down,), tp_axis=1)
    if a.moe_shared_expert_gate:
        yield "mlp.shared_experts.gate_weight", _plain(block + names.shared_gate, (1, h))


def _expert_sources(
    a: Architecture, block: str, fused_block: str, expert: int
) -> tuple[tuple[Source, Source], Source]:
    e, h, f = a.num_experts, a.hidden_size, a.moe_ffn_hidden_size
    names = FAMILIES[a.family].names
    gate, up, down = (f"{block}{expert}.{name}.weight" for name in names.expert)
    fused, fused_shape = fused_block + "gate_up_proj", (e, 2 * f, h)
    gate_up = (
        Source(gate, (f, h), fused, fused_shape, expert),
        Source(up, (f, h), fused, fused_shape, expert, first_row=f),
    )
    return gate_up, Source(down, (h, f), fused_block + "down_proj", (e, h, f), expert)
