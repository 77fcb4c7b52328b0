"""The next tokens of sequences whose settings differ.

Legend: n sequences, vocab token ids.
"""

from collections import defaultdict
from collections.abc import Sequence

import torch

from pikv_megatron.inference.sampling import SamplingParams, sample, uniform_numbers
from pikv_megatron.inference.sequence import LiveSequence


def choose_tokens(sequences: Sequence[LiveSequence], logits: torch.Tensor) -> torch.Tensor:
    """Choose a token for every row of logits [n, vocab]: one pass for each distinct setting.

    Returns:
        [n, 2], float64: token and log-probability.
    """
    chosen = torch.empty(len(sequences), 2, dtype=torch.float64, device=logits.device)
    for sampling, rows in _rows_by_setting(sequences).items():
        index = torch.tensor(rows, device=logits.device)
        own, scores = [sequences[row] for row in rows], logits[index]
        uniform = None if sampling.is_greedy else _uniform(own).to(logits.device)
        previous = None
        if sampling.repetition_penalty != 1.0:
            previous = _previous(own, scores)
        chosen[index] = torch.stack(sample(scores, sampling, uniform, previous), 1).double()
    return chosen


def _rows_by_setting(sequences: Sequence[LiveSequence]) -> dict[SamplingParams, list[int]]:
    """Rows that are sampled together; their seeds may differ."""
    rows = defaultdict(list)
    for row, sequence in enumerate(sequences):
        rows[sequence.request.sampling.model_copy(update={"seed": 0})].append(row)
    return rows


def _uniform(sequences: Sequence[LiveSequence]) -> torch.Tensor:
    """[n] numbers, by seed, place and tokens drawn: the same wherever a sequence is run."""
    columns = [(s.request.sampling.seed, s.request.draw_index, s.num_new) for s in sequences]
    return uniform_numbers(*torch.tensor(columns, dtype=torch.int64).unbind(1))


def _previous(sequences: Sequence[LiveSequence], logits: torch.Tensor) -> torch.Tensor:
    """[n, vocab], bool: the tokens that a sequence has already."""
    previous = torch.zeros(logits.shape, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        previous[row, torch.tensor(sequence.history)] = True
    return previous.to(logits.device)
