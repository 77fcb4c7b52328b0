"""Sums up the keys, values and queries of prompts.

Legend: t tokens, np query heads, ng KV heads, g = np / ng, hn head width, h hidden size.
"""

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from pikv_megatron.codec.transform.moments import KVMoments, Moments
from pikv_megatron.transformer.context import PiKVInferenceContext


class MomentCollector:
    """Listens to every layer of a context that has pages, on every rank of its group.

    Args:
        context: whose layers attend.
        model: of the context.
    """

    def __init__(self, context: PiKVInferenceContext, model: GPTModel):
        self._group = context.ep_group
        self._layers: dict[int, _LayerSums] = {}
        for layer in context.sharded_layers:
            number = layer.spec.number - 1
            self._layers[number] = _LayerSums(model.decoder.layers[number].self_attention)
            layer.on_attend = self._layers[number].add

    def moments(self) -> dict[int, KVMoments]:
        """Of every layer that has pages, by its number from 0, all ranks together."""
        return {number: sums.moments(self._group) for number, sums in self._layers.items()}


class _LayerSums:
    """Sums of one layer, float64."""

    def __init__(self, attention: torch.nn.Module):
        self._attention = attention
        self._sums: list[Tensor] | None = None

    def add(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        """A step's query [t, np, hn], key and value [t, ng, hn]."""
        queries = query.unflatten(1, (key.shape[1], -1)).transpose(0, 1).flatten(1, 2)
        found = [torch.tensor([len(key)], dtype=torch.float64, device=key.device)]
        found += [key.double().sum(0), value.double().sum(0)]
        found += [
            torch.bmm(x.transpose(1, 2), x)
            for x in (key.transpose(0, 1).double(), value.transpose(0, 1).double(),
                      queries.double())
        ]
        self._sums = found if self._sums is None else [a + b for a, b in zip(self._sums, found)]

    def moments(self, group) -> KVMoments:
        """What the sums come to."""
        if group is not None:
            for part in self._sums:
                dist.all_reduce(part, group=group)
        count, key_sum, value_sum, key_second, value_second, query_second = self._sums
        num_queries = count * self._group_size(key_sum.shape[0])
        return KVMoments(
            _moments(count, key_sum, key_second, query_second / num_queries),
            _moments(count, value_sum, value_second, self._output_metric()),
        )

    def _group_size(self, num_groups: int) -> int:
        return self._attention.num_attention_heads_per_partition // num_groups

    def _output_metric(self) -> Tensor:
        """[ng, hn, hn], W_o W_o^T summed over the heads that read a KV head's values."""
        heads = self._attention.value_outputs().detach().double()  # [ng, g, hn, h]
        return torch.einsum("ngwh,ngvh->nwv", heads, heads)


def _moments(count: Tensor, total: Tensor, second: Tensor, metric: Tensor) -> Moments:
    mean = total / count
    scatter = second - count * mean.unsqueeze(2) * mean.unsqueeze(1)
    return Moments(mean.float(), scatter.float(), int(count), metric.float())
