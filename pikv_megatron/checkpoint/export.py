"""Writes a Megatron-Core model as a Hugging Face directory."""

from pathlib import Path

import torch
from megatron.core.models.gpt import GPTModel
from safetensors.torch import save_file

from pikv_megatron.checkpoint.architecture import DTYPES, Architecture
from pikv_megatron.checkpoint.config_writer import write_config
from pikv_megatron.checkpoint.name_table import (
    Source,
    global_name,
    name_table,
    named_tensors,
)


def save_huggingface(
    model: GPTModel,
    architecture: Architecture,
    directory: str | Path,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Write `config.json` and `model.safetensors`, which transformers and `load_huggingface` read.

    Call it on one rank.

    Args:
        model: a whole model: expert and tensor parallel size 1.
        architecture: what the model was built from; its family decides the names.
        directory: made if missing; files of the same names are replaced.
        dtype: type in which the weights are stored.

    Raises:
        ValueError: the model is spread over ranks, or its family cannot say what it is.
    """
    config = model.config
    for field in ("expert_model_parallel_size", "tensor_model_parallel_size"):
        if getattr(config, field) != 1:
            raise ValueError(
                f"{field} is {getattr(config, field)}, export needs 1: save with save_megatron "
                "and load on one rank first"
            )
    dtype_names = {value: name for name, value in DTYPES.items()}
    if dtype not in dtype_names:
        raise ValueError(f"dtype {dtype} is not supported, only {', '.join(DTYPES)} are")
    # A directory's output layer may be another one than its config.json says.
    tied = model.share_embeddings_and_output_weights
    architecture = architecture.model_copy(update={"tie_embeddings": tied})
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_config(architecture, directory, dtype_names[dtype])
    tensors = _huggingface_tensors(model, architecture, dtype)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def _huggingface_tensors(
    model: GPTModel, architecture: Architecture, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    table, tensors = name_table(architecture), {}
    for name, parameter in named_tensors(model).items():
        slot = table.pop(global_name(name, first_expert=0))
        for source, tensor in zip(slot.sources, slot.unpack(parameter.detach()), strict=True):
            assert tensor.shape == source.shape, f"{name}: {tuple(tensor.shape)}"
            kept = dtype if isinstance(parameter, torch.nn.Parameter) else torch.float32
            _put(tensor.to("cpu", kept).contiguous(), source, tensors)
    assert not table, f"the model lacks {list(table)}"
    return tensors


def _put(tensor: torch.Tensor, source: Source, tensors: dict[str, torch.Tensor]) -> None:
    """By its usual name, or into its place among all experts where that is the only one."""
    if source.name != source.other_name:
        tensors[source.name] = tensor
        return
    if source.name not in tensors:
        tensors[source.name] = tensor.new_empty(source.other_shape)
    place = tensors[source.name][source.expert]
    rows = place.T if source.is_transposed else place
    rows[source.first_row :: source.row_step] = tensor
