"""Dense attention over the whole cache, by everything that is installed.

Legend: np query heads, ng KV heads, hn head width, t tokens.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import Any, Callable

import torch

from pikv_megatron.benchmarks.model.dense_context import grouped_attention, sdpa_attention


def dense_peers(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
) -> dict[str, Callable[[], Any]]:
    """Attention of one query by every peer; torch's two are always there.

    Args:
        query: [np, hn].
        keys: [ng, t, hn].
        values: [ng, t, hn].
    """
    batch = query.unsqueeze(0), keys.unsqueeze(0), values.unsqueeze(0)
    scale = query.shape[1] ** -0.5
    peers = {
        "SDPA": lambda: sdpa_attention(*batch, scale),
        "grouped product": lambda: grouped_attention(*batch, scale),
    }
    is_half = query.is_cuda and query.dtype in (torch.bfloat16, torch.float16)
    if is_half and find_spec("flashinfer"):
        attend = import_module("flashinfer").single_decode_with_kv_cache
        peers["FlashInfer"] = lambda: attend(query, keys, values, kv_layout="HND", sm_scale=scale)
    if is_half and find_spec("flash_attn"):
        cached = import_module("flash_attn").flash_attn_with_kvcache
        # It reads tokens before heads, as any cache made for it would be laid out.
        key_cache, value_cache = (x.transpose(1, 2).contiguous() for x in batch[1:])
        peers["FlashAttention"] = lambda: cached(
            query.view(1, 1, *query.shape), key_cache, value_cache, softmax_scale=scale
        )
    return peers
