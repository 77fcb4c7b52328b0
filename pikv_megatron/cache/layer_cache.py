"""The cache of one attention layer: the home rank's window and this rank's shards.

Legend: t tokens of this home rank's step, n decoding rows, np query heads, ng KV heads, w_k and w_v
widths of cached keys and values, w_q and w_o of queries and outputs, G ranks. Where nothing is
absorbed (`HeadMaps`), queries are as wide as keys and outputs as values.
"""

from collections.abc import Callable, Sequence

import torch

from pikv_megatron.cache.head_maps import GROUPED, HeadMaps
from pikv_megatron.cache.home.delivery import Delivery
from pikv_megatron.cache.home.directory import PageDirectory
from pikv_megatron.cache.home.leaving import leaving_tokens
from pikv_megatron.cache.home.prompt_attention import PromptAttention
from pikv_megatron.cache.home.query_header import HeaderLayout
from pikv_megatron.cache.home.stream_window import StreamWindow
from pikv_megatron.cache.owner.owner_judge import OwnerJudge
from pikv_megatron.cache.owner.shard_store import ShardStore
from pikv_megatron.cache.owner.verdicts import Verdicts
from pikv_megatron.cache.page_needs import PageNeeds
from pikv_megatron.cache.partial_states import (
    merge_parts,
    pack_state,
    shard_masses,
    unpack_states,
)
from pikv_megatron.cache.placement import Placement
from pikv_megatron.cache.step.decode_part import DecodePart
from pikv_megatron.cache.step.step_choice import StepChoice, choose
from pikv_megatron.cache.step.step_plan import StepPlan
from pikv_megatron.cache.tokens import TokenBlock
from pikv_megatron.layer_spec import LayerSpec
from pikv_megatron.ops.decode_attention import decode_attention
from pikv_megatron.ops.sink_logit import with_sink
from pikv_megatron.parallel.dispatcher import KVDispatcher
from pikv_megatron.relevance import Ask
from pikv_megatron.retention.prompt import Prompt
from pikv_megatron.types import AttentionState, PageList, Reads


