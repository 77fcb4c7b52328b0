"""Sizes of latent attention (MLA), under Megatron-Core's names."""

from pydantic import BaseModel, ConfigDict, Field, PositiveInt


class LatentSizes(BaseModel):
    """What a token's row, and what the heads make of it, consist of.

    Attributes:
        q_lora_rank: numbers that queries are projected through; None: they are projected at once.
        kv_lora_rank: numbers of the latent, of which keys and values are projections.
        qk_head_dim: of a head's query and key, numbers that RoPE leaves.
        qk_pos_emb_head_dim: numbers that it turns; the key has them once for all heads.
        v_head_dim: of a head's value.
        norm_epsilon: added to the variance in the norms of the latent and of low-rank queries.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    q_lora_rank: PositiveInt | None = None
    kv_lora_rank: PositiveInt
    qk_head_dim: PositiveInt
    qk_pos_emb_head_dim: PositiveInt = Field(multiple_of=2)
    v_head_dim: PositiveInt
    norm_epsilon: float = Field(default=1e-6, gt=0)

    @property
    def row_width(self) -> int:
        """Numbers of a token in the cache."""
        return self.kv_lora_rank + self.qk_pos_emb_head_dim

    @property
    def query_width(self) -> int:
        """Of a head."""
        return self.qk_head_dim + self.qk_pos_emb_head_dim
