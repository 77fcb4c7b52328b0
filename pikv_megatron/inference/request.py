"""What a caller asks of the engine, and the checks before anything is computed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from pikv_megatron.inference.sampling import SamplingParams


@dataclass(frozen=True)
class Request:
    """A prompt to continue.

    Attributes:
        prompt: token ids.
        max_new_tokens: most tokens to generate.
        sampling: how tokens are chosen; default greedy.
        stop: told every new token; what is true ends the sequence.
        draw_index: with the seed, picks the uniform numbers: the place among requests of one seed.
        keep_cache: leave the sequence in the cache when it ends, to be resumed.
        resumes: the ended sequence that the prompt continues; None: a new one.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    sampling: SamplingParams = SamplingParams()
    stop: Callable[[int], object] | None = None
    draw_index: int = 0
    keep_cache: bool = False
    resumes: int | None = None


def as_prompts(input_ids: torch.Tensor | Sequence[Sequence[int]]) -> list[list[int]]:
    """Prompts as lists: from lists (ragged), or from a tensor [b, s] of equally long ones.

    Raises:
        ValueError: there is none, or the tensor has another shape.
    """
    if isinstance(input_ids, torch.Tensor):
        if input_ids.dim() != 2:
            raise ValueError(f"input_ids: expected [b, s], got shape {list(input_ids.shape)}")
        input_ids = input_ids.tolist()
    if not len(input_ids):
        raise ValueError("input_ids: no prompts were given, pass one at least")
    return [list(prompt) for prompt in input_ids]


def check_requests(
    requests: Sequence[Request], cached: Sequence[int], vocab_size: int, max_sequence_length: int
) -> None:
    """Refuse what can't be generated.

    Args:
        requests: prompts and settings.
        cached: tokens that each sequence has from earlier turns.
        vocab_size: ids must be below it.
        max_sequence_length: capacity of a sequence.

    Raises:
        ValueError: names the field, the prompt's place and the remedy.
    """
    for place, (request, past) in enumerate(zip(requests, cached)):
        if request.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {request.max_new_tokens}")
        _check_tokens(place, request.prompt, vocab_size)
        _check_length(place, request, past, max_sequence_length)


def _check_tokens(place: int, prompt: Sequence[int], vocab_size: int) -> None:
    if not prompt:
        raise ValueError(f"prompt {place} is empty: give it a token at least")
    wrong = next((token for token in prompt if not 0 <= token < vocab_size), None)
    if wrong is not None:
        raise ValueError(
            f"prompt {place} has token {wrong}: token ids must be at least 0 and below the "
            f"vocabulary's {vocab_size}"
        )


def _check_length(place: int, request: Request, past: int, max_sequence_length: int) -> None:
    needed = past + len(request.prompt) + request.max_new_tokens - 1  # the last one is never fed
    if needed > max_sequence_length:
        raise ValueError(
            f"max_sequence_length {max_sequence_length}: prompt {place} needs {needed} "
            f"({past} cached, {len(request.prompt)} new, {request.max_new_tokens} to generate); "
            "shorten it or raise max_sequence_length"
        )
