"""The last queries of prompts, which judge every page before a policy drops any.

Legend: p tokens of this home rank's prompts, np query heads, w_q width of queries.
"""

import torch

from pikv_megatron.cache.head_maps import HeadMaps
from pikv_megatron.cache.owner_reads import OwnerReads
from pikv_megatron.cache.prefill_part import num_tokens
from pikv_megatron.cache.shard_store import ShardStore
from pikv_megatron.cache.step_plan import StepPlan
from pikv_megatron.parallel.dispatcher import KVDispatcher


def observe_prompts(
    store: ShardStore, query: torch.Tensor, lse: torch.Tensor, plan: StepPlan, wanted: int,
    maps: HeadMaps, dispatcher: KVDispatcher,
) -> None:
    """Let the prompts' last queries judge every page, those just sealed included.

    A query sees no page that is younger than itself: pages end a window before the prompt.

    Args:
        store: of this rank.
        query: [p, np, w_q].
        lse: [p, np], of their attention to all tokens.
        wanted: last queries of a prompt, at most.
        maps: from queries to what is cached.
        dispatcher: brings queries to the owners.
    """
    spans = plan.prefill.last_tokens(min(wanted, plan.window + 1))
    own = spans[dispatcher.rank]
    query, lse = (torch.cat([x[:0], *(x[span] for span in own)]) for x in (query, lse))
    query = maps.sent(query)
    counts = [sum(map(num_tokens, ranks)) for ranks in spans]
    told = lse.unsqueeze(1).expand(-1, dispatcher.num_ranks, -1).contiguous()
    told = told.view(torch.int32)
    route = dispatcher.post(query, told, counts)
    query, told = dispatcher.wait(route, query, told)
    query = maps.arrived(query)
    lens = [num_tokens(span) for ranks in spans for span in ranks]
    lse = told.contiguous().view(torch.float32)
    rows = plan.prefill.numbers
    where = rows.slots.split(1), rows.last_positions.split(1)
    for slot, last, *part in zip(*where, query.split(lens), lse.split(lens)):
        reads = OwnerReads(slot, plan.flush.most_pages, positions=last)
        store.observe(*(x.unsqueeze(0) for x in part), reads)
