"""Loads a Hugging Face directory straight into an expert-sharded Megatron-Core model."""

import re
from collections.abc import Callable
from pathlib import Path

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection

from pikv_megatron.checkpoint.architecture import Architecture
from pikv_megatron.checkpoint.families.registry import FAMILIES
from pikv_megatron.checkpoint.huggingface_config import read_architecture
from pikv_megatron.checkpoint.model_builder import SpecTransform, build_model, identity
from pikv_megatron.checkpoint.name_table import (
    Slot,
    Source,
    global_name,
    name_table,
    named_tensors,
)
from pikv_megatron.checkpoint.tensor_reader import TensorReader

Progress = Callable[[int, int, str], None]
EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
ROWS_COMPARED = 4096  # at a time
RECOMPUTED = ".rotary_emb.inv_freq"  # older releases saved these buffers
LAYER = re.compile(r"model\.layers\.(\d+)\.")


def load_huggingface(
    directory: str | Path,
    pg_collection: ProcessGroupCollection,
    dtype: torch.dtype | None = None,
    spec_transform: SpecTransform = identity,
    progress: Progress | None = None,
) -> GPTModel:
    """Build the model that `directory` describes and fill it with this rank's part of the weights.

    Every rank checks the names and shapes of all tensors, so that all ranks fail together, and
    reads only its own experts and its own tensor-parallel slices.

    Args:
        directory: holds `config.json` and safetensors, in one file or sharded.
        pg_collection: from `init_process_groups`.
        dtype: type of the weights; by default the one that `config.json` names.
        spec_transform: gets the stock block spec and returns the one to build.
        progress: called with (parameters done, parameters of this rank, name) after each.

    Raises:
        ValueError: an unsupported architecture, or a missing, cut or misshapen tensor, or one that
            holds NaN.
    """
    architecture, reader = read_architecture(directory), TensorReader(directory)
    if architecture.tie_embeddings and not _is_tied(reader, architecture):
        architecture = architecture.model_copy(update={"tie_embeddings": False})
    table = name_table(architecture)
    sources = [source for slot in table.values() for source in slot.sources]
    reader.check(sources, lambda name: _is_left_out(name, architecture))
    model = build_model(
        architecture,
        pg_collection,
        dtype or architecture.torch_dtype,
        spec_transform,
        overrides={"perform_initialization": False},  # every parameter is read below
    )
    _fill(model, table, reader, pg_collection, progress)
    return model


def _is_left_out(name: str, architecture: Architecture) -> bool:
    """Whether a tensor that fills nothing may be there."""
    if name == OUTPUT or name.endswith(RECOMPUTED):
        return True
    layer = LAYER.match(name)
    is_behind = layer is not None and int(layer[1]) >= architecture.num_layers
    return is_behind and FAMILIES[architecture.family].has_prediction_layers


def _is_tied(reader: TensorReader, architecture: Architecture) -> bool:
    """Whether the output layer is the embedding: a file that holds another one means that one."""
    if not reader.has(OUTPUT):
        return True
    shape = architecture.vocab_size, architecture.hidden_size
    pair = [Source(name, shape) for name in (EMBEDDING, OUTPUT)]
    reader.check_sources(pair)
    spans = [(row, min(row + ROWS_COMPARED, shape[0])) for row in range(0, shape[0], ROWS_COMPARED)]
    return all(torch.equal(*(reader.read(source, 0, *span) for source in pair)) for span in spans)


@torch.no_grad()
def _fill(
    model: GPTModel,
    table: dict[str, Slot],
    reader: TensorReader,
    pg_collection: ProcessGroupCollection,
    progress: Progress | None,
) -> None:
    parameters = named_tensors(model)
    first_expert = pg_collection.ep.rank() * (
        model.config.num_moe_experts // pg_collection.ep.size()
    )
    for done, (name, parameter) in enumerate(parameters.items(), start=1):
        slot = table.get(global_name(name, first_expert))
        if slot is None:
            raise ValueError(f"{reader.directory}: no tensor there fills the parameter {name}")
        group = pg_collection.expt_tp if ".local_experts." in name else pg_collection.tp
        value = _read_slot(reader, slot, group.rank(), group.size())
        if value.numel() and value.amax().isnan():
            places = ", ".join(reader.place(source) for source in slot.sources)
            raise ValueError(f"{places}: NaN, the checkpoint is broken")
        _assign(parameter, value, name)
        if progress is not None:
            progress(done, len(parameters), name)


def _read_slot(reader: TensorReader, slot: Slot, rank: int, size: int) -> torch.Tensor:
    if slot.tp_axis is None or size == 1:
        return slot.pack([reader.read(source) for source in slot.sources])
    parts = []
    for source in slot.sources:
        whole = source.shape[slot.tp_axis]
        chunk = -(-whole // size)  # only the vocabulary divides unevenly; its end is padded
        start, stop = min(rank * chunk, whole), min((rank + 1) * chunk, whole)
        parts.append(reader.read(source, slot.tp_axis, start, stop))
    return slot.pack(parts)


def _assign(parameter: torch.nn.Parameter, value: torch.Tensor, name: str) -> None:
    assert value.shape[1:] == parameter.shape[1:] and len(value) <= len(parameter), name
    parameter[: len(value)].copy_(value)
    parameter[len(value) :].zero_()
