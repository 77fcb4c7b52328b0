"""The methods of one layer's cache, and how a configuration chooses others for some layers."""

import re
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field

from pikv_megatron.codec.registry import Codec, CodecOptions
from pikv_megatron.retention.budget import RetentionBudget, ShareBudget
from pikv_megatron.retention.keep_all import KeepAllOptions
from pikv_megatron.retention.registry import Retention
from pikv_megatron.router.all_shards import AllShardsOptions
from pikv_megatron.router.registry import Router
from pikv_megatron.selector.all_pages import AllPagesOptions
from pikv_megatron.selector.registry import Selector
from pikv_megatron.sketch.base import SketchOptions
from pikv_megatron.sketch.keys import KeysOptions
from pikv_megatron.sketch.low_rank import LowRankOptions
from pikv_megatron.sketch.none import NoSketchOptions
from pikv_megatron.sketch.registry import Sketch


class LayerOptions(BaseModel):
    """The methods of one layer's cache. The defaults are lossless.

    Attributes:
        router: which shards a query visits.
        selector: which of their pages it reads.
        sketch: what the home rank remembers of every page; None: `keys` where bounds are needed,
            `low_rank` where a router or a selector reads it, else `none`.
        retention: which pages stay.
        budget: how many of them; None: a quarter, where a retention policy asks.
        codec: how sealed pages are stored.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    router: Router = AllShardsOptions()
    selector: Selector = AllPagesOptions()
    sketch: Sketch | None = None
    retention: Retention = KeepAllOptions()
    budget: RetentionBudget | None = None
    codec: Codec = CodecOptions()

    def resolved(self) -> "LayerOptions":
        """The same with nothing left open.

        Raises:
            ValueError: a method lacks what it needs; names both and the remedy.
        """
        needy = [f for f in ("router", "selector") if getattr(self, f).needs_sketch]
        sketch = self.sketch or self._default_sketch(bool(needy))
        if needy and isinstance(sketch, NoSketchOptions):
            name = getattr(self, needy[0]).name
            raise ValueError(
                f"{needy[0]} {name} needs a sketch, and sketch is none: leave sketch out, or name "
                "low_rank, bounding_box, mean_key or keys"
            )
        if self.selector.needs_bounds and not sketch.can_bound:
            raise ValueError(
                f"selector {self.selector.name} needs bounds, and sketch {sketch.name} has none: "
                "leave sketch out, or name keys, low_rank or bounding_box"
            )
        if self.selector.needs_bounds or self.selector.samples:
            self._check_promise()
        if self.budget is not None and not self.retention.takes_budget:
            raise ValueError(
                f"budget {self.budget.name} limits the pages that stay, and retention is "
                f"{self.retention.name}: name a retention policy, h2o or streaming, or leave "
                "budget out"
            )
        budget = self.budget or ShareBudget()
        return self.model_copy(update={"sketch": sketch, "budget": budget})

    def at_share(self, share: float, num_shards: int) -> Self | None:
        """The same, each method that spends a share at this one; None: none does.

        Args:
            share: above 0, at most 1: of the shards that are visited, the pages that are read and
                those that stay.
            num_shards: of a sequence.

        Raises:
            ValueError: a method cannot have it; names the method and the remedy.
        """
        methods = self.resolved()  # a budget that is left open is a share
        fields = ["router", "selector", "retention"] + ["budget"] * self.retention.takes_budget
        put = {name: getattr(methods, name).at_share(share, num_shards) for name in fields}
        found = {name: options for name, options in put.items() if options is not None}
        return self.model_copy(update=found) if found else None

    def _default_sketch(self, is_needed: bool) -> SketchOptions:
        if self.selector.needs_bounds:
            return KeysOptions()
        return LowRankOptions() if is_needed else NoSketchOptions()

    def _check_promise(self) -> None:
        """Of a selector that says what is not read matters at most: it chooses shards itself, but
        for token buffers, of which nothing is known at home."""
        name = f"selector {self.selector.name}"
        if not isinstance(self.router, AllShardsOptions):
            raise ValueError(
                f"{name} answers for what is not read, and router {self.router.name} skips token "
                "buffers, of which no bound is known: leave router out; shards without a page that "
                "matters cost a buffer each"
            )
        if self.selector.samples and self.retention.needs_mass:
            raise ValueError(
                f"{name} reads pages that stand for others, and retention {self.retention.name} "
                "counts what each had: name a policy without masses, streaming say"
            )


class LayerOverride(BaseModel):
    """Other methods for some layers.

    Attributes:
        match: numbers of layers from 0, single or as a range: `3`, `"0-3"`, `"0,2,5-7"`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    match: str = Field(pattern=r"^\d+(-\d+)?(,\d+(-\d+)?)*$", coerce_numbers_to_str=True)
    router: Router | None = None
    selector: Selector | None = None
    sketch: Sketch | None = None
    retention: Retention | None = None
    budget: RetentionBudget | None = None
    codec: Codec | None = None

    @property
    def layers(self) -> set[int]:
        """The numbers that `match` names."""
        spans = [re.findall(r"\d+", part) for part in self.match.split(",")]
        return {i for span in spans for i in range(int(span[0]), int(span[-1]) + 1)}

    def methods(self) -> dict[str, Any]:
        """What is chosen otherwise."""
        return {name: getattr(self, name) for name in self.model_fields_set - {"match"}}
