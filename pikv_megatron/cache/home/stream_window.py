"""The newest tokens (and the first few) of one layer's sequences, on their home rank."""

import torch

from pikv_megatron.ops.append_kv import append_kv
from pikv_megatron.types import KVPages, KVShape


class StreamWindow:
    """A ring for each sequence: `num_sinks` fixed places, then `capacity` circular ones.

    Which place a position has, and which places hold live tokens, is the same in every layer, so
    `StepPlan` computes it once a step.

    Attributes:
        keys: [ng, slots, num_sinks + capacity, w_k].
        values: [ng, slots, num_sinks + capacity, w_v]; None where they are columns of the keys.
        pages: the same as a pool, a page a sequence.
        expert: [slots * (num_sinks + capacity), replicas], int16, the experts that the layer's
            router chose for a token, best first; None where placement does not ask for it.
        score: [slots * (num_sinks + capacity)], float32, of a token; None where retention does not
            ask for it.
    """

    def __init__(
        self, kv: KVShape, num_slots: int, size: int, num_experts_kept: int,
        keeps_scores: bool = False,
    ):
        device = kv.device
        stored = {
            name: torch.zeros(ng, num_slots, size, width, dtype=kv.dtype, device=device)
            for name, (ng, width) in kv.heads.items()
        }
        self.keys, self.values = stored["keys"], stored.get("values")
        self.pages = KVPages.plain(self.keys, self.values, kv.value_width)
        self.expert = None
        if num_experts_kept:
            self.expert = torch.zeros(
                num_slots * size, num_experts_kept, dtype=torch.int16, device=device
            )

        self.score = torch.zeros(num_slots * size, device=device) if keeps_scores else None

    def write(
        self, slots: torch.Tensor, places: torch.Tensor, keys: torch.Tensor,
        values: torch.Tensor | None,
    ) -> None:
        """Store tokens [ng, t, w] at places [t] of the windows `slots` [t]."""
        append_kv(keys, values, self.keys, self.values, slots, places)

    def write_experts(
        self, slots: torch.Tensor, places: torch.Tensor, experts: torch.Tensor
    ) -> None:
        """Store the experts [t, replicas] of those tokens."""
        self.expert[slots * self.keys.shape[2] + places] = experts

    def write_scores(
        self, slots: torch.Tensor, places: torch.Tensor, scores: torch.Tensor
    ) -> None:
        """Store the scores [t] of those tokens."""
        self.score[slots * self.keys.shape[2] + places] = scores

    def clear(self, slot: int) -> None:
        """Leave nothing behind that is not finite: the next sequence reads around it."""
        read_last = self.keys if self.values is None else self.values
        read_last[:, slot] = 0.0

    def read(self, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Keys and values [ng, t, w] at flat places [t]."""
        return tuple(
            None if t is None else t.flatten(1, 2).index_select(1, places)
            for t in (self.keys, self.values)
        )

    def tensors(self) -> list[torch.Tensor]:
        own = self.keys, self.values, self.expert, self.score
        return [t for t in own if t is not None]
