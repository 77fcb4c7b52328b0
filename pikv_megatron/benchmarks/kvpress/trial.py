"""One contestant on one task: prompts are compressed, and what follows is fed and judged.

Legend: L tokens of a sequence, P of its prompt, T = L - P.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from pikv_megatron.bridges.kvpress import PiKVPress, cache_positions
from pikv_megatron.evaluation.task import Task


@dataclass
class Score:
    """Sums over sequences.

    Attributes:
        num_answers: that were asked for.
        num_right: those whose tokens were all the likeliest.
        held_bytes: of what was left of the prompts.
        dense_bytes: of the prompts as computed.
    """

    num_answers: int = 0
    num_right: int = 0
    held_bytes: float = 0.0
    dense_bytes: float = 0.0


@torch.no_grad()
def run(model: torch.nn.Module, press: Any, tasks: list[Task]) -> Score:
    """All sequences, one by one; without a press, the cache as computed."""
    score = Score()
    for task in tasks:
        for ids, answer in zip(task.ids, task.answer):
            logits = _logits(model, press, ids, task.prompt_len, score)
            is_right = logits.argmax(dim=1) == ids[task.prompt_len :].to(logits.device)
            for number in answer[answer >= 0].unique().tolist():
                score.num_answers += 1
                score.num_right += bool(is_right[answer == number].all())
    return score


def _logits(
    model: torch.nn.Module, press: Any, ids: torch.Tensor, prompt_len: int, score: Score
) -> torch.Tensor:
    """[T, vocab], of the tokens behind the prompt, all but the first from what is left of it."""
    cache, ids = DynamicCache(), ids.unsqueeze(0).to(model.device)
    with cache_positions(model):
        with nullcontext() if press is None else press(model):
            hidden = model.model(
                input_ids=ids[:, :prompt_len], past_key_values=cache
            ).last_hidden_state[:, -1:]
        _count(model, press, cache, prompt_len, score)
        last = model.lm_head(hidden)
        positions = torch.arange(prompt_len, ids.shape[1] - 1, device=ids.device).unsqueeze(0)
        if not positions.numel():
            return last[0]
        behind = model(
            input_ids=ids[:, prompt_len:-1], past_key_values=cache, position_ids=positions
        ).logits
    return torch.cat([last, behind], dim=1)[0]


def _count(
    model: torch.nn.Module, press: Any, cache: DynamicCache, prompt_len: int, score: Score
) -> None:
    token = sum(2 * layer.keys[:, :, :1].nbytes for layer in cache.layers)
    score.dense_bytes += token * prompt_len
    if isinstance(press, PiKVPress):
        score.held_bytes += press.held_bytes
        return
    held = sum(2 * layer.keys.nbytes for layer in cache.layers)
    for number, layer in enumerate(model.model.layers):
        # Some presses leave tokens in the cache and hide them from the attention, head by head.
        hidden = getattr(layer.self_attn, "masked_key_indices", None)
        if press is not None and hidden is not None:
            keys = cache.layers[number].keys
            held -= 2 * len(hidden[0]) * keys.shape[3] * keys.element_size()
    score.held_bytes += held
