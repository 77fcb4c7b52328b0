"""What a caller asks of the engine, and the checks before anything is computed."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch

from pikv_megatron.inference.sampling import SamplingParams

ENCODE = "encode texts with the model's tokenizer first"


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
    """Prompts as lists: from lists (ragged), or from tensors, [b, s] or one [s] each.

    Raises:
        ValueError: there is none, or one is no list of token ids.
    """
    if isinstance(input_ids, torch.Tensor):
        if input_ids.dim() != 2:
            raise ValueError(f"input_ids: expected [b, s], got shape {list(input_ids.shape)}")
        input_ids = input_ids.tolist()
    if isinstance(input_ids, str) or not isinstance(input_ids, Iterable):
        raise ValueError(f"input_ids: expected lists of token ids, got {input_ids!r}: {ENCODE}")
    prompts = [_as_prompt(place, prompt) for place, prompt in enumerate(input_ids)]
    if not prompts:
        raise ValueError("input_ids: no prompts were given, pass one at least")
    return prompts


def _as_prompt(place: int, prompt: Any) -> list[int]:
    if isinstance(prompt, Integral):
        raise ValueError(
            f"input_ids: prompt {place} is the number {prompt}: give a list of prompts, each a "
            "list of token ids"
        )
    if isinstance(prompt, str) or not isinstance(prompt, Iterable):
        raise ValueError(f"input_ids: prompt {place} is {prompt!r}: {ENCODE}")
    tokens = prompt.tolist() if isinstance(prompt, torch.Tensor) else list(prompt)
    wrong = [token for token in tokens if not _is_integer(token)]
    if wrong:
        raise ValueError(f"input_ids: prompt {place} holds {wrong[0]!r}, which is no token id")
    return [int(token) for token in tokens]


def _is_integer(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


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
        if not _is_integer(request.max_new_tokens) or request.max_new_tokens < 1:
            raise ValueError(
                f"max_new_tokens must be a whole number, at least 1, got {request.max_new_tokens!r}"
            )
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
