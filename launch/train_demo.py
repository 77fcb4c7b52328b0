"""Train the demo model: python launch/train_demo.py --output models/demo"""

import os
import sys
import time
import warnings
from pathlib import Path

# What is not installed, and what will be renamed, would hide the table.
warnings.filterwarnings("ignore", module=r"megatron\.|torch\.distributed")
os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
# Threads that spin while they wait slow the others down where cores are shared.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from rich.console import Console

from pikv_megatron import process_groups
from pikv_megatron.demo.batches import Batches
from pikv_megatron.demo.corpus import load_corpus
from pikv_megatron.demo.options import TrainOptions, parse_options
from pikv_megatron.demo.publish import measure, save_directory
from pikv_megatron.demo.record import TrainingRecord, plot_curve
from pikv_megatron.demo.training import build_for_training, train
from pikv_megatron.inference.program import refuse
from pikv_megatron.inference.progress import progress

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def main() -> int:
    """Train, save, read back, measure."""
    try:
        options = parse_options(sys.argv[1:], CONFIGS)
    except ValueError as error:
        return refuse(error)
    torch.set_num_threads(options.threads)
    with process_groups() as groups:
        record = run(options, groups)
    record.save(options.output)
    plot_curve(record.curve, options.output)
    for table in record.tables():
        Console().print(table)
    return 0


def run(options: TrainOptions, groups: ProcessGroupCollection) -> TrainingRecord:
    """Train and save the model, then measure what was saved."""
    batches = Batches(load_corpus(held_out=False), options.seed)
    model = build_for_training(options.architecture, options.settings, groups, options.seed)
    start, core_start = time.perf_counter(), time.process_time()
    with progress("training", is_shown=True) as advance:
        curve = train(model, options.settings, batches, advance)
    seconds, core_seconds = time.perf_counter() - start, time.process_time() - core_start
    save_directory(model, options.architecture, options.output)
    with progress("measuring", is_shown=True):
        recall, perplexity = measure(options.output, groups, load_corpus(held_out=True))
    return TrainingRecord(
        seed=options.seed,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        weight_bytes=(options.output / "model.safetensors").stat().st_size,
        seconds=seconds, core_seconds=core_seconds, threads=options.threads,
        recall=recall, perplexity=perplexity, curve=curve,
    )


if __name__ == "__main__":
    sys.exit(main())
