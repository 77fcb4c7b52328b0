"""The sequences of one `generate` call, and the checks before anything is computed."""

from dataclasses import dataclass, field
from typing import Sequence

import torch

from pikv_megatron.cache.step_plan import CachedSequence


@dataclass
class LiveSequence:
    """A prompt and what was generated for it. Every rank keeps all of them.

    Attributes:
        index: the prompt's place in the batch.
        home: home rank in the expert-parallel group.
        cached: its part of the cache.
        pending: tokens to be fed: the prompt at first, then the token chosen last.
        history: tokens of earlier turns and of this one's prompt, for the repetition penalty.
        token_ids: the new tokens.
        logprobs: their natural log-probabilities.
        finish_reason: "stop", "length" or "cancelled"; empty while it runs.
    """

    index: int
    home: int
    cached: CachedSequence
    pending: list[int]
    history: list[int]
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str = ""

    def next_turn(self, tokens: list[int]) -> "LiveSequence":
        """The same cached sequence with new tokens; the last one chosen is still to be fed."""
        pending = self.pending + tokens
        return LiveSequence(
            self.index, self.home, self.cached, pending, self.history + self.token_ids + tokens
        )

    def take(self, token_id: int, logprob: float) -> None:
        self.token_ids.append(token_id)
        self.logprobs.append(logprob)
        self.pending = [token_id]


def as_prompts(input_ids: torch.Tensor | Sequence[Sequence[int]]) -> list[list[int]]:
    """Prompts as lists: from lists (ragged), or from a tensor [b, s] of equally long ones."""
    if isinstance(input_ids, torch.Tensor):
        if input_ids.dim() != 2:
            raise ValueError(f"input_ids: expected [b, s], got shape {list(input_ids.shape)}")
        return input_ids.tolist()
    return [list(prompt) for prompt in input_ids]


def check_prompts(
    prompts: list[list[int]], max_new_tokens: int, vocab_size: int, cached: list[int],
    max_sequence_length: int,
) -> None:
    """Refuse what can't be generated.

    Args:
        prompts: token ids.
        max_new_tokens: tokens to generate for each.
        vocab_size: ids must be below it.
        cached: tokens that each sequence has in the cache.
        max_sequence_length: capacity of a sequence.

    Raises:
        ValueError: names the field, the prompt and the remedy.
    """
    if not prompts:
        raise ValueError("input_ids: no prompts were given")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    for index, (prompt, past) in enumerate(zip(prompts, cached)):
        if not prompt:
            raise ValueError(f"input_ids: prompt {index} is empty")
        wrong = [token for token in prompt if not 0 <= token < vocab_size]
        if wrong:
            raise ValueError(
                f"input_ids: prompt {index} has token {wrong[0]}, the vocabulary {vocab_size}"
            )
        needed = past + len(prompt) + max_new_tokens - 1
        if needed > max_sequence_length:
            raise ValueError(
                f"max_sequence_length {max_sequence_length}: prompt {index} needs {needed} "
                f"({past} cached, {len(prompt)} new, {max_new_tokens} to generate); shorten it "
                "or raise max_sequence_length"
            )
