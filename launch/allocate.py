"""Spend a budget: python launch/allocate.py --model DIR --pikv small_pages --bytes N --output FILE

Writes the configuration of a cache whose pages take at most N bytes a token, layers together.
"""

import sys
import warnings
from contextlib import redirect_stdout

# What is not installed, and what will be renamed, would hide the result.
warnings.filterwarnings("ignore", module=r"megatron\.|torch\.distributed")

import torch

from pikv_megatron import (
    PiKVInferenceContext,
    destroy_process_groups,
    init_process_groups,
    pikv_layer_spec,
)
from pikv_megatron.calibration.allocation import Choice, allocate
from pikv_megatron.calibration.menu import codec_fields, layer_menus
from pikv_megatron.calibration.options import CalibrateOptions, parse_allocation
from pikv_megatron.calibration.sample import LayerSample
from pikv_megatron.checkpoint.huggingface import load_huggingface
from pikv_megatron.evaluation.task import Task
from pikv_megatron.evaluation.teacher_forcing import TeacherForcing
from pikv_megatron.inference.program import refuse, use_device
from pikv_megatron.layer_options import LayerOverride


def main() -> int:
    """Run on one rank: what is chosen holds for any number of them."""
    try:
        options = parse_allocation(sys.argv[1:])
        use_device()
        with redirect_stdout(sys.stderr):  # DeepSpeed prints what it builds
            numbers, chosen = choose(options)
    except ValueError as error:
        return refuse(error)
    total = sum(choice.num_bytes for choice in chosen)
    layers = list(zip(numbers, chosen[::2], chosen[1::2]))
    for number, keys, values in layers:
        said = _said(keys, "key_rank"), _said(values, "value_rank")
        print(f"layer {number}: keys {said[0]}, values {said[1]}")
    print(f"{total} bytes a token, of {options.budget}")
    chosen_codecs = [
        LayerOverride(match=str(number), codec=codec_fields(keys.fields, values.fields))
        for number, keys, values in layers
    ]
    pikv = options.pikv.model_copy(update={"layers": tuple(chosen_codecs)})
    pikv.to_file(options.output)
    return 0


def _said(choice: Choice, rank: str) -> str:
    return (
        f"{choice.fields['format']} of rank {choice.fields[rank]} ({choice.num_bytes} bytes, "
        f"output off by {100 * choice.error**0.5:.1f}%)"
    )


def choose(options: CalibrateOptions) -> tuple[list[int], list[Choice]]:
    """Layers that have pages, from 0, and what is chosen for keys and values of each in turn."""
    groups = init_process_groups(expert_parallel_size=1)
    model = load_huggingface(
        options.model, groups, options.dtype,
        spec_transform=lambda spec: pikv_layer_spec(spec, options.pikv),
    ).eval()
    length = options.ids.shape[1]
    pikv = options.pikv.model_copy(update={"prefill_chunk_size": length})
    context = PiKVInferenceContext.for_model(model, pikv, 1, length)
    forcing = TeacherForcing(model, context, options.architecture.vocab_size, lambda: None)
    layers = context.sharded_layers
    samples: list[list[LayerSample]] = [[] for _ in layers]
    for layer, kept in zip(layers, samples):
        layer.on_attend = lambda *states, kept=kept, scale=layer.spec.softmax_scale: (
            kept.append(LayerSample.of(*states, scale))
        )
    for ids in options.ids.split(1):
        for _ in forcing.feed(Task(ids, torch.zeros(1, 1, dtype=torch.int64))):
            pass
    found = [
        menu for layer, kept in zip(layers, samples)
        for menu in layer_menus(kept, layer.spec, pikv.page_size)
    ]
    return [layer.spec.number - 1 for layer in layers], allocate(found, options.budget)


if __name__ == "__main__":
    try:
        sys.exit(main())
    finally:
        destroy_process_groups()