class LayerCache:
    """Stores and reads the KV of one layer.

    Args:
        spec: the layer.
        window: this home rank's stream window.
        store: the shards that this rank owns.
        directory: sketches of the pages of this home rank's sequences; None: none are kept.
        dispatcher: brings queries and tokens to the owners.
        placement: the shard of a token.
        num_slots: sequences of this home rank.

    Attributes:
        on_bound: told of [n, np], the shares of a step's attention that are not read, at most; to
            be set where the selector certifies only. None: nobody asks.
        on_attend: told of every step's query, key and value, as they are cached; None: nobody asks.
        on_leave: told of the tokens that leave the window, as computed; None: nobody asks.
        gate: says by experts what shards are worth; None: it is not calibrated.
        verdicts: say which pages go.
    """

    def __init__(
        self, spec: LayerSpec, window: StreamWindow, store: ShardStore,
        directory: PageDirectory | None, dispatcher: KVDispatcher, placement: Placement,
        num_slots: int,
    ):
        self.spec = spec
        self.window = window
        self.store = store
        self.directory = directory
        self.router = spec.options.router.build(
            num_slots, placement.num_shards, spec.kv.device
        )
        if self.router is not None and self.router.visits is not None:
            self.router.visits.recall(spec.learned or spec.fitted or {})
        self.gate = spec.options.router.gate(spec.fitted)
        self.selector = spec.options.selector.build()
        self.verdicts = Verdicts(store.keeper, directory, dispatcher)
        self._dispatcher = dispatcher
        self._placement = placement
        self.on_attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None] | None = None
        self.on_leave: Callable[[TokenBlock], None] | None = None
        self.on_bound: Callable[[torch.Tensor], None] | None = None
        self._prompt_attention = PromptAttention(spec, window, store, dispatcher)
        self._delivery = Delivery(
            store, directory, dispatcher, placement, spec.options.codec.wire(spec.kv)
        )
        self._chunk: tuple[torch.Tensor, torch.Tensor | None] | None = None
        self._maps = GROUPED
        self._prompts: tuple[torch.Tensor, torch.Tensor] | None = None
        self._expert_shares: torch.Tensor | None = None
        self._shards_of_experts: torch.Tensor | None = None
        # [t], of the step's tokens, where retention asks.
        self._scores: torch.Tensor | None = None
        self._last_lse = None
        if store.held is not None and placement.num_ranks > 1:
            self._last_lse = torch.zeros(
                num_slots, placement.num_ranks, spec.num_heads, device=spec.kv.device
            )

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor | None, plan: StepPlan,
        sink: torch.Tensor | None = None, maps: HeadMaps = GROUPED,
    ) -> torch.Tensor:
        """Causal attention of a step over what is cached and over itself.

        Prompts read everything that is kept; decoding rows what the router and the selector choose.

        Args:
            query: [t, np, w_q], in the order of `StepPlan.rows`.
            key: [t, ng, w_k].
            value: [t, ng, w_v]; None where values are columns of the keys.
            sink: [np], a learned logit that is no token's; None: there is none.
            maps: from queries to what is cached, and from there to the output.

        Returns:
            [t, np, w_o], emitted by the maps.
        """
        if self.on_attend is not None:
            self.on_attend(maps.absorb(query), key, self.spec.kv.values_of(key, value))
        self._maps = maps
        self.hold(key, value, plan)
        first = plan.decode.num_rows
        parts = []
        if plan.decode.is_anywhere:
            decoding = _first(query, first).unsqueeze(1)
            parts.append(with_sink(self._attend_decode(decoding, plan), sink).squeeze(1))
        if plan.prefill.is_anywhere:
            own = (None if x is None else x[first:] for x in (query, key, value))
            state = self._prompt_attention.attend(*own, plan.prefill, maps)
            self._prompts = query[first:], state.lse
            parts.append(with_sink(state, sink))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def hold(self, key: torch.Tensor, value: torch.Tensor | None, plan: StepPlan) -> None:
        """Keep the step's KV [t, ng, w] until `settle`; decoding rows' goes to the window."""
        self._chunk = key, value
        first = plan.decode.num_rows
        if first:
            own = plan.decode.numbers
            tokens = (
                None if x is None else _first(x, first).transpose(0, 1) for x in self._chunk
            )
            self.window.write(own.window_slots, own.places, *tokens)

    @property
    def expert_source(self) -> str | None:
        """Whose experts `weigh_shards` is to be told of before a step; see `RouterOptions`."""
        return self.spec.options.router.expert_source

    def weigh_shards(self, experts: torch.Tensor) -> None:
        """Let experts say what shards are worth to a step's tokens: shares [t, E] of 1."""
        if self._shards_of_experts is None:
            self._shards_of_experts = self._placement.shards_of_experts(
                experts.shape[1], experts.device
            )
        self._expert_shares = experts.float() @ self._shards_of_experts

    @property
    def scores_prompts(self) -> bool:
        """Whether `score` is to be called in a step."""
        return self.spec.options.retention.needs_scores

    def score(self, prompts: Sequence[Prompt], plan: StepPlan) -> None:
        """Let the retention policy score a step's prompts, in the order of `StepPlan.prefill.rows`;
        a decoded token has no score: inf, so that its page stays."""
        scores = [self.store.keeper.retention.score(prompt) for prompt in prompts]
        decoded = self.window.score.new_full((plan.decode.num_rows,), torch.inf)
        self._scores = torch.cat([decoded, *scores])

    def settle(self, plan: StepPlan, experts: torch.Tensor | None) -> None:
        """Flush what leaves the windows and keep what stays, once the experts are known.

        Args:
            experts: [t, replicas], int16, the experts chosen for the step's tokens, best first;
                None where placement does not ask for them.
        """
        if experts is not None and plan.decode.num_rows:
            own = plan.decode.numbers
            self.window.write_experts(
                own.window_slots, own.places, experts[: plan.decode.num_rows]
            )
        if self._scores is not None and plan.decode.num_rows:
            own = plan.decode.numbers
            self.window.write_scores(
                own.window_slots, own.places, self._scores[: plan.decode.num_rows]
            )
        if plan.flush is not None:
            self._flush(plan, experts)
        if plan.prefill.rows:
            writes = plan.prefill_writes
            tokens = (
                None if x is None else x.index_select(0, writes.source).transpose(0, 1)
                for x in self._chunk
            )
            self.window.write(writes.slots, writes.places, *tokens)
            if experts is not None:
                self.window.write_experts(writes.slots, writes.places, experts[writes.source])
            if self._scores is not None:
                self.window.write_scores(writes.slots, writes.places, self._scores[writes.source])
        self._chunk = self._prompts = self._scores = None

    def reserve(self, needs: PageNeeds) -> None:
        """Allocate pages on this rank, room in the directory for pages of its sequences, and what
        steps hold of the pages that a sequence has here, at most."""
        self.store.reserve(needs.owned, needs.old)
        if self.directory is not None:
            self.directory.reserve(needs.noted)
        if self._last_lse is not None:
            self.store.held.reserve(needs.columns)

    def compact(self) -> None:
        """Give back the memory of pages that no sequence has."""
        self.store.compact()
        if self.directory is not None:
            self.directory.compact()

    @property
    def num_pages(self) -> tuple[int, ...]:
        """Pages that there is room for here, and that the directory has room for."""
        noted = 0 if self.directory is None else len(self.directory.shard)
        return *self.store.pool.sizes, noted

    def growth_bytes(self, needs: PageNeeds) -> int:
        """What `reserve` would allocate."""
        growth = self.store.growth_bytes(needs.owned, needs.old)
        if self.directory is not None:
            growth += self.directory.growth_bytes(needs.noted)
        if self._last_lse is not None:
            growth += self.store.held.growth_bytes(needs.columns)
        return growth

    def release(self, slot: int, window_slot: int | None) -> None:
        """Give back what a sequence holds here; `window_slot` is None where it is not at home."""
        self.store.release(slot)
        if window_slot is not None:
            self.window.clear(window_slot)
        if self.directory is not None and window_slot is not None:
            self.directory.release(window_slot)
        if self.router is not None and window_slot is not None:
            self.router.release(window_slot)

    def parts(self) -> dict[str, list[torch.Tensor]]:
        """All tensors, by what they are for."""
        parts = {"windows": self.window.tensors(), **self.store.parts()}
        if self.directory is not None:
            parts |= self.directory.parts()
        parts["routing"] = [] if self.router is None else self.router.tensors()
        if self.router is not None and self.router.visits is not None:
            parts["routing"] += self.router.visits.tensors()
        if self._last_lse is not None:
            parts["statistics"].append(self._last_lse)
        return parts

    def check_integrity(self) -> None:
        """No page, and no note of one, is lost or held twice."""
        self.store.check_integrity()
        if self.directory is not None:
            self.directory.check_integrity()

    def _attend_decode(self, query: torch.Tensor, plan: StepPlan) -> AttentionState:
        """Attention of query [n, 1, np, w_q] over the window, its own token included, and over
        what is read of the shards."""
        part, absorbed = plan.decode, self._maps.absorb(query)
        window = self._window_list(part.window_reads)
        if not part.reads_shards:
            state = decode_attention(absorbed, [window], self.spec.softmax_scale)[0]
            return self._maps.emit(state)
        near = None
        if self.selector is not None and self.selector.needs_near:
            near = decode_attention(absorbed, [window], self.spec.softmax_scale)[0]
        choice = self._choose(query, absorbed, near, part)
        if not part.reads_far:
            state, mass = self._attend_here(absorbed, window, choice, part)
            state = self._maps.emit(state)
        else:
            state, mass = self._attend_everywhere(query, absorbed, window, near, choice, plan)
        if mass is not None:
            self.router.learn(part.numbers.window_slots, choice.reads.shards, mass)
        if self.on_bound is not None:
            left = choice.ask.left_lse(choice.columns)
            self.on_bound((left - state.lse[:, 0]).sigmoid())
        if choice.columns is not None and self.directory.keeps_means:
            tail = self.directory.tail(choice.ask, choice.columns)
            state = merge_parts([state, self._maps.emit(tail)])
        return state

    def _choose(
        self, query: torch.Tensor, absorbed: torch.Tensor, near: AttentionState | None,
        part: DecodePart,
    ) -> StepChoice:
        if self.router is None and self.selector is None:
            return StepChoice(Reads())
        slots = part.numbers.window_slots
        who = absorbed[:, 0], slots, part.numbers.positions
        shares = None
        if self.expert_source is not None:
            shares = _first(self._expert_shares, part.num_rows)
        if self.directory is None:
            return choose(self.router, self.selector, Ask(*who, expert_shares=shares))
        num_columns = self.store.keeper.num_columns(part.most_pages)
        listed = self.directory.listed(slots, part.own_reads.key, num_columns)
        if self.directory.asks_owners:
            judge = OwnerJudge(
                query[:, 0], self._maps, part, self.store, self._dispatcher, listed.lens > 0
            )
        else:
            judge = self.directory.judge(absorbed[:, 0], slots, listed)
        near_lse = None if near is None else near.lse[:, 0]
        ask = Ask(*who, listed.directory, judge, near_lse, self.spec.number, shares)
        tiers = self.spec.options.retention.tiers
        return choose(self.router, self.selector, ask, 0 if tiers is None else tiers.ahead)

    def _attend_here(
        self, query: torch.Tensor, window: PageList, choice: StepChoice, part: DecodePart
    ) -> tuple[AttentionState, torch.Tensor | None]:
        """This rank has all of its sequences: one softmax over all, and the shards' shares [n, N].
        """
        columns, rank = choice.reads.columns, self._placement.rank
        reads = part.own_reads
        if choice.ask is not None:
            drawn, ahead = choice.reads.drawn, choice.reads.ahead
            reads = reads._replace(
                visited=choice.reads.shards,
                columns=None if columns is None else columns[:, rank],
                drawn=None if drawn is None else drawn[:, rank],
                log_weight=choice.reads.log_weight,
                ahead=None if ahead is None else ahead[:, rank],
            )
        # What was held may be of a step in which queries travelled.
        slots = part.numbers.window_slots
        last = None if self._last_lse is None else self._last_lse[slots, rank]
        state, shares = self.store.attend_decoding(
            query, reads, [window], last, self._router_learns
        )
        if last is not None:
            self._last_lse[slots, rank] = state.lse[:, 0]
        if shares is None:
            return state, None
        mass = shares.new_zeros(len(shares), self._placement.num_shards)
        mass[:, rank :: self._placement.num_ranks] = shares.mean(dim=(1, 2))
        return state, mass

    def _attend_everywhere(
        self, query: torch.Tensor, absorbed: torch.Tensor, window: PageList,
        near: AttentionState | None, choice: StepChoice, plan: StepPlan,
    ) -> tuple[AttentionState, torch.Tensor | None]:
        """Queries go to the owners; while they travel, home attends to its window, unless it
        had to before."""
        part, reads, maps = plan.decode, choice.reads, self._maps
        layout = HeaderLayout(
            0 if reads.shards is None else reads.shards.shape[1],
            0 if reads.columns is None else reads.columns.shape[2],
            0 if self._last_lse is None else self.spec.num_heads,
            0 if reads.drawn is None else reads.drawn.shape[2],
            0 if reads.ahead is None else reads.ahead.shape[2],
        )
        slots = part.numbers.window_slots
        last_lse = None if self._last_lse is None else self._last_lse[slots]
        header = layout.pack(reads, part.own_reads, last_lse, self._placement.num_ranks)
        goes_to, sent = self._visited_ranks(reads), maps.sent(query)
        route = self._dispatcher.post(sent, header, part.counts, goes_to)
        if near is None:
            near = decode_attention(absorbed, [window], self.spec.softmax_scale)[0]
        near = maps.returned(near)
        arrived, header = self._dispatcher.wait(route, sent, header)
        arrived_reads, arrived_lse = layout.unpack(header, part.all_reads)
        owned, shares = self.store.attend_decoding(
            maps.arrived(arrived), arrived_reads, [], arrived_lse, self._router_learns
        )
        packed = pack_state(maps.returned(owned))
        width = packed.shape[-1]
        if shares is not None:
            packed = torch.cat([packed, shares], dim=-1)
        parts = self._dispatcher.give_back(route, packed)
        state = maps.merged(merge_parts([near, *unpack_states(parts[..., :width], near.out)]))
        if last_lse is not None:
            lse = state.lse.expand_as(last_lse)
            if goes_to is not None:
                lse = torch.where(goes_to.unsqueeze(2), lse, last_lse)
            self._last_lse[slots] = lse
        return state, None if shares is None else shard_masses(parts[..., width - 1 :], state.lse)

    @property
    def _router_learns(self) -> bool:
        return self.router is not None and self.router.learns

    def _visited_ranks(self, reads: Reads) -> torch.Tensor | None:
        """[n, G], bool: the owners of visited shards."""
        if reads.shards is None:
            return None
        return reads.shards.unflatten(1, (-1, self._placement.num_ranks)).any(dim=1)

    def _flush(self, plan: StepPlan, experts: torch.Tensor | None) -> None:
        """Tokens leave for their shards; then owners drop the pages that are too many."""
        block = leaving_tokens(
            self.window, self._chunk, plan.flush, self._placement, experts, self._scores
        )
        if self.on_leave is not None:
            self.on_leave(block)
        copies = 1 if experts is None else experts.shape[1]
        self._delivery.bring(block, plan.flush, copies)
        keeper = self.store.keeper
        if keeper.drops:
            if self.store.held is not None and self._prompts is not None:
                self._prompt_attention.observe(*self._prompts, plan, self._maps)
            self.verdicts.give(plan.flush)
        keeper.grow_old(plan.flush.numbers.all_slots, plan.flush.most_pages)

    def _window_list(self, reads: PageList) -> PageList:
        return reads._replace(pages=self.window.pages)


def _first(x: torch.Tensor, count: int) -> torch.Tensor:
    return x if len(x) == count else x[:count]
