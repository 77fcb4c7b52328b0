"""Builds the models and the contestants that decode with them."""

from typing import Callable, Sequence

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from pikv_megatron.benchmarks.model.decoding import Contestant, DenseContestant, StockContestant
from pikv_megatron.benchmarks.model.dense_context import (
    dense_layer_spec,
    grouped_attention,
    sdpa_attention,
)
from pikv_megatron.benchmarks.model.options import GROUPED, SDPA, STOCK, BenchmarkOptions
from pikv_megatron.benchmarks.model.pikv_decoding import PiKVContestant
from pikv_megatron.benchmarks.model.workload import Workload, random_kv
from pikv_megatron.checkpoint.model_builder import build_model, identity
from pikv_megatron.config import PiKVConfig
from pikv_megatron.transformer.layer_specs import pikv_layer_spec

SpecTransform = Callable[[TransformerBlockSubmodules], TransformerBlockSubmodules]


def build_models(
    options: BenchmarkOptions, groups: ProcessGroupCollection
) -> dict[str, GPTModel]:
    """A model for each contestant; they share the tensors of one set of random weights."""
    transforms = {GROUPED: dense_layer_spec, SDPA: dense_layer_spec, STOCK: identity}
    transforms |= {name: _pikv_transform(pikv) for name, pikv in options.pikv.items()}
    models: dict[str, GPTModel] = {}
    for name in options.names:
        torch.manual_seed(options.seed)
        model = build_model(options.architecture, groups, options.dtype, transforms[name])
        if models:
            model.load_state_dict(models[options.names[0]].state_dict(), assign=True)
        models[name] = model
    return models


def build_contestants(
    options: BenchmarkOptions, models: dict[str, GPTModel], workload: Workload
) -> dict[str, Contestant]:
    """Every contestant with the workload's context in its cache."""
    kinds: dict[str, Contestant] = {
        GROUPED: DenseContestant(models[GROUPED], workload, grouped_attention),
        SDPA: DenseContestant(models[SDPA], workload, sdpa_attention),
        STOCK: StockContestant(models[STOCK], workload),
    }
    for name, pikv in options.pikv.items():
        kinds[name] = PiKVContestant(models[name], workload, pikv)
    layers = random_kv(models[GROUPED], workload)
    contestants = {name: kinds[name] for name in options.names}
    for contestant in contestants.values():
        with torch.no_grad():
            contestant.fill(layers)
    return contestants


def workload_of(
    options: BenchmarkOptions, model: GPTModel, lengths: Sequence[int], num_steps: int
) -> Workload:
    """Sequences of these lengths, with room for further steps, as this rank sees them."""
    group = model.pg_collection.ep
    return Workload(
        tuple(lengths), max(lengths) + num_steps, group.size(), group.rank(), options.seed
    )


def _pikv_transform(pikv: PiKVConfig) -> SpecTransform:
    return lambda spec: pikv_layer_spec(spec, pikv)
