"""What routers learn outlives a run: it is written at its end, and the next one goes on from it."""

from pathlib import Path

import deepspeed.comm as dist
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from pikv_megatron.calibrated import save_calibrated
from pikv_megatron.transformer.calibrated_model import NAME, output_norms
from pikv_megatron.transformer.context import PiKVInferenceContext


def save_learned(
    path: Path, model_name: str, model: GPTModel, context: PiKVInferenceContext
) -> None:
    """Write what is known of visits to shards, what all ranks were taught in this run included.

    Called on every rank of the group; the file, which its owner alone may read, is the first one's.

    Raises:
        ValueError: no router keeps what it learns.
    """
    if not context.visits:
        raise ValueError("save_learned: no layer's router keeps what it learns: name reinforced")
    layers: dict[int, dict[str, Tensor]] = {}
    for number, visits in context.visits.items():
        found = {}
        for name, taught in visits.taught.items():
            taught = taught.clone()
            if context.ep_group is not None:
                dist.all_reduce(taught, group=context.ep_group)
            found[name] = (visits.known[name] + taught).cpu()
        found[NAME] = output_norms(model.decoder.layers[number - 1].self_attention).cpu()
        layers[number - 1] = found
    if dist.get_rank() == 0:
        save_calibrated(path, {"model": model_name}, layers, is_private=True)
