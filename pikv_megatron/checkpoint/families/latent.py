"""What families with latent attention share: DeepSeek's fields, and what is refused of them."""

from typing import TYPE_CHECKING, Any

from pikv_megatron.checkpoint.families.base import Family, written_widths
from pikv_megatron.checkpoint.families.fields import ConfigFields
from pikv_megatron.checkpoint.latent_sizes import LatentSizes

if TYPE_CHECKING:
    from pikv_megatron.checkpoint.architecture import Architecture


class LatentFamily(Family):
    """One latent and one rotated key a token; shared experts beside the others.

    RoPE turns neighbouring channels together, in the files as in Megatron-Core.
    """

    is_latent = True

    def attention(self, fields):
        return {"latent_attention": latent_sizes(fields)}

    def refuse_unsupported(self, fields):
        fields.refuse("attention_bias", False, "Megatron-Core's latent attention has no biases")
        fields.refuse(
            "rope_interleave", True, "RoPE is expected to turn neighbouring channels together"
        )
        fields.refuse("partial_rotary_factor", 1.0, "qk_rope_head_dim says what RoPE turns")
        fields.refuse("moe_layer_freq", 1, "every layer behind the dense ones has experts")
        rope = fields.get("rope_parameters", "rope_scaling") or {}
        given = [name for name in ("mscale", "mscale_all_dim") if rope.get(name)]
        if len(given) == 1:
            raise ValueError(
                f"rope_parameters.{given[0]} = {rope[given[0]]!r} is not supported alone: "
                "latent attention takes mscale and mscale_all_dim, or neither"
            )


def latent_sizes(fields: ConfigFields) -> LatentSizes:
    """Of DeepSeek's fields. The norms of latents have an epsilon of their own, 1e-6."""
    has_low_rank = fields.get("q_lora_rank") is not None
    return LatentSizes(
        q_lora_rank=fields.integer("q_lora_rank") if has_low_rank else None,
        kv_lora_rank=fields.integer("kv_lora_rank"),
        qk_head_dim=fields.integer("qk_nope_head_dim"),
        qk_pos_emb_head_dim=fields.integer("qk_rope_head_dim"),
        v_head_dim=fields.integer("v_head_dim"),
    )


def shared_experts(fields: ConfigFields) -> dict[str, int | None]:
    """Experts that every token visits, side by side."""
    count = fields.get("n_shared_experts") and fields.integer("n_shared_experts")
    width = fields.integer("moe_intermediate_size")
    return {
        "num_experts": fields.integer("n_routed_experts", "num_local_experts", "num_experts"),
        "moe_ffn_hidden_size": width,
        "moe_shared_expert_intermediate_size": count * width if count else None,
    }


def written_latent(architecture: "Architecture") -> dict[str, Any]:
    """What `latent_sizes` and `shared_experts` read, and the router's factor and groups."""
    sizes, width = architecture.latent_attention, architecture.moe_ffn_hidden_size
    if sizes is None:
        raise ValueError(f"family = {architecture.family!r} needs latent_attention")
    return {
        "q_lora_rank": sizes.q_lora_rank,
        "kv_lora_rank": sizes.kv_lora_rank,
        "qk_nope_head_dim": sizes.qk_head_dim,
        "qk_rope_head_dim": sizes.qk_pos_emb_head_dim,
        "v_head_dim": sizes.v_head_dim,
        "n_routed_experts": architecture.num_experts,
        "n_shared_experts": (architecture.moe_shared_expert_intermediate_size or 0) // width,
        **written_widths(architecture),
        "routed_scaling_factor": architecture.moe_router_topk_scaling_factor or 1.0,
        "n_group": architecture.moe_router_num_groups or 1,
        "topk_group": architecture.moe_router_group_topk or 1,
    }
