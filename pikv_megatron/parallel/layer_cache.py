"""The cache of one attention layer: the home rank's window and this rank's shards.

Legend: n sequences of this home rank, sq new tokens, np query heads, ng KV heads, hn head width.
"""

import torch

from pikv_megatron.cache.directory import PageDirectory
from pikv_megatron.cache.placement import Placement
from pikv_megatron.cache.shard_store import ShardStore
from pikv_megatron.cache.step_plan import StepPlan
from pikv_megatron.cache.stream_window import StreamWindow
from pikv_megatron.cache.tokens import TokenBlock
from pikv_megatron.ops.decode_attention import decode_attention
from pikv_megatron.ops.dense_attention import dense_attention
from pikv_megatron.ops.merge_states import merge_states
from pikv_megatron.parallel.dispatcher import KVDispatcher, PendingQuery
from pikv_megatron.router.base import KVRouter
from pikv_megatron.selector.base import PageSelector
from pikv_megatron.types import AttentionState, KVPages, Reads

# Queries of a chunk attend to each other in blocks, so that the logits stay small.
QUERY_BLOCK = 256


class LayerCache:
    """Stores and reads the KV of one layer.

    Args:
        window: this home rank's stream window.
        store: the shards that this rank owns.
        directory: sketches of the pages of this home rank's sequences; None: none are kept.
        dispatcher: brings queries and tokens to the owners.
        placement: the shard of a token.
        router: which shards a query visits.
        selector: which of their pages it reads.
        softmax_scale: factor on the logits.
    """

    def __init__(
        self, window: StreamWindow, store: ShardStore, directory: PageDirectory | None,
        dispatcher: KVDispatcher, placement: Placement, router: KVRouter, selector: PageSelector,
        softmax_scale: float,
    ):
        self.window = window
        self.store = store
        self.directory = directory
        self._dispatcher = dispatcher
        self._placement = placement
        self._router = router
        self._selector = selector
        self._softmax_scale = softmax_scale
        self._chunk: tuple[torch.Tensor, torch.Tensor] | None = None

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: StepPlan
    ) -> torch.Tensor:
        """Exact causal attention of a step over everything cached and over itself.

        Args:
            query: [sq, n, np, hn].
            key: [sq, n, ng, hn].
            value: [sq, n, ng, hn].

        Returns:
            [sq, n, np, hn].
        """
        self.hold(key, value, plan)
        query = query.transpose(0, 1).contiguous()
        state = self._attend_past(query, plan)
        if not plan.is_decode:
            states = state, self._attend_chunk(query)
            state = merge_states(*(torch.stack(parts) for parts in zip(*states)))
        return state.out.transpose(0, 1)

    def hold(self, key: torch.Tensor, value: torch.Tensor, plan: StepPlan) -> None:
        """Keep the step's KV [sq, n, ng, hn] until `settle`; a decode step's goes to the window."""
        self._chunk = tuple(t.permute(2, 1, 0, 3) for t in (key, value))  # [ng, n, sq, hn]
        if plan.is_decode:
            self._write_window(plan)

    def settle(self, plan: StepPlan, experts: torch.Tensor | None) -> None:
        """Flush what leaves the windows and keep what stays, once the experts are known.

        Args:
            experts: [n, sq, replicas], int16, the experts chosen for the step's tokens, best
                first; None where placement does not ask for them.
        """
        flat = None if experts is None else experts.flatten(0, 1)
        if plan.is_decode and flat is not None:
            self.window.expert[plan.write_places] = flat[plan.write_source]
        if plan.flush is not None:
            block = self._leaving(plan, flat)
            copies = 1 if flat is None else flat.shape[1]
            if self.directory is not None:
                self.directory.note(block)
            self.store.insert(self._dispatcher.send(block, plan, copies))
        if not plan.is_decode:
            self._write_window(plan)
            if flat is not None:
                self.window.expert[plan.write_places] = flat[plan.write_source]
        self._chunk = None

    def reserve(self, num_owned: int, num_noted: int) -> None:
        """Allocate pages on this rank, and room in the directory for pages of its sequences."""
        self.store.reserve(num_owned)
        if self.directory is not None:
            self.directory.reserve(num_noted)

    def release(self, slot: int, window_slot: int | None) -> None:
        """Give back what a sequence holds here; `window_slot` is None where it is not at home."""
        self.store.release(slot)
        if self.directory is not None and window_slot is not None:
            self.directory.release(window_slot)

    def tensors(self) -> list[torch.Tensor]:
        directory = [] if self.directory is None else self.directory.tensors()
        return self.window.tensors() + self.store.tensors() + directory

    def check_integrity(self) -> None:
        """No page, and no note of one, is lost or held twice."""
        self.store.check_integrity()
        if self.directory is not None:
            self.directory.check_integrity()

    def _attend_past(self, query: torch.Tensor, plan: StepPlan) -> AttentionState:
        """Attention over the window and the shards; a decode step's token is in the window."""
        window = plan.window_reads._replace(pages=KVPages(self.window.keys, self.window.values))
        if not plan.reads_shards:
            return decode_attention(query, [window], self._softmax_scale)[0]
        pending = self._dispatch(query, plan)
        return self._dispatcher.combine(pending, self.store, query, window, self._softmax_scale)

    def _dispatch(self, query: torch.Tensor, plan: StepPlan) -> PendingQuery:
        """Choose what is read, by what this rank knows alone, and send the queries."""
        directory = None
        if self.directory is not None:
            directory = self.directory.look_up(plan.window_slots[:, 0], plan.num_columns)
        shards = self._router.visit(query, directory)
        pages = self._selector.select(query, directory, shards)
        return self._dispatcher.dispatch(query, plan, Reads(shards, pages))

    def _write_window(self, plan: StepPlan) -> None:
        tokens = (t.flatten(1, 2) for t in self._chunk)
        if not plan.is_decode:  # whose every row has one token, in order
            tokens = (t.index_select(1, plan.write_source) for t in tokens)
        self.window.write(plan.write_slots, plan.write_offsets, *tokens)

    def _attend_chunk(self, query: torch.Tensor) -> AttentionState:
        keys, values = self._chunk
        n, seq_len = query.shape[:2]
        parts = []
        for first in range(0, seq_len, QUERY_BLOCK):
            last = min(seq_len, first + QUERY_BLOCK)
            causal = torch.ones(last - first, last, dtype=torch.bool, device=query.device)
            causal = causal.tril(diagonal=first).expand(n, -1, -1)
            parts.append(
                dense_attention(
                    query[:, first:last], keys[:, :, :last], values[:, :, :last], causal,
                    self._softmax_scale,
                )
            )
        return AttentionState(
            torch.cat([p.out for p in parts], dim=1), torch.cat([p.lse for p in parts], dim=1)
        )

    def _leaving(self, plan: StepPlan, experts: torch.Tensor | None) -> TokenBlock:
        flush = plan.flush
        chunk = [t.flatten(1, 2).index_select(1, flush.chunk_source) for t in self._chunk]
        window = self.window.read(flush.window_places)
        keys, values = (torch.cat(parts, dim=1) for parts in zip(window, chunk))
        if experts is None:
            shard = self._placement.shard(flush.position, None)
            return TokenBlock(
                keys, values, flush.slot, shard, flush.position, torch.zeros_like(shard)
            )
        chosen = torch.cat([self.window.expert[flush.window_places], experts[flush.chunk_source]])
        return self._replicate(keys, values, plan, chosen.long())

    def _replicate(self, keys, values, plan: StepPlan, chosen: torch.Tensor) -> TokenBlock:
        """One row for each of the experts chosen [t, replicas]; a shard met before gets none."""
        copies = chosen.shape[1]
        position = plan.flush.position.unsqueeze(1)
        shard = self._placement.shard(position, chosen)
        bit = 1 << shard
        seen = torch.zeros_like(bit)
        for order in range(1, copies):
            seen[:, order] = seen[:, order - 1] | bit[:, order - 1]
        slot = plan.flush.slot.unsqueeze(1).masked_fill((seen & bit) != 0, -1)
        return TokenBlock(
            keys.repeat_interleave(copies, dim=1), values.repeat_interleave(copies, dim=1),
            slot.flatten(), shard.flatten(), position.expand(-1, copies).flatten(), seen.flatten(),
        )
