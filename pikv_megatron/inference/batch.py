"""Drives the engine until a batch is done."""

from collections.abc import Callable, Iterable

from pikv_megatron.inference.engine import Engine
from pikv_megatron.inference.outputs import EngineStep, GenerationOutput, StepOutput
from pikv_megatron.types import Recalled

StepCallback = Callable[[StepOutput], Iterable[int] | None]


def run_batch(
    engine: Engine, ids: list[int], callback: StepCallback | None
) -> tuple[GenerationOutput, int, Recalled]:
    """Step until every sequence has ended.

    Args:
        engine: runs the batch and nothing else.
        ids: the batch's sequences, by prompt.
        callback: told of every step; may return the prompts to cancel.

    Returns:
        What was generated, the number of steps in which nothing of a prompt was fed, and the pages
        that came back to this rank's device in those.
    """
    output = GenerationOutput(
        [[] for _ in ids], [[] for _ in ids], [""] * len(ids), [None] * len(ids)
    )
    num_steps, num_decode_steps, recalled = 0, 0, Recalled()
    while engine.running:
        step = engine.step()
        if not step.num_prompt_tokens:
            num_decode_steps += 1
            recalled += step.recalled
        _append(step, ids, output)
        if callback is not None:
            tokens = [step.token_ids.get(sequence_id) for sequence_id in ids]
            _cancel(engine, ids, callback(StepOutput(num_steps, tokens)) or (), output)
        num_steps += 1
    return output, num_decode_steps, recalled


def _append(step: EngineStep, ids: list[int], output: GenerationOutput) -> None:
    for index, sequence_id in enumerate(ids):
        if sequence_id in step.token_ids:
            output.token_ids[index].append(step.token_ids[sequence_id])
            output.logprobs[index].append(step.logprobs[sequence_id])
        if sequence_id in step.finish_reasons:
            output.finish_reasons[index] = step.finish_reasons[sequence_id]
            output.errors[index] = step.errors.get(sequence_id)


def _cancel(
    engine: Engine, ids: list[int], prompts: Iterable[int], output: GenerationOutput
) -> None:
    """End those of the prompts that still run; others have their reason."""
    for index in sorted(set(prompts)):
        if index in range(len(ids)) and ids[index] in engine.running:
            engine.cancel(ids[index])
            output.finish_reasons[index] = "cancelled"
