"""What queries of prompts read: themselves and all that is kept of their past; and how their last
ones judge pages, before a policy drops any.

Legend: t tokens of this home rank's prompts, np query heads, ng KV heads, w_k and w_v widths of
keys and values, w_q and w_o of queries and outputs.
"""

import torch

from pikv_megatron.cache.head_maps import HeadMaps
from pikv_megatron.cache.home.stream_window import StreamWindow
from pikv_megatron.cache.owner.owner_reads import OwnerReads
from pikv_megatron.cache.owner.shard_store import ShardStore
from pikv_megatron.cache.partial_states import (
    merge_into,
    merge_parts,
    pack_state,
    unpack_states,
)
from pikv_megatron.cache.step.prefill_part import PrefillPart
from pikv_megatron.cache.step.step_plan import StepPlan
from pikv_megatron.layer_spec import LayerSpec
from pikv_megatron.ops.causal_attention import causal_attention
from pikv_megatron.ops.decode_attention import decode_attention
from pikv_megatron.parallel.dispatcher import KVDispatcher
from pikv_megatron.types import AttentionState


class PromptAttention:
    """Of one layer, on this rank.

    Args:
        spec: the layer.
        window: this home rank's.
        store: the shards that this rank owns.
        dispatcher: brings queries to the owners.
    """

    def __init__(
        self, spec: LayerSpec, window: StreamWindow, store: ShardStore, dispatcher: KVDispatcher
    ):
        self._spec, self._window = spec, window
        self._store, self._dispatcher = store, dispatcher

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor | None,
        part: PrefillPart, maps: HeadMaps,
    ) -> AttentionState:
        """Causal attention of query [t, np, w_q] over key [t, ng, w_k], value [t, ng, w_v] and what
        is kept of the past: [t, np, w_o]."""
        scale = self._spec.softmax_scale
        state = causal_attention(query, *maps.expand(key, value), part.lens, scale)
        for index, row in enumerate(part.rows):
            if row.past:
                window = [part.window_reads(index)._replace(pages=self._window.pages)]
                own = maps.absorb(query[row.tokens].unsqueeze(0))
                if row.reads and not row.is_far:
                    near = self._store.attend(own, row.reads, window)
                else:
                    near, _ = decode_attention(own, window, scale)
                merge_into(state, row.tokens, maps.emit(near))
        if part.reads_far:
            self._attend_far(query, state, part, maps)
        return state

    def observe(
        self, query: torch.Tensor, lse: torch.Tensor, plan: StepPlan, maps: HeadMaps
    ) -> None:
        """Let the prompts' last queries judge every page, those just sealed included.

        A query sees no page that is younger than itself: pages end a window before the prompt.

        Args:
            query: [t, np, w_q].
            lse: [t, np], of their attention to all tokens.
        """
        wanted = self._spec.options.retention.observation_window
        spans = plan.prefill.last_tokens(min(wanted, plan.window + 1))
        own = spans[self._dispatcher.rank]
        query, lse = (torch.cat([x[:0], *(x[span] for span in own)]) for x in (query, lse))
        query = maps.sent(query)
        counts = [sum(map(_length, ranks)) for ranks in spans]
        told = lse.unsqueeze(1).expand(-1, self._dispatcher.num_ranks, -1).contiguous()
        told = told.view(torch.int32)
        route = self._dispatcher.post(query, told, counts)
        query, told = self._dispatcher.wait(route, query, told)
        query = maps.arrived(query)
        lens = [_length(span) for ranks in spans for span in ranks]
        lse = told.contiguous().view(torch.float32)
        rows = plan.prefill.numbers
        where = rows.slots.split(1), rows.last_positions.split(1)
        for slot, last, *row in zip(*where, query.split(lens), lse.split(lens)):
            reads = OwnerReads(slot, plan.flush.most_pages, positions=last)
            self._store.observe(*(x.unsqueeze(0) for x in row), reads)

    def _attend_far(
        self, query: torch.Tensor, state: AttentionState, part: PrefillPart, maps: HeadMaps
    ) -> None:
        """Merge into a state what owners have of the prompts' past."""
        by_rank = part.rows_by_rank
        counts = [sum(_length(row.tokens) for row in rows if row.is_far) for rows in by_rank]
        own = [row.tokens for row in part.rows if row.is_far]
        posted = maps.sent(torch.cat([query[:0], *(query[tokens] for tokens in own)]))
        route = self._dispatcher.post(posted, None, counts)
        arrived, _ = self._dispatcher.wait(route, posted, None)
        rows = [row for rows in by_rank for row in rows if row.is_far]
        arrived = maps.arrived(arrived).split([_length(row.tokens) for row in rows])
        owned = [
            maps.returned(self._store.attend(own_query.unsqueeze(0), row.reads, []))
            for row, own_query in zip(rows, arrived)
        ]
        packed = torch.cat([pack_state(part)[0] for part in owned])
        parts = unpack_states(self._dispatcher.give_back(route, packed), owned[0].out)
        far = maps.merged(merge_parts(parts))
        lens = [_length(tokens) for tokens in own]
        for tokens, *row in zip(own, far.out.split(lens), far.lse.split(lens)):
            merge_into(state, tokens, AttentionState(*(x.unsqueeze(0) for x in row)))


def _length(tokens: slice) -> int:
    return tokens.stop - tokens.start
