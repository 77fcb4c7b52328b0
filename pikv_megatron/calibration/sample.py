"""Queries, keys and values of one window of text, and what codecs do to attention on them.

Legend: t tokens, np query heads, ng KV heads, g = np / ng, hn head width.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pikv_megatron.codec.codec import PageCodec


class LayerSample(NamedTuple):
    """Of one layer.

    Attributes:
        query: [t, np, hn].
        key: [ng, t, hn].
        value: [ng, t, hn].
        softmax_scale: factor on the logits.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    softmax_scale: float

    @classmethod
    def of(cls, query: Tensor, key: Tensor, value: Tensor, softmax_scale: float) -> "LayerSample":
        """Of a step's query [t, np, hn], key and value [t, ng, hn]."""
        return cls(
            query.float(), key.transpose(0, 1).float(), value.transpose(0, 1).float(),
            softmax_scale,
        )

    def output(self, key: Tensor, value: Tensor) -> Tensor:
        """Causal attention of the sample's queries over other keys and values: [np, t, hn]."""
        group = self.query.shape[1] // len(key)
        key, value = (x.repeat_interleave(group, dim=0) for x in (key, value))
        return F.scaled_dot_product_attention(
            self.query.transpose(0, 1), key, value, is_causal=True, scale=self.softmax_scale
        )

    def errors(self, codec: PageCodec, page_size: int) -> tuple[float, float]:
        """Squared error of the attention output, over its square, with the codec's keys and with
        its values.

        The sample's last tokens, where they do not fill a page, stay as they are.
        """
        count = self.key.shape[1] // page_size
        page, slots = torch.arange(count), torch.zeros(count, dtype=torch.int64)
        keys, values = (
            x[:, : count * page_size].unflatten(1, (count, page_size))
            for x in (self.key, self.value)
        )
        if codec.learns and not codec.is_fitted(0):
            codec.fit(0, keys.flatten(1, 2), values.flatten(1, 2))
        pool = codec.allocate(count + 1)
        codec.seal(keys, values, pool, page, slots)
        stored = [
            torch.cat([new.flatten(1, 2), old[:, count * page_size :]], dim=1)
            for new, old in zip(codec.restore(pool, page, slots), (self.key, self.value))
        ]
        exact = self.output(self.key, self.value)
        return tuple(
            float((self.output(key, value) - exact).square().sum() / exact.square().sum())
            for key, value in ((stored[0], self.value), (self.key, stored[1]))
        )
