"""Calibrate: python launch/calibrate.py --model models/demo --output FILE

The same under deepspeed --num_accelerators N with N ranks, over which windows of text are dealt. An
interrupted run goes on where it was.
"""

import os
import sys
import warnings
from contextlib import redirect_stdout

# What is not installed, and what will be renamed, would hide the result.
warnings.filterwarnings("ignore", module=r"megatron\.|torch\.distributed")

from pikv_megatron import (
    PiKVConfig,
    destroy_process_groups,
    init_process_groups,
    pikv_layer_spec,
)
from pikv_megatron.calibrated import save_calibrated
from pikv_megatron.calibration.options import CalibrateOptions, parse_options
from pikv_megatron.calibration.run import calibrate
from pikv_megatron.checkpoint.huggingface import load_huggingface
from pikv_megatron.inference.program import IS_FIRST_RANK, refuse, use_device
from pikv_megatron.inference.progress import progress


def main() -> int:
    """Run on every rank; the first one writes the file."""
    try:
        options = parse_options(sys.argv[1:])
        use_device()
        with redirect_stdout(sys.stderr):  # DeepSpeed prints what it builds
            run(options)
    except ValueError as error:
        return refuse(error)
    return 0


def run(options: CalibrateOptions) -> None:
    """Feed the windows, one a rank at a time, and write what was fitted to them."""
    groups = init_process_groups(expert_parallel_size=int(os.environ.get("WORLD_SIZE", "1")))
    model = load_huggingface(
        options.model, groups, options.dtype,
        spec_transform=lambda spec: pikv_layer_spec(spec, PiKVConfig()),
    ).eval()
    unfinished = options.output.with_name(f"{options.output.name}.unfinished")
    manifest = options.manifest
    with progress("windows", IS_FIRST_RANK) as advance:
        layers = calibrate(
            model, options.ids, options.architecture.vocab_size, manifest, unfinished, advance,
            options.per_expert,
        )
    if IS_FIRST_RANK:
        save_calibrated(options.output, manifest, layers)
        unfinished.unlink(missing_ok=True)
        print(f"{options.output}: {len(layers)} layers, {options.ids.numel():,} tokens",
              file=sys.__stdout__)


if __name__ == "__main__":
    try:
        sys.exit(main())
    finally:
        destroy_process_groups()
