"""The outputs of the experts that got a token, and of no others.

Megatron's `SequentialMLP` makes the same calls for an expert without tokens as for any other.
Gathering each token's weights into one batched product is no way out: it copies an expert's weights
for every token that chose it, which took 2 to 16 times as long on a CPU as a product an expert.
There, a kernel of our own serves steps of few tokens (`ExpertStack.sums_of_few`).

Legend: t tokens, k experts of a token, n = t * k, E local experts, h hidden size.
"""

import torch
from megatron.core.transformer.moe.experts import SequentialMLP

from pikv_megatron.transformer.expert_choice import ExpertChoice
from pikv_megatron.transformer.expert_stack import ExpertStack


class LeanExperts:
    """The local experts of one layer.

    Args:
        experts: the layer's.
        first: number of the first one among those of all ranks.
    """

    def __init__(self, experts: SequentialMLP, first: int):
        self._experts = experts
        self._first, self._count = first, experts.num_local_experts
        self._are_all = self._count == experts.config.num_moe_experts
        self._numbers = torch.empty(0)
        self._stack: ExpertStack | None = None
        self._is_checked = False

    def check(self) -> None:
        """Look at the experts again before they are next asked."""
        self._is_checked = False

    def chosen_outputs(self, tokens: torch.Tensor, choice: ExpertChoice) -> torch.Tensor:
        """Sum each token's experts that are local, [t, h].

        Args:
            tokens: [t, h].
            choice: among all ranks' experts.
        """
        stack, local = self._current_stack(), self._local(choice.experts)
        if stack is not None:
            sums = stack.sums_of_few(tokens, local, choice.weights)
            if sums is not None:
                return sums
        k = local.shape[1]
        local, order = local.flatten().sort(stable=True)
        ends = torch.searchsorted(local, self._numbers_from_one(local.device), out_int32=True)
        rows, weights = tokens.index_select(0, order // k), choice.weights.flatten()[order]
        outputs = self._outputs(stack, rows, ends, local, weights)
        if not self._are_all:
            outputs = outputs.masked_fill((local == self._count).unsqueeze(1), 0.0)
        return torch.empty_like(outputs).index_copy_(0, order, outputs).unflatten(0, (-1, k)).sum(1)

    def sorted_outputs(
        self, rows: torch.Tensor, counts: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """What `SequentialMLP` returns, [n, h].

        Args:
            rows: [n, h], one expert's behind the other's.
            counts: [E], rows of each expert.
            weights: [n], of each row's output.
        """
        counts = counts.to(rows.device)
        numbers = torch.arange(self._count, device=rows.device)
        local = numbers.repeat_interleave(counts, output_size=len(rows))
        return self._outputs(self._current_stack(), rows, counts.cumsum(0), local, weights)

    def _local(self, experts: torch.Tensor) -> torch.Tensor:
        """Local numbers of experts [t, k]; those of other ranks get one behind all that is computed.
        """
        if self._are_all:
            return experts
        local = experts - self._first
        return torch.where((local >= 0) & (local < self._count), local, self._count)

    def _numbers_from_one(self, device: torch.device) -> torch.Tensor:
        """1 to E, made once a device."""
        if len(self._numbers) == 0 or self._numbers.device != device:
            self._numbers = torch.arange(1, self._count + 1, device=device)
        return self._numbers

    def _outputs(
        self, stack: ExpertStack | None, rows: torch.Tensor, ends: torch.Tensor,
        local: torch.Tensor, weights: torch.Tensor,
    ) -> torch.Tensor:
        """[n, h], of rows sorted by their expert `local` [n]; whatever behind the last end."""
        if stack is not None:
            return stack.outputs(rows, ends.int(), local, weights)
        ends, outputs = ends.tolist(), torch.empty_like(rows)
        for expert, first, last in zip(self._experts.local_experts, [0, *ends], ends):
            if last > first:
                outputs[first:last] = expert(rows[first:last], weights[first:last])[0]
        return outputs

    def _current_stack(self) -> ExpertStack | None:
        stack = self._stack
        if not self._is_checked:
            is_kept = stack is not None and stack.is_of(self._experts)
        else:
            is_kept = stack is None or stack.is_current
        if not is_kept:
            self._stack = ExpertStack.of(self._experts)
        self._is_checked = True
        return self._stack
