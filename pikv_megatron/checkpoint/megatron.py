"""Megatron-Core's `torch_dist` checkpoints: written at one expert-parallel size, read at any."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.models.gpt import GPTModel
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata

MODEL_PREFIXES = ("embedding.", "decoder.", "output_layer.")


def save_megatron(model: GPTModel, directory: str | Path) -> None:
    """Write a checkpoint; called by every rank.

    Megatron-Core starts a process for the writing, so a script that saves needs the usual
    `if __name__ == "__main__":`.

    Raises:
        ValueError: the directory already holds a checkpoint.
    """
    directory = Path(directory)
    holds_checkpoint = (directory / "metadata.json").exists()
    dist.barrier()  # every rank has looked before the first one writes
    if holds_checkpoint:
        raise ValueError(f"{directory} already holds a checkpoint: give another directory")
    directory.mkdir(parents=True, exist_ok=True)
    dist_checkpointing.save(model.sharded_state_dict(prefix=""), directory)


def load_megatron(model: GPTModel, directory: str | Path) -> None:
    """Fill `model` from a checkpoint; called by every rank, at any expert-parallel size.

    Checkpoints hold pickled metadata, as Megatron-Core writes it: load only what you trust.

    Raises:
        ValueError: no checkpoint, a missing or cut file, or tensors that are not the model's.
    """
    directory = Path(directory)
    metadata = _read_metadata(directory)
    _check_files(directory, metadata)
    content = _read_content(directory)
    _check_tensors(directory, metadata, model, content)
    try:
        state = dist_checkpointing.load(
            model.sharded_state_dict(prefix="", metadata=content), directory
        )
    except (CheckpointingException, CheckpointException) as error:
        raise ValueError(f"{directory}: {_cause(error)}") from error
    model.load_state_dict(state)


def _read_metadata(directory: Path) -> Metadata:
    if not (directory / "metadata.json").is_file():
        raise ValueError(f"{directory / 'metadata.json'} does not exist: no Megatron checkpoint")
    try:
        return FileSystemReader(directory).read_metadata()
    except Exception as error:  # whatever unpickling a broken file raises
        raise ValueError(f"{directory / '.metadata'} cannot be read: {error}") from error


def _read_content(directory: Path) -> dict[str, Any] | None:
    """What the writer noted about its naming of tensors."""
    try:
        return dist_checkpointing.load_content_metadata(str(directory))
    except Exception as error:  # 0.16 fails in several ways where a newer release wrote
        raise ValueError(f"{directory}: the common part cannot be read: {error}") from error


def _check_files(directory: Path, metadata: Metadata) -> None:
    """Every stored piece of a tensor must lie within its file."""
    sizes: dict[str, int] = {}
    for index, place in metadata.storage_data.items():
        path = directory / place.relative_path
        if place.relative_path not in sizes:
            if not path.is_file():
                raise ValueError(f"{path} does not exist, and should hold tensor {index.fqn}")
            sizes[place.relative_path] = path.stat().st_size
        if place.offset + place.length > sizes[place.relative_path]:
            raise ValueError(f"{path} is cut short within tensor {index.fqn}")


def _check_tensors(
    directory: Path, metadata: Metadata, model: GPTModel, content: dict[str, Any] | None
) -> None:
    """The checkpoint must hold the model's tensors, in their shapes, and no more layers."""
    saved, wanted = metadata.state_dict_metadata, {}
    for tensor in _sharded_tensors(model, content):
        wanted[tensor.key] = tensor
        if tensor.key not in saved:
            raise ValueError(f"{directory}: tensor {tensor.key} is missing")
        shape, expected = tuple(saved[tensor.key].size), tuple(tensor.global_shape)
        if shape != expected and not _is_padding(tensor, shape, expected, model):
            raise ValueError(
                f"{directory}: tensor {tensor.key} has shape {shape}, the model asks for {expected}"
            )
    for key in saved:
        if key.startswith(MODEL_PREFIXES) and "_extra_state" not in key and key not in wanted:
            raise ValueError(f"{directory}: tensor {key} belongs to no part of the model")


def _is_padding(
    tensor: ShardedTensor, shape: tuple[int, ...], expected: tuple[int, ...], model: GPTModel
) -> bool:
    """Vocabularies are padded to suit the tensor-parallel size; a checkpoint may hold more rows."""
    padding = model.config.tensor_model_parallel_size - 1
    same_width = shape[1:] == expected[1:]
    return tensor.allow_shape_mismatch and same_width and shape[0] >= expected[0] - padding


def _sharded_tensors(model: GPTModel, content: dict[str, Any] | None) -> Iterator[ShardedTensor]:
    state = model.sharded_state_dict(prefix="", metadata=content)
    apply_factories(state)
    for value in nested_values(state):
        if isinstance(value, ShardedTensor):
            yield value


def _cause(error: Exception) -> str:
    """The innermost message; torch wraps one exception a rank."""
    failures = getattr(error, "failures", {})
    return "; ".join(f"rank {rank}: {cause[0]}" for rank, cause in failures.items()) or str(error)
