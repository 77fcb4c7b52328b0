"""The tokens that leave the stream windows in a step, with the shards that they go to.

Legend: t tokens, w_k and w_v widths, ng KV heads.
"""

import torch

from pikv_megatron.cache.home.stream_window import StreamWindow
from pikv_megatron.cache.placement import Placement
from pikv_megatron.cache.step.flush_plan import FlushNumbers, FlushPlan
from pikv_megatron.cache.tokens import TokenBlock


def leaving_tokens(
    window: StreamWindow, chunk: tuple[torch.Tensor, torch.Tensor | None], flush: FlushPlan,
    placement: Placement, experts: torch.Tensor | None, scores: torch.Tensor | None = None,
) -> TokenBlock:
    """What a flush takes out of the windows and of the step's own tokens.

    Args:
        chunk: keys and values [t, ng, w] of the step; no values where they are columns of keys.
        experts: [t, replicas], chosen for the step's tokens; None where placement does not ask.
        scores: [t], of the step's tokens; None where retention does not ask.
    """
    own = flush.numbers
    keys, values = (
        None if new is None
        else torch.cat([old, new.index_select(0, own.chunk_source).transpose(0, 1)], dim=1)
        for old, new in zip(window.read(own.window_places), chunk)
    )
    score = None
    if scores is not None:
        score = torch.cat([window.score[own.window_places], scores[own.chunk_source]])
    if experts is None:
        shard = flush.once("shard", lambda: placement.shard(own.position, None))
        earlier = torch.zeros_like(shard)
        return TokenBlock(keys, values, own.slot, shard, own.position, earlier, score)
    chosen = torch.cat([window.expert[own.window_places], experts[own.chunk_source]])
    return _replicate(keys, values, score, own, placement, chosen.long())


def _replicate(
    keys: torch.Tensor, values: torch.Tensor | None, score: torch.Tensor | None,
    flush: FlushNumbers, placement: Placement, chosen: torch.Tensor,
) -> TokenBlock:
    """One row for each of the experts chosen [t, replicas]; a shard met before gets none."""
    copies = chosen.shape[1]
    position = flush.position.unsqueeze(1)
    shard = placement.shard(position, chosen)
    bit = 1 << shard
    seen = torch.zeros_like(bit)
    for order in range(1, copies):
        seen[:, order] = seen[:, order - 1] | bit[:, order - 1]
    slot = flush.slot.unsqueeze(1).masked_fill((seen & bit) != 0, -1)
    keys, values = (
        None if x is None else x.repeat_interleave(copies, dim=1) for x in (keys, values)
    )
    return TokenBlock(
        keys, values,
        slot.flatten(), shard.flatten(), position.expand(-1, copies).flatten(), seen.flatten(),
        None if score is None else score.repeat_interleave(copies),
    )
