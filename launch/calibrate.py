"""Calibrate codecs: python launch/calibrate.py --model models/demo --output FILE

The same under deepspeed --num_accelerators N with N ranks, over which windows of text are dealt.
"""

import os
import sys
import warnings
from contextlib import redirect_stdout

# What is not installed, and what will be renamed, would hide the result.
warnings.filterwarnings("ignore", module=r"megatron\.|torch\.distributed")

import torch

from pikv_megatron import (
    PiKVConfig,
    PiKVInferenceContext,
    destroy_process_groups,
    init_process_groups,
    pikv_layer_spec,
)
from pikv_megatron.calibration.collector import MomentCollector
from pikv_megatron.calibration.options import CalibrateOptions, parse_options
from pikv_megatron.checkpoint.huggingface import load_huggingface
from pikv_megatron.codec.calibration import save_moments
from pikv_megatron.codec.transform.moments import KVMoments
from pikv_megatron.evaluation.task import Task
from pikv_megatron.evaluation.teacher_forcing import TeacherForcing
from pikv_megatron.inference.program import IS_FIRST_RANK, refuse, use_device
from pikv_megatron.inference.progress import progress


def main() -> int:
    """Run on every rank; the first one writes the file."""
    try:
        options = parse_options(sys.argv[1:])
        use_device()
        with redirect_stdout(sys.stderr):  # DeepSpeed prints what it builds
            layers = calibrate(options)
    except ValueError as error:
        return refuse(error)
    if IS_FIRST_RANK:
        save_moments(options.output, layers)
        print(f"{options.output}: {len(layers)} layers, {options.ids.numel():,} tokens")
    return 0


def calibrate(options: CalibrateOptions) -> dict[int, KVMoments]:
    """Feed the windows, a batch of one a rank at a time."""
    num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    groups = init_process_groups(expert_parallel_size=num_ranks)
    pikv = PiKVConfig()
    model = load_huggingface(
        options.model, groups, options.dtype,
        spec_transform=lambda spec: pikv_layer_spec(spec, pikv),
    ).eval()
    context = PiKVInferenceContext.for_model(model, pikv, 1, options.ids.shape[1])
    collector = MomentCollector(context, model)
    forcing = TeacherForcing(model, context, options.architecture.vocab_size, lambda: None)
    with progress("windows", IS_FIRST_RANK) as advance:
        for index, ids in enumerate(options.ids.split(num_ranks)):
            for _ in forcing.feed(Task(ids, torch.zeros(len(ids), 1, dtype=torch.int64))):
                pass
            advance(index + 1, len(options.ids) // num_ranks)
    return collector.moments()


if __name__ == "__main__":
    try:
        sys.exit(main())
    finally:
        destroy_process_groups()
