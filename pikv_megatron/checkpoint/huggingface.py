"""Loads a Hugging Face directory straight into an expert-sharded Megatron-Core model."""

from collections.abc import Callable
from pathlib import Path

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection

from pikv_megatron.checkpoint.huggingface_config import read_architecture
from pikv_megatron.checkpoint.model_builder import SpecTransform, build_model, identity
from pikv_megatron.checkpoint.name_table import Slot, global_name, name_table
from pikv_megatron.checkpoint.tensor_reader import TensorReader

Progress = Callable[[int, int, str], None]
RECOMPUTED = (".rotary_emb.inv_freq",)  # older releases saved these buffers


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
        ValueError: an unsupported architecture, or a missing, cut or misshapen tensor.
    """
    architecture = read_architecture(directory)
    table, reader = name_table(architecture), TensorReader(directory)
    ignored = RECOMPUTED + (("lm_head.weight",) if architecture.tie_embeddings else ())
    reader.check([source for slot in table.values() for source in slot.sources], ignored)
    model = build_model(
        architecture,
        pg_collection,
        dtype or architecture.torch_dtype,
        spec_transform,
        overrides={"perform_initialization": False},  # every parameter is read below
    )
    _fill(model, table, reader, pg_collection, progress)
    return model


@torch.no_grad()
def _fill(
    model: GPTModel,
    table: dict[str, Slot],
    reader: TensorReader,
    pg_collection: ProcessGroupCollection,
    progress: Progress | None,
) -> None:
    parameters = dict(model.named_parameters())
    first_expert = pg_collection.ep.rank() * (
        model.config.num_moe_experts // pg_collection.ep.size()
    )
    for done, (name, parameter) in enumerate(parameters.items(), start=1):
        slot = table.get(global_name(name, first_expert))
        if slot is None:
            raise ValueError(f"{reader.directory}: no tensor there fills the parameter {name}")
        group = pg_collection.expt_tp if ".local_experts." in name else pg_collection.tp
        _assign(parameter, _read_slot(reader, slot, group.rank(), group.size()), name)
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
