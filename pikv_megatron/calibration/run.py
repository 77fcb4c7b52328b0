"""Streams windows through a model and fits to them, with what was done so far kept in a file."""

from contextlib import closing
from pathlib import Path
from typing import Any, Mapping

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from pikv_megatron.calibrated import load_calibrated, save_calibrated
from pikv_megatron.calibration.collector import Collector
from pikv_megatron.config import PiKVConfig
from pikv_megatron.evaluation.task import Task
from pikv_megatron.evaluation.teacher_forcing import TeacherForcing
from pikv_megatron.inference.progress import Advance
from pikv_megatron.transformer.calibrated_model import NAME, output_norms
from pikv_megatron.transformer.context import PiKVInferenceContext

# Windows of a rank after which what was summed up is written down.
EVERY = 8


def calibrate(
    model: GPTModel, ids: Tensor, vocab_size: int, manifest: Mapping[str, Any],
    unfinished: Path | None = None, advance: Advance = lambda done, total: None,
    per_expert: bool = False,
) -> dict[int, dict[str, Tensor]]:
    """What was fitted to every layer, by its number from 0; called on every rank.

    Args:
        model: with PiKV layers.
        ids: [windows, length], dealt to the ranks in turn; a multiple of their number.
        manifest: of the file that this is for.
        unfinished: what an interrupted run has left there is gone on with; None: nothing is kept.
        advance: told of the windows of a rank that are done, and how many there are.
        per_expert: tokens are told apart by their experts, too.

    Raises:
        ValueError: what was left there is of another run.
    """
    context = PiKVInferenceContext.for_model(model, PiKVConfig(), 1, ids.shape[1])
    ranks, rank = context.num_ranks, context.rank
    batches = ids.split(ranks)
    listener = Collector(context, model, ids.shape[1] - 1, len(ids), per_expert)
    with closing(listener) as collector:
        manifest = {**manifest, "ranks": ranks}
        done = _restore(collector, unfinished, manifest)
        forcing = TeacherForcing(model, context, vocab_size, lambda: None)
        for index in range(done, len(batches)):
            collector.window = index * ranks + rank
            batch = batches[index]
            for _ in forcing.feed(Task(batch, torch.zeros(len(batch), 1, dtype=torch.int64))):
                pass
            # The same sums whether or not the run is interrupted here.
            if (index + 1) % EVERY == 0 and index + 1 < len(batches):
                sums = collector.gather()
                if unfinished is not None and rank == 0:
                    save_calibrated(unfinished, {**manifest, "done": index + 1}, {0: sums})
            advance(index + 1, len(batches))
        fitted = collector.finish()
    for number, layer in fitted.items():
        layer[NAME] = output_norms(model.decoder.layers[number].self_attention)
    return fitted


def _restore(collector: Collector, unfinished: Path | None, manifest: Mapping[str, Any]) -> int:
    """Batches that an earlier run has done."""
    if unfinished is None or not unfinished.exists():
        return 0
    *_, found, sums = load_calibrated(unfinished)
    done = found.pop("done", 0)
    if found != manifest:
        fields = [name for name in manifest if found.get(name) != manifest[name]]
        raise ValueError(
            f"{unfinished}: an interrupted calibration of the model {found.get('model')!r} is "
            f"there, made with other {', '.join(fields)}: remove it, or name another --output"
        )
    collector.restore(sums[0])
    return done
