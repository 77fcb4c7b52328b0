"""Builds the models and the contestants that decode with them."""

from typing import Callable, Mapping, Sequence

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
from pikv_megatron.benchmarks.model.options import (
    GROUPED,
    SDPA,
    STOCK,
    TRANSFORMERS,
    BenchmarkOptions,
)
from pikv_megatron.benchmarks.model.pikv_decoding import PiKVContestant
from pikv_megatron.benchmarks.model.transformers_decoding import (
    TransformersContestant,
    transformers_model,
)
from pikv_megatron.benchmarks.model.workload import Workload, random_kv
from pikv_megatron.checkpoint.huggingface import load_huggingface
from pikv_megatron.checkpoint.model_builder import build_model, identity
from pikv_megatron.config import PiKVConfig
from pikv_megatron.transformer.layer_specs import pikv_layer_spec

SpecTransform = Callable[[TransformerBlockSubmodules], TransformerBlockSubmodules]


def build_models(
    options: BenchmarkOptions, groups: ProcessGroupCollection
) -> dict[str, torch.nn.Module]:
    """A model for each contestant; Megatron-Core's share the tensors of one set of weights."""
    transforms = {GROUPED: dense_layer_spec, SDPA: dense_layer_spec, STOCK: identity}
    transforms |= {name: _pikv_transform(pikv) for name, pikv in options.pikv.items()}
    models: dict[str, torch.nn.Module] = {}
    for name in options.names:
        models[name] = _build(options, groups, transforms, models, name)
    return models


def _build(
    options: BenchmarkOptions, groups: ProcessGroupCollection,
    transforms: Mapping[str, SpecTransform], models: Mapping[str, torch.nn.Module], name: str,
) -> torch.nn.Module:
    """One of the models; `models` are those that were built before."""
    first = models.get(options.names[0])
    if name == TRANSFORMERS:
        return transformers_model(first, options.architecture, options.checkpoint, options.dtype)
    if first is None and options.checkpoint is not None:
        return load_huggingface(options.checkpoint, groups, options.dtype, transforms[name])
    torch.manual_seed(options.seed)
    model = build_model(options.architecture, groups, options.dtype, transforms[name])
    if first is not None:
        model.load_state_dict(first.state_dict(), assign=True)
    return model


def build_contestants(
    options: BenchmarkOptions, models: Mapping[str, torch.nn.Module], workload: Workload
) -> dict[str, Contestant]:
    """Every contestant with the workload's context in its cache."""
    kinds: dict[str, Contestant] = {
        GROUPED: DenseContestant(models[GROUPED], workload, grouped_attention),
        SDPA: DenseContestant(models[SDPA], workload, sdpa_attention),
        STOCK: StockContestant(models[STOCK], workload),
    }
    if options.beside_transformers:
        kinds[TRANSFORMERS] = TransformersContestant(models[TRANSFORMERS], workload)
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
