"""What is planned for: a model, a cache, ranks and sequences."""

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from pikv_megatron.cache.head_maps import sent_widths
from pikv_megatron.cache.placement import Placement
from pikv_megatron.checkpoint.architecture import Architecture
from pikv_megatron.checkpoint.latent_sizes import LatentSizes
from pikv_megatron.config import PiKVConfig
from pikv_megatron.layer_spec import LayerShape, LayerSpec
from pikv_megatron.types import KVShape

MAX_RANKS = 512


@dataclass(frozen=True)
class Target:
    """Sequences of one length, dealt over the ranks as the engine deals them.

    Attributes:
        architecture: of the model.
        pikv: the cache.
        num_ranks: G, of the expert-parallel group; a rank has no other model parallelism.
        batch: sequences of all ranks.
        context: tokens of each in the end.
        new_tokens: those of them that are decoded.
        dtype: of weights, and of keys and values as computed.

    Raises:
        ValueError: the ranks cannot share the experts or the shards, or the model has no such
            context.
    """

    architecture: Architecture
    pikv: PiKVConfig
    num_ranks: int
    batch: int
    context: int
    new_tokens: int
    dtype: torch.dtype

    def __post_init__(self):
        if not 1 <= self.num_ranks <= MAX_RANKS:
            raise ValueError(
                f"expert_parallel_size {self.num_ranks} must lie between 1 and {MAX_RANKS}"
            )
        if self.architecture.num_experts % self.num_ranks:
            raise ValueError(
                f"expert_parallel_size {self.num_ranks} must divide the model's "
                f"{self.architecture.num_experts} experts: {self._possible_ranks()} do"
            )
        if self.context > self.max_sequence_length:
            raise ValueError(
                f"context {self.context} exceeds max_sequence_length {self.max_sequence_length} of "
                "the model, or of the configuration: lower the one or raise the other"
            )
        Placement.resolve(self.pikv, self.num_ranks)

    @property
    def max_sequence_length(self) -> int:
        """What page tables are made for."""
        return self.pikv.max_sequence_length or self.architecture.max_sequence_length

    @property
    def num_own(self) -> int:
        """Sequences of the home rank that has most, the first."""
        return -(-self.batch // self.num_ranks)

    @property
    def prompt(self) -> int:
        """Tokens of each sequence that are not decoded."""
        return max(1, self.context - self.new_tokens)

    @cached_property
    def specs(self) -> tuple[LayerSpec, ...]:
        """The model's layers; nothing that is made for them takes memory."""
        return self.pikv.resolve(layer_shapes(self.architecture, self.dtype))

    @property
    def last_in_shards(self) -> int:
        """Tokens of a sequence that its last decode step finds in shards."""
        pikv = self.pikv
        flushed = max(pikv.num_sinks, self.prompt - pikv.window)
        # The token chosen last is not fed, and a step flushes after it has read.
        waiting = self.context - 2 - flushed - pikv.window
        flushes = max(0, waiting // pikv.flush_interval)
        return flushed + flushes * pikv.flush_interval - pikv.num_sinks

    def but(self, **changes) -> "Target":
        """The same with other fields."""
        return replace(self, **changes)

    def _possible_ranks(self) -> str:
        return ", ".join(str(n) for n in ranks_that_divide(self.architecture.num_experts))


def ranks_that_divide(num_experts: int) -> list[int]:
    """Group sizes that share the experts evenly."""
    return [n for n in range(1, min(MAX_RANKS, num_experts) + 1) if num_experts % n == 0]


def layer_shapes(architecture: Architecture, dtype: torch.dtype) -> list[LayerShape]:
    """As `transformer.layer_shapes` reads them off a model, on torch's meta device."""
    a, meta = architecture, torch.device("meta")
    if a.latent_attention is not None:
        return [_latent_shape(a.latent_attention, a.num_attention_heads, dtype)] * a.num_layers
    kv = KVShape(a.num_query_groups, a.head_dim, a.head_dim, dtype, meta)
    return [
        LayerShape(
            kv, a.num_attention_heads, 1 / math.sqrt(a.head_dim),
            a.sliding_window if layer in a.sliding_layers else None,
        )
        for layer in range(a.num_layers)
    ]


def _latent_shape(sizes: LatentSizes, num_heads: int, dtype: torch.dtype) -> LayerShape:
    kv = KVShape(
        1, sizes.row_width, sizes.kv_lora_rank, dtype, torch.device("meta"), values_in_keys=True
    )
    sent = sent_widths(
        sizes.qk_head_dim, sizes.qk_pos_emb_head_dim, sizes.kv_lora_rank, sizes.v_head_dim
    )
    return LayerShape(kv, num_heads, 1 / math.sqrt(sizes.query_width), sent_widths=sent)
