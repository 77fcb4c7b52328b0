"""Generate text: deepspeed --num_accelerators 2 launch/generate.py --model DIR --prompt TEXT"""

import io
import json
import os
import sys
import warnings
from contextlib import redirect_stdout
from pathlib import Path

# What is not installed, and what will be renamed, would hide the text on every rank.
warnings.filterwarnings("ignore", module=r"megatron\.|torch\.distributed")

import deepspeed
from rich.console import Console

from pikv_megatron import (
    PiKVForCausalLM,
    destroy_process_groups,
    init_process_groups,
    pikv_layer_spec,
)
from pikv_megatron.checkpoint.huggingface import load_huggingface
from pikv_megatron.inference.options import GenerateOptions, parse_options
from pikv_megatron.inference.outputs import GenerationOutput, StepOutput
from pikv_megatron.inference.program import IS_FIRST_RANK, refuse, use_device
from pikv_megatron.inference.progress import progress
from pikv_megatron.inference.report import RankUsage, RunClock, gather_usage, report_table
from pikv_megatron.inference.stopping import StopCriteria
from pikv_megatron.inference.transcript import Transcript

DEEPSPEED_CONFIG = Path(__file__).resolve().parents[1] / "configs/deepspeed/inference.json"


def main() -> int:
    """Run on every rank; the first one prints what comes out."""
    try:
        options = parse_options(sys.argv[1:], DEEPSPEED_CONFIG)
        if "RANK" not in os.environ:
            raise ValueError("start it with: deepspeed --num_accelerators N launch/generate.py ...")
        use_device()
        with redirect_stdout(sys.stderr):  # DeepSpeed prints what it builds
            engine = load_engine(options)
    except ValueError as error:
        return refuse(error)
    generate(engine, options)
    return 0


def load_engine(options: GenerateOptions) -> deepspeed.InferenceEngine:
    """The checkpoint under the swapped layer spec, in DeepSpeed's inference engine."""
    groups = init_process_groups(
        options.expert_parallel_size, options.tensor_parallel_size, options.timeout
    )
    with progress(f"loading {options.model}", IS_FIRST_RANK) as advance:
        model = load_huggingface(
            options.model, groups, dtype=options.dtype,
            spec_transform=lambda spec: pikv_layer_spec(spec, options.pikv),
            progress=lambda done, total, name: advance(done, total),
        )
    causal_lm = PiKVForCausalLM(model, options.pikv, options.architecture.vocab_size)
    return deepspeed.init_inference(causal_lm, config=options.deepspeed)


def generate(engine: deepspeed.InferenceEngine, options: GenerateOptions) -> None:
    """Continue the prompts, print the texts and the table."""
    stop_args = (options.tokenizer.eos_ids, options.stop_strings, options.tokenizer)
    is_streamed = len(options.prompts) == 1 and sys.stdout.isatty()
    out = sys.stdout if IS_FIRST_RANK else io.StringIO()
    criteria = StopCriteria(*stop_args)
    criteria.reset(options.prompt_ids)
    transcript = Transcript(options.prompts, criteria, out, is_streamed)
    clock = RunClock(len(options.prompts))
    with progress("decoding", IS_FIRST_RANK and not is_streamed) as advance:

        def on_step(step: StepOutput) -> None:
            clock.step(step.tokens)
            transcript.add(step.tokens)
            advance(clock.num_decode_steps + 1, options.max_new_tokens)

        output = engine.generate(
            options.prompt_ids, max_new_tokens=options.max_new_tokens,
            sampling=options.sampling, stop=StopCriteria(*stop_args), callback=on_step,
        )
    clock.meter.stop()
    if options.pikv.learned is not None:
        engine.module.engine.save_learned(options.pikv.learned, options.model.resolve().name)
    texts = transcript.finish()
    report = engine.module.cache_report()
    usages = gather_usage(
        RankUsage(
            report.allocated_bytes, report.dense_bytes, clock.meter.bytes_by_op(),
            report.host_bytes, report.file_bytes, report.recalled,
        )
    )
    if IS_FIRST_RANK:
        write_output(options, output, texts)
        for place, error in enumerate(output.errors):
            if error is not None:
                print(f"prompt {place} ended with an error: {error}", file=sys.stderr)
        num_tokens = sum(map(len, options.prompt_ids)), sum(map(len, output.token_ids))
        Console().print(report_table(clock, *num_tokens, usages))


def write_output(options: GenerateOptions, output: GenerationOutput, texts: list[str]) -> None:
    """One JSON object a line, where a file was asked for; an error, where one ended a prompt."""
    if options.output is None:
        return
    keys = ("prompt", "text", "token_ids", "logprobs")
    rows = zip(options.prompts, texts, output.token_ids, output.logprobs)
    lines = [
        json.dumps(dict(zip(keys, row)) | ({} if error is None else {"error": error}),
                   ensure_ascii=False) + "\n"
        for row, error in zip(rows, output.errors)
    ]
    options.output.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    try:
        sys.exit(main())
    finally:
        destroy_process_groups()
