"""The one configuration of a PiKV cache: a YAML file, checked before anything is computed."""

import os
from pathlib import Path
from typing import Any, Literal, Sequence

import yaml
from pydantic import ByteSize, Field, ValidationError, model_validator

from pikv_megatron.calibrated import Calibrated, load_calibrated
from pikv_megatron.codec.calibration import read_moments, read_shard_moments
from pikv_megatron.codec.codec import PageCodec
from pikv_megatron.layer_options import LayerOptions, LayerOverride
from pikv_megatron.layer_spec import LayerShape, LayerSpec
from pikv_megatron.options import PathBeside
from pikv_megatron.presets import preset_values
from pikv_megatron.retention.budget import BytesBudget
from pikv_megatron.sketch.keys import KeysOptions
from pikv_megatron.sketch.none import NoSketchOptions

MAX_EXPERT_SHARDS = 32


class PiKVConfig(LayerOptions):
    """Where KV is stored and how it is read. The defaults are lossless.

    Attributes:
        page_size: tokens a page (and a token buffer) holds, S.
        token_shards: N_tok of the shard hash; None: the expert-parallel size.
        expert_shards: N_exp of the shard hash, a power of two; 1 places by position only.
        shard_after: first tokens of a sequence, whose pages lie on its home rank: a shorter one
            costs no traffic.
        hash_block: consecutive positions that share a token hash, b; None: `page_size`.
        replicas: shards that store each token, those of its best experts.
        num_sinks: first tokens of a sequence that stay in the home rank's stream window.
        pinned: first tokens of a sequence, a system prompt say, whose pages retention never drops;
            they fill the budget first.
        window: last tokens of a sequence that stay in the home rank's stream window.
        flush_interval: decode steps between two flushes from the window to the shards.
        prefill_chunk_size: prompt tokens that a home rank feeds in one forward pass.
        dispatcher: how queries and KV travel between ranks.
        max_sequence_length: capacity, tokens a sequence; None: the model's maximum.
        memory_limit: bytes of a rank's cache, `12 GiB` say; more is refused before anything is
            computed. None: no limit.
        lean_experts: whether a step runs only the MoE experts that got a token.
        cuda_graphs: whether steps that only decode are recorded as CUDA graphs, one for each
            batch size and power of two of pages, and replayed: their cost on the host is gone.
            Without CUDA it changes nothing.
        calibration: a file of `launch/calibrate.py`, which transforms, some retention policies and
            routers are fitted to; None: transforms learn from every sequence's first pages.
        learned: a file that routers with `keeps_learned` go on from, and that `Engine.save_learned`
            writes, `launch/generate.py` at its end; it need not be there yet. None: what they learn
            ends with the run.
        layers: other methods for some layers.

    The methods are those of `LayerOptions`.
    """

    page_size: int = Field(64, ge=1)
    token_shards: int | None = Field(None, ge=1)
    expert_shards: int = Field(1, ge=1)
    shard_after: int = Field(1024, ge=0)
    hash_block: int | None = Field(None, ge=1)
    replicas: int = Field(1, ge=1)
    num_sinks: int = Field(4, ge=0)
    pinned: int = Field(0, ge=0)
    window: int = Field(128, ge=0)
    flush_interval: int = Field(16, ge=1)
    prefill_chunk_size: int = Field(1024, ge=1)
    dispatcher: Literal["alltoall", "allgather"] = "alltoall"
    max_sequence_length: int | None = Field(None, ge=1)
    memory_limit: ByteSize | None = Field(None, ge=1)
    lean_experts: bool = True
    cuda_graphs: bool = False
    calibration: PathBeside | None = None
    learned: PathBeside | None = None
    layers: tuple[LayerOverride, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _from_preset(cls, values: Any) -> Any:
        """Keys of the user override those of the preset."""
        if not isinstance(values, dict) or "preset" not in values:
            return values
        own = {key: value for key, value in values.items() if key != "preset"}
        return {**preset_values(values["preset"]), **own}

    @model_validator(mode="after")
    def _check_fields_together(self) -> "PiKVConfig":
        value = self.expert_shards
        if value & (value - 1) or value > MAX_EXPERT_SHARDS:
            raise ValueError(
                f"expert_shards must be a power of two up to {MAX_EXPERT_SHARDS}, got {value}"
            )
        if self.replicas > 1 and self.expert_shards == 1:
            raise ValueError(
                f"replicas {self.replicas} needs expert_shards above 1: with one expert shard "
                "every replica of a token falls into the same shard"
            )
        if self.cuda_graphs and not self.lean_experts:
            raise ValueError(
                "cuda_graphs needs lean_experts: Megatron's experts wait for counts of tokens; set "
                "lean_experts to true, or cuda_graphs to false"
            )
        self.resolved()
        return self

    @classmethod
    def from_file(cls, path: str | Path) -> "PiKVConfig":
        """Read a YAML file. Relative paths in it begin at its own folder.

        Raises:
            ValueError: the file or its calibration is missing, it is no mapping, or a key is
                unknown or out of range.
        """
        path = Path(path)
        try:
            values = yaml.safe_load(path.read_text()) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ValueError(f"{path}: cannot read the PiKV configuration: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path}: expected a mapping of PiKVConfig fields")
        try:
            config = cls.model_validate(values, context={"folder": path.parent})
        except ValidationError as error:
            raise ValueError(f"{path}: {error}") from error
        if config.calibration is not None and not config.calibration.is_file():
            raise ValueError(
                f"{path}: calibration {values['calibration']}: there is no file "
                f"{config.calibration}; a relative path begins at the folder of {path.name}"
            )
        return config

    def to_file(self, path: Path) -> None:
        """Write a YAML file of what differs from the defaults, which `from_file` reads."""
        chosen = {
            name for name, field in type(self).model_fields.items()
            if getattr(self, name) != field.default
        }
        values = self.model_dump(mode="json", exclude_unset=True, include=chosen)
        for name in ("calibration", "learned"):
            if getattr(self, name) is not None:
                values[name] = os.path.relpath(getattr(self, name), path.parent)
        path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")

    def open_files(self) -> tuple[Calibrated | None, Calibrated | None]:
        """What was calibrated, and what earlier runs learned, where there is such a file.

        Raises:
            ValueError: a file cannot be read, or the one that is to be learned cannot be written.
        """
        calibrated = learned = None
        if self.calibration is not None:
            calibrated = load_calibrated(self.calibration)
        if self.learned is not None:
            if self.learned.exists():
                learned = load_calibrated(self.learned, "learned")
            elif not self.learned.parent.is_dir():
                raise ValueError(f"learned {self.learned}: there is no such folder: make it")
        return calibrated, learned

    def resolve(
        self, layers: Sequence[LayerShape],
        files: tuple[Calibrated | None, Calibrated | None] | None = None,
    ) -> tuple[LayerSpec, ...]:
        """Every layer with its methods.

        Args:
            files: as `open_files` gives them, which is asked by default.

        Raises:
            ValueError: `layers` names one that the model does not have, or a method or the
                calibration does not fit a layer.
        """
        for override in self.layers:
            beyond = [number for number in override.layers if number >= len(layers)]
            if beyond:
                raise ValueError(
                    f"layers: match {override.match!r} names layer {beyond[0]}, and the model has "
                    f"{len(layers)}, counted from 0"
                )
        files = files or self.open_files()
        specs = tuple(self._spec_of(number, layers, *files) for number in range(len(layers)))
        if self.learned and not any(spec.options.router.keeps_learned for spec in specs):
            raise ValueError(
                f"learned {self.learned}: no layer's router keeps what it learns: name router "
                "reinforced, or leave learned out"
            )
        policies = {
            spec.number: spec.options.retention.build(spec.fitted)
            for spec in specs if spec.sliding_window is None
        }
        self._check_summed([
            spec for spec in specs
            if (policy := policies.get(spec.number)) and policy.sums_layers
        ])
        _check_across_layers([
            spec.options for spec in specs
            if policies.get(spec.number) and spec.options.budget.joins_layers
        ])
        for spec in {spec.chosen: spec for spec in specs}.values():
            if spec.options.retention.needs_scores and spec.kv.values_in_keys:
                raise ValueError(
                    f"retention {spec.options.retention.name} scores keys and values, and layer "
                    f"{spec.number - 1} stores latent ones: name another policy"
                )
            source = spec.options.router.expert_source
            if source is not None and self.expert_shards == 1:
                raise ValueError(
                    f"router.source {source} visits the shards of experts, and expert_shards is 1: "
                    "set it to a power of two, the number of experts say"
                )
            if spec.sliding_window is None:
                spec.options.router.gate(spec.fitted)
            needs_bounds = spec.options.selector.needs_bounds
            spec.options.sketch.build(spec.kv, self.page_size, 0, needs_bounds)
            if (needs_bounds or spec.options.selector.samples) and self.replicas > 1:
                raise ValueError(
                    f"selector {spec.options.selector.name} counts what pages hold, and with "
                    f"replicas {self.replicas} several hold a token, of which one is read: use "
                    "replicas 1"
                )
            codec = spec.options.codec.build(spec.kv, self.page_size, 0)
            if spec.options.codec.transform.is_by_expert and (
                self.token_shards != 1 or self.expert_shards == 1 or self.shard_after
            ):
                raise ValueError(
                    f"codec.transform {spec.options.codec.transform.name} has per_expert, whose "
                    f"pages hold the tokens of one expert shard: set token_shards to 1, "
                    f"expert_shards above 1 and shard_after to 0 (they are {self.token_shards}, "
                    f"{self.expert_shards} and {self.shard_after})"
                )
            if isinstance(spec.options.sketch, KeysOptions) and (
                codec.angles is not None or spec.options.codec.transform.is_by_expert
            ):
                raise ValueError(
                    "sketch keys judges keys as RoPE turned them, of one basis a sequence: leave "
                    "out codec.keys before_rope and per_expert, or name another sketch"
                )
            policy = policies.get(spec.number)
            if policy and policy.ageing:
                _check_merged(spec.options, codec, self)
            is_pooled = codec.pooled > 1 or codec.ageing is not None
            if is_pooled and needs_bounds and not isinstance(spec.options.sketch, KeysOptions):
                raise ValueError(
                    f"codec.transform {spec.options.codec.transform.name} pools tokens that sketch "
                    f"{spec.options.sketch.name} bounds one by one: use sketch keys"
                )
            if spec.options.retention.tiers is not None:
                _check_tiered(spec.options, codec)
            if self.cuda_graphs:
                _check_recordable(spec.options)
            if is_pooled and self.replicas > 1:
                raise ValueError(
                    f"codec.transform {spec.options.codec.transform.name} stores neighbours as one "
                    f"token, and replicas {self.replicas} hides tokens one by one: use replicas 1"
                )
        return specs

    def _check_summed(self, specs: Sequence[LayerSpec]) -> None:
        """Layers whose policy sums over them hold the same pages."""
        if not specs:
            return
        name = specs[0].options.retention.name
        if self.expert_shards > 1:
            raise ValueError(
                f"retention {name} sums over layers, and with expert_shards {self.expert_shards} a "
                "page holds other tokens in each: use expert_shards 1"
            )
        if any(spec.options.codec.transform.ageing is not None for spec in specs):
            raise ValueError(
                f"retention {name} sums over layers, and codec.transform pools pages of each by "
                "itself: leave young out"
            )
        budget, *others = {spec.options.budget for spec in specs}
        if others or isinstance(budget, BytesBudget) or budget.joins_layers:
            raise ValueError(
                f"retention {name} keeps the same pages in all layers: give them one budget, share "
                "or pages, without across_layers"
            )

    def _spec_of(
        self, number: int, layers: Sequence[LayerShape], calibrated: Calibrated | None,
        learned: Calibrated | None,
    ) -> LayerSpec:
        shape = layers[number]
        spec = LayerSpec(number + 1, *shape, self._options_of(number, layers))
        if learned is not None and number in learned.layers:
            spec = spec._replace(learned=learned.layers[number].to(shape.kv.device))
        # A layer with a sliding window has no pages, and needs no calibration.
        if calibrated is None or shape.sliding_window is not None:
            return spec
        fitted = calibrated.layers.get(number, {})
        moments = (read_moments(calibrated.path, number, fitted, shape.kv),)
        if spec.options.codec.transform.is_by_expert:
            moments = read_shard_moments(
                calibrated.path, number, fitted, *moments, self.expert_shards
            )
        if shape.kv.device.type != "meta":  # a planner asks what was fitted, and computes nothing
            fitted = fitted.to(shape.kv.device)
        return spec._replace(moments=moments, fitted=fitted)

    def _options_of(self, layer: int, layers: Sequence[LayerShape]) -> LayerOptions:
        methods = {name: getattr(self, name) for name in LayerOptions.model_fields}
        for override in self.layers:
            if layer in override.layers:
                methods |= override.methods()
        options = LayerOptions(**methods).resolved()
        num_paged = sum(shape.sliding_window is None for shape in layers)
        budget = options.budget.for_layer(layer, len(layers), num_paged)
        return options.model_copy(update={"budget": budget})


def _check_across_layers(layers: Sequence[LayerOptions]) -> None:
    """Layers whose pages compete judge them alike."""
    policies = {options.retention.name: options.retention for options in layers}
    if len({options.retention for options in layers}) > 1:
        raise ValueError(
            "budget.across_layers compares what pages of layers are worth, and retention is not "
            f"the same in all that have it ({', '.join(sorted(policies))}): give them one policy, "
            "or the others a budget without it, under `layers`"
        )


def _check_merged(options: LayerOptions, codec: PageCodec, config: PiKVConfig) -> None:
    """Whether a page may hold other tokens in each head, of several pages as they were."""
    transform = options.codec.transform
    others = {
        f"codec.transform {transform.name} pools tokens": codec.pooled > 1,
        f"codec.transform {transform.name} merges older pages": codec.ageing is not None,
        f"codec.transform {transform.name} has a basis for each expert": transform.is_by_expert,
        f"codec.format {options.codec.format.name} packs older pages": codec.older is not None,
        "codec.keys before_rope turns keys by their pages' positions": codec.angles is not None,
        f"replicas {config.replicas} hides tokens one by one": config.replicas > 1,
        f"pinned {config.pinned} keeps tokens in all heads": config.pinned > 0,
        f"sketch {options.sketch.name} is of the pages as they were":
            not isinstance(options.sketch, KeysOptions | NoSketchOptions),
    }
    found = next((said for said, is_so in others.items() if is_so), None)
    if found is not None:
        raise ValueError(
            f"retention {options.retention.name} keeps other tokens in each head, and {found}: "
            "leave one of them out; sketch keys goes with it"
        )


def _check_tiered(options: LayerOptions, codec: PageCodec) -> None:
    """Whether pages may be moved as they were sealed, and read only where a selector says so."""
    others = {
        f"codec.transform {options.codec.transform.name} merges older pages":
            codec.ageing is not None,
        f"codec.format {options.codec.format.name} packs older pages anew": codec.older is not None,
        "sketch keys reads the keys of all pages in every step":
            isinstance(options.sketch, KeysOptions),
        "budget.across_layers shares out what stays": options.budget.joins_layers,
    }
    found = next((said for said, is_so in others.items() if is_so), None)
    if found is not None:
        raise ValueError(
            f"retention {options.retention.name} moves pages between tiers as they were sealed, "
            f"and {found}: leave one of them out, or name another sketch"
        )


def _check_recordable(options: LayerOptions) -> None:
    """Whether a decode step does on the device alone what it does."""
    if options.router.name != "all":
        raise ValueError(
            f"cuda_graphs: router {options.router.name} sends each step's queries to other ranks; "
            "set cuda_graphs to false, or router to all"
        )
    if options.retention.tiers is not None:
        raise ValueError(
            f"cuda_graphs: retention {options.retention.name} brings pages to the device by what a "
            "step reads; set cuda_graphs to false, or choose a policy that keeps pages there"
        )
    if options.retention.needs_mass:
        raise ValueError(
            f"cuda_graphs: retention {options.retention.name} books every step's masses on the "
            "host; set cuda_graphs to false, or choose a policy without them"
        )
