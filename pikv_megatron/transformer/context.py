"""Megatron's static inference context, with the KV of its sequences sharded over the EP group."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Callable, Sequence

import deepspeed.comm as dist
import torch
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.models.gpt import GPTModel
from pydantic import ByteSize

from pikv_megatron.cache.footprint import Footprint
from pikv_megatron.cache.home.directory import PageDirectory
from pikv_megatron.cache.home.stream_window import StreamWindow
from pikv_megatron.cache.layer_cache import LayerCache
from pikv_megatron.cache.owner.pinned import Pinned
from pikv_megatron.cache.owner.shard_store import ShardStore
from pikv_megatron.cache.owner.verdicts import decide_together
from pikv_megatron.cache.page_needs import PageForecast
from pikv_megatron.cache.placement import Placement
from pikv_megatron.cache.sliding_cache import SlidingCache
from pikv_megatron.cache.step.step_plan import StepPlan
from pikv_megatron.cache.step.step_rows import CachedSequence, RowsByRank, StepRow, WindowLayout
from pikv_megatron.cache.tiers.tiers import Tiers
from pikv_megatron.config import PiKVConfig
from pikv_megatron.layer_spec import LayerSpec
from pikv_megatron.parallel.allgather import AllGatherDispatcher
from pikv_megatron.parallel.alltoall import AllToAllDispatcher
from pikv_megatron.parallel.dispatcher import KVDispatcher, LocalDispatcher
from pikv_megatron.router.visits import VisitSums
from pikv_megatron.sketch.none import NoSketchOptions
from pikv_megatron.transformer.calibrated_model import check_calibrated_model
from pikv_megatron.transformer.layer_shapes import layer_shapes

STEP_OP = "pikv_step"


class PiKVInferenceContext(StaticInferenceContext):
    """Holds every layer's cache and plans every step.

    Two drivers are served. `Engine` starts sequences and plans ragged steps itself. Megatron's
    `StaticInferenceEngine` (`legacy=True`) knows nothing of either: the context then reads the
    batch off the first layer's input, and takes `sequence_len_offset` for its length.

    Args:
        max_batch_size: sequences that this home rank holds at once.
        max_sequence_length: tokens a sequence can have.
        config: the cache's configuration.
        specs: the model's layers, `config.resolve`d.
        ep_group: the expert-parallel group; None for a single rank.
        pads_evenly: all ranks must forward the same number of tokens.

    Attributes:
        tiers: pages that leave the device.

    Raises:
        ValueError: the group's size does not divide the number of shards.
    """

    def __init__(
        self, max_batch_size: int, max_sequence_length: int, config: PiKVConfig,
        specs: Sequence[LayerSpec], ep_group=None, pads_evenly: bool = False,
    ):
        super().__init__(max_batch_size, max_sequence_length)
        self.pikv_config = config
        self.ep_group = ep_group
        self.num_ranks = 1 if ep_group is None else ep_group.size()
        self.rank = 0 if ep_group is None else ep_group.rank()
        self.placement = Placement.resolve(config, self.num_ranks, self.rank)
        self.footprint = Footprint(self.placement, config.page_size, max(1, self.keeps_experts))
        self.layout = WindowLayout(config.num_sinks, config.window, config.flush_interval)
        self._forecast = PageForecast(
            self.footprint, self.layout, -(-config.prefill_chunk_size // config.page_size),
            self.num_ranks, self.rank, max_batch_size,
        )
        self.plan: StepPlan | None = None
        self._pads_evenly = pads_evenly
        self._sequences: dict[int, CachedSequence] = {}
        self._driven = False
        self._rotary_table: tuple[torch.Tensor, float] | None = None
        self.layers: dict[int, LayerCache | SlidingCache] = {}
        for spec in specs:
            self.layers[spec.number] = self._new_layer(spec)
        sources = [layer.expert_source for layer in self.layers.values()]
        self.keeps_last_experts = "previous" in sources
        self.last_experts: torch.Tensor | None = None
        decide_together(
            [layer.verdicts for layer in self.sharded_layers if layer.store.keeper.joins_layers]
        )
        full = self.sharded_layers
        self.tiers = Tiers(
            [layer.store for layer in full], [layer.spec.options.retention.tiers for layer in full]
        )

    @classmethod
    def for_model(
        cls, model: GPTModel, config: PiKVConfig, max_batch_size: int, max_sequence_length: int,
        ep_group=None,
    ) -> "PiKVInferenceContext":
        """The context of a model; by default over the model's own expert-parallel group.

        Raises:
            ValueError: the configuration does not fit the model, or the calibration is of another.
        """
        files = config.open_files()
        for file in files:
            if file is not None:
                check_calibrated_model(file, model)
        specs = config.resolve(layer_shapes(model), files)
        for spec, layer in zip(specs, model.decoder.layers):
            source = spec.options.router.expert_source
            if source is not None and not hasattr(layer.mlp, "router"):
                raise ValueError(
                    f"router.source {source}: layer {spec.number - 1} has no experts; give it "
                    "`router: all` under `layers`"
                )
        group = model.pg_collection.ep if ep_group is None else ep_group
        return cls(
            max_batch_size, max_sequence_length, config, specs,
            group if group.size() > 1 else None,
            model.config.moe_token_dispatcher_type == "allgather",
        )

    @property
    def sharded_layers(self) -> list[LayerCache]:
        """The layers whose queries see all tokens."""
        return [layer for layer in self.layers.values() if isinstance(layer, LayerCache)]

    @property
    def visits(self) -> dict[int, VisitSums]:
        """What routers know of visits to any shard, by the numbers of their layers."""
        routers = {layer.spec.number: layer.router for layer in self.sharded_layers}
        return {
            number: router.visits for number, router in routers.items()
            if router is not None and router.visits is not None
        }

    @property
    def num_pages(self) -> tuple[tuple[int, ...], ...]:
        """Of every layer's pools: they lie elsewhere once they have grown."""
        return tuple(layer.num_pages for layer in self.sharded_layers)

    @property
    def most_pages(self) -> int:
        """That a sequence can fill on one rank."""
        return self.footprint.most_pages(self.max_sequence_length)

    @property
    def keeps_experts(self) -> int:
        """Experts that are remembered for each token of a window; 0 without expert shards."""
        return self.pikv_config.replicas if self.pikv_config.expert_shards > 1 else 0

    @property
    def decode_counts(self) -> list[int] | None:
        """Tokens that each rank feeds in this step; None where some rank feeds a prompt."""
        return None if self.plan.prefill.is_anywhere else self.plan.decode.counts

    def start(self, home_rank: int) -> CachedSequence:
        """Begin a sequence on a home rank. Called on every rank, in the same order.

        Raises:
            ValueError: every slot of the rank is taken.
        """
        first = home_rank * self.max_batch_size
        for slot in range(first, first + self.max_batch_size):
            if slot not in self._sequences:
                self._sequences[slot] = CachedSequence(slot, flushed=self.pikv_config.num_sinks)
                return self._sequences[slot]
        raise ValueError(
            f"max_batch_size {self.max_batch_size}: no slot is free on home rank {home_rank}"
        )

    def release(self, sequence: CachedSequence) -> None:
        """End a sequence and give its pages and its slot back. Called on every rank."""
        del self._sequences[sequence.slot]
        home, window_slot = divmod(sequence.slot, self.max_batch_size)
        for layer in self.layers.values():
            layer.release(sequence.slot, window_slot if home == self.rank else None)

    def reset(self) -> None:
        """Megatron's reset: a new batch begins."""
        super().reset()
        for sequence in list(self._sequences.values()):
            self.release(sequence)
        self.plan = None
        self._driven = False

    def reserve(self, lengths: Sequence[tuple[CachedSequence, int]]) -> None:
        """Allocate the pages that sequences will need once they have these many tokens.

        Placement by expert can need more on one rank than on another, and a prompt can be fed in
        larger chunks than configured; pools then grow.

        Raises:
            ValueError: the cache of some rank would exceed `memory_limit`, and nothing was
                allocated; or some rank has no space for the pages that lie in a file.
        """
        layers = self.sharded_layers
        needs = self._forecast.needs([layer.store for layer in layers], lengths)
        if self.pikv_config.memory_limit is not None:
            self._check_memory(sum(map(LayerCache.growth_bytes, layers, needs)))
        for layer, own in zip(layers, needs):
            layer.reserve(own)
        if self.tiers:
            self._hold_space()

    def keep_all_logits(self) -> None:
        """Let the model give logits for all tokens of a step, as all sequences lie one behind the
        other; Megatron keeps the last token's, by a switch that 0.19 moved to its `config`."""
        switch = "materialize_only_last_token_logits"
        owners = [self, getattr(self, "config", None)]
        for owner in owners:
            if hasattr(owner, switch):
                setattr(owner, switch, False)

    def compact(self) -> None:
        """Give back the memory of pages that no sequence has, those reserved for one included."""
        for layer in self.sharded_layers:
            layer.compact()

    def begin_step(self, rows_by_rank: RowsByRank, device: torch.device) -> None:
        """Plan a step whose rows every rank knows.

        Raises:
            ValueError: a sequence would outgrow `max_sequence_length`.
        """
        for row in (row for rows in rows_by_rank for row in rows):
            if row.end > self.max_sequence_length:
                raise ValueError(
                    f"max_sequence_length {self.max_sequence_length} is less than the "
                    f"{row.past} cached and {row.count} new tokens of a sequence"
                )
        self._driven = True
        self.plan = self._new_plan(rows_by_rank, device)

    @contextmanager
    def planned(self, plan: StepPlan) -> Iterator[None]:
        """Let layers follow another plan of the running step."""
        own, self.plan = self.plan, plan
        try:
            yield
        finally:
            self.plan = own

    def finish_step(self) -> None:
        """Move the sequences on, after the last layer.

        Raises:
            ValueError: a page that was to be read is lost, and the driver does not ask for that.
        """
        self.tiers.check_losses()
        self.plan.finish()
        self.plan = None
        self._driven = False

    def rotary_table(
        self, make: Callable[[int], tuple[torch.Tensor, float]]
    ) -> tuple[torch.Tensor, float]:
        """Angles of all positions and their factor, for layers that have rotary embeddings of
        their own: made once, since they are alike."""
        if self._rotary_table is None:
            self._rotary_table = make(self.max_sequence_length)
        return self._rotary_table

    def step(self, layer_number: int, hidden_states: torch.Tensor) -> StepPlan:
        """The plan of the running step; under Megatron's engine made at the first layer."""
        if not self._driven and (self.plan is None or layer_number == self._first_layer):
            self._plan_for_engine(layer_number, hidden_states)
        return self.plan

    def allocated_bytes(self) -> int:
        """Bytes of every tensor of this rank's cache, metadata included."""
        return sum(self.bytes_by_part().values())

    def bytes_by_part(self) -> dict[str, int]:
        """The same by what the tensors are for, all layers together."""
        total: Counter[str] = Counter()
        for layer in self.layers.values():
            for name, tensors in layer.parts().items():
                total[name] += sum(t.nbytes for t in tensors)
        return dict(total)

    def check_integrity(self) -> None:
        """No page is lost or held twice, and only live sequences hold any."""
        for layer in self.sharded_layers:
            layer.check_integrity()
            idle = set(range(layer.store.num_slots)) - set(self._sequences)
            held = [slot for slot in idle if layer.store.holds(slot)]
            assert not held, f"finished sequences still hold tokens: slots {held}"

    def _new_plan(self, rows_by_rank: RowsByRank, device: torch.device) -> StepPlan:
        self.last_experts = None
        return StepPlan(
            rows_by_rank, self.rank, self.max_batch_size, self.layout, self.footprint, device,
            self._pads_evenly,
        )

    def _check_memory(self, growth: int) -> None:
        """Refuse on all ranks what is too much for one of them."""
        limit = self.pikv_config.memory_limit
        needed = self._most_of_all(self.allocated_bytes() + growth)
        if needed > limit:
            raise ValueError(
                f"memory_limit {limit.human_readable()}: a rank's cache would take "
                f"{ByteSize(needed).human_readable()}; send fewer or shorter sequences, keep "
                "fewer pages (retention, codec), use more ranks, or raise the limit"
            )

    def _hold_space(self) -> None:
        """Refuse on all ranks what one of them has no space for; a plan holds none."""
        if self.layers[min(self.layers)].spec.kv.device.type == "meta":
            return
        error = self.tiers.hold_space()
        if self._most_of_all(int(error is not None)):
            own = f": {error}" if error is not None else ", on another rank"
            raise ValueError(
                f"retention.directory: no file could be made for pages, or it has too little space"
                f"{own}; name another directory, keep more pages in memory (retention.host), or "
                "send fewer or shorter sequences"
            ) from error

    def _most_of_all(self, number: int) -> int:
        """The largest of all ranks' numbers."""
        # On the device that the group's backend works with.
        device = self.layers[min(self.layers)].spec.kv.device
        most = torch.tensor(number, device=device)
        if self.num_ranks > 1:
            dist.all_reduce(most, op=dist.ReduceOp.MAX, group=self.ep_group)
        return int(most)

    def _new_layer(self, spec: LayerSpec) -> LayerCache | SlidingCache:
        if spec.sliding_window is not None:
            return SlidingCache(spec, self.max_batch_size)
        page_size, slots = self.pikv_config.page_size, self.max_batch_size
        max_pages = self.footprint.most_pages(self.max_sequence_length)
        window = StreamWindow(
            spec.kv, slots, self.layout.size, self.keeps_experts,
            spec.options.retention.needs_scores,
        )
        others = []
        if spec.options.budget.joins_layers:
            stores = (layer.store for layer in self.sharded_layers)
            others = [store.common for store in stores if store.keeper.joins_layers]
        store = ShardStore(
            spec, self.placement, page_size, slots * self.num_ranks, max_pages,
            self.keeps_experts > 1, Pinned.of(self.pikv_config.pinned, self.footprint),
            self.max_sequence_length, others,
        )
        directory = None
        if not isinstance(spec.options.sketch, NoSketchOptions):
            directory = PageDirectory(spec, self.placement, page_size, slots, max_pages)
        return LayerCache(
            spec, window, store, directory, self._new_dispatcher(), self.placement, slots
        )

    def _new_dispatcher(self) -> KVDispatcher:
        if self.num_ranks == 1:
            return LocalDispatcher()
        kind = {"alltoall": AllToAllDispatcher, "allgather": AllGatherDispatcher}
        return kind[self.pikv_config.dispatcher](self.ep_group)

    def _plan_for_engine(self, layer_number: int, hidden_states: torch.Tensor) -> None:
        """Every row has `sequence_len_offset` cached tokens; ranks tell each other their rows.

        Megatron allocates a new batch's whole capacity, and so does this.
        """
        if self.tiers.needs_file:
            raise ValueError(
                "retention.host: a page that is lost in a file ends its sequence with an error, "
                "and Megatron's engine has none for a sequence; set host to 1, or call generate"
            )
        if self.plan is not None:
            self.plan.finish()
        self._first_layer = layer_number
        seq_len, batch = hidden_states.shape[:2]
        mine = [self.batch_size_offset, batch, seq_len, self.sequence_len_offset]
        every = torch.tensor(mine, device=hidden_states.device)
        if self.num_ranks > 1:
            gathered = every.new_empty(self.num_ranks * len(mine))
            dist.all_gather_into_tensor(gathered, every, group=self.ep_group, log_name=STEP_OP)
            every = gathered
        layout = every.view(self.num_ranks, -1).tolist()
        rows = [self._engine_rows(rank, *rows) for rank, rows in enumerate(layout)]
        new = [row.sequence for own in rows for row in own if not row.past]
        if new:
            self.reserve([(sequence, self.max_sequence_length) for sequence in new])
        self.plan = self._new_plan(rows, hidden_states.device)

    def _engine_rows(self, rank: int, first: int, batch: int, count: int, past: int) -> list:
        slots = [rank * self.max_batch_size + first + row for row in range(batch)]
        if past == 0:
            for slot in slots:
                if slot in self._sequences:
                    self.release(self._sequences[slot])
                self._sequences[slot] = CachedSequence(slot, flushed=self.pikv_config.num_sinks)
        return [StepRow(self._sequences[slot], count) for slot in slots]
