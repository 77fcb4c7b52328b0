"""The newest tokens (and the first few) of one layer's sequences, on their home rank."""

import torch

from pikv_megatron.ops.append_kv import append_kv


class StreamWindow:
    """A ring for each sequence: `num_sinks` fixed places, then `capacity` circular ones.

    Which place a position has, and which places hold live tokens, is the same in every layer, so
    `StepPlan` computes it once a step.

    Attributes:
        keys: [ng, slots, num_sinks + capacity, hn].
        values: [ng, slots, num_sinks + capacity, hn].
        expert: [slots * (num_sinks + capacity), replicas], int16, the experts that the layer's
            router chose for a token, best first; None where placement does not ask for it.
    """

    def __init__(
        self, num_groups: int, num_slots: int, size: int, head_dim: int, num_experts_kept: int,
        dtype: torch.dtype, device: torch.device,
    ):
        shape = (num_groups, num_slots, size, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.expert = None
        if num_experts_kept:
            self.expert = torch.zeros(
                num_slots * size, num_experts_kept, dtype=torch.int16, device=device
            )

    def write(
        self, slots: torch.Tensor, places: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """Store tokens [ng, t, hn] at places [t] of the windows `slots` [t]."""
        append_kv(keys, values, self.keys, self.values, slots, places)

    def read(self, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [ng, t, hn] at flat places [t]."""
        return tuple(t.flatten(1, 2).index_select(1, places) for t in (self.keys, self.values))

    def tensors(self) -> list[torch.Tensor]:
        return [t for t in (self.keys, self.values, self.expert) if t is not None]
