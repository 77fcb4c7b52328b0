"""Choosing the next token from logits, the same on every rank whatever rows it holds.

Shapes: n rows (sequences), vocab token ids.
"""

import torch
from pydantic import BaseModel, ConfigDict, Field


class SamplingParams(BaseModel):
    """How the next token is chosen. The defaults are greedy, with nothing filtered.

    Attributes:
        temperature: divides the logits before drawing; 0 takes the most likely token.
        top_k: draw among this many most likely tokens; 0 for all of them.
        top_p: draw among the most likely tokens that together reach this probability; 1 for all.
        repetition_penalty: positive logits of tokens seen before are divided by it, negative ones
            multiplied; 1 for none.
        seed: picks the uniform numbers.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    temperature: float = Field(0.0, ge=0.0, allow_inf_nan=False)
    top_k: int = Field(0, ge=0)
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    repetition_penalty: float = Field(1.0, gt=0.0, allow_inf_nan=False)
    seed: int = Field(0, ge=0, lt=2**63)

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is always taken, so that no uniform number is read."""
        return self.temperature == 0.0


def sample(
    logits: torch.Tensor,
    params: SamplingParams,
    uniform: torch.Tensor | None = None,
    previous: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose one token a row. Among equal logits the lowest token id comes first.

    A row's token depends on that row and its uniform number only (inverse transform sampling), so
    sequences may be dealt over ranks in any way.

    Args:
        logits: [n, vocab], any floating type.
        params: how to choose.
        uniform: [n], numbers in [0, 1), as `uniform_numbers` makes them; unused when greedy.
        previous: [n, vocab], counts or a mask of the tokens seen before; read only under a
            repetition penalty.

    Returns:
        The tokens, [n], and the natural logarithms of their probabilities, [n], float32. These are
        the model's own: of the raw logits, before penalty, temperature and filters.

    Raises:
        ValueError: `uniform` or `previous` is needed and was not given.
    """
    logits = logits.float()
    scores = _penalise(logits, params.repetition_penalty, previous)
    if params.is_greedy:
        tokens = scores.argmax(dim=-1)
    elif uniform is None:
        raise ValueError(f"temperature {params.temperature} draws tokens: pass uniform numbers")
    else:
        tokens = _draw(*filtered_distribution(scores, params), uniform)
    logprobs = logits.log_softmax(dim=-1).gather(1, tokens[:, None]).squeeze(1)
    return tokens, logprobs


def filtered_distribution(
    scores: torch.Tensor, params: SamplingParams
) -> tuple[torch.Tensor, torch.Tensor]:
    """What tokens are drawn from: temperature, then top-k, then top-p of what top-k left.

    Args:
        scores: [n, vocab], penalised logits.
        params: `temperature` must be positive.

    Returns:
        Probabilities in falling order, [n, vocab], float64, zero (and not renormalised) where
        filtered; and the token ids in that order, [n, vocab].
    """
    ranked, order = scores.sort(dim=-1, descending=True, stable=True)
    if params.top_k:
        ranked[:, params.top_k :] = -torch.inf
    # Relative to the largest, no temperature overflows; a long float32 sum would lose the tail.
    ranked = (ranked - ranked[:, :1]).double() / params.temperature
    probabilities = ranked.softmax(dim=-1)
    if params.top_p < 1.0:
        before = probabilities.cumsum(dim=-1) - probabilities
        before[:, 0] = 0.0  # the most likely token stays, however its own sum was rounded
        probabilities = probabilities.masked_fill(before >= params.top_p, 0.0)
    return probabilities, order


def uniform_numbers(
    seed: torch.Tensor | int, sequences: torch.Tensor, steps: torch.Tensor | int
) -> torch.Tensor:
    """Numbers in [0, 1) that depend on (seed, sequence, step) only, not on the batch or the rank.

    Args:
        seed: [n] or one number, int64, `SamplingParams.seed`.
        sequences: [n], int64, the sequences' indices in the whole batch.
        steps: [n] or one number, int64, how many tokens each sequence has drawn before.

    Returns:
        [n], float64, 53 random bits each.
    """
    state = _mix(_mix(_mix(torch.zeros_like(sequences) + seed) + sequences) + steps)
    return _shift_right(state, 11).double() * 2.0**-53


def _penalise(
    logits: torch.Tensor, penalty: float, previous: torch.Tensor | None
) -> torch.Tensor:
    if penalty == 1.0:
        return logits
    if previous is None:
        raise ValueError(
            f"repetition_penalty {penalty} needs the tokens seen before: pass previous"
        )
    penalised = torch.where(logits < 0, logits * penalty, logits / penalty)
    return torch.where(previous > 0, penalised, logits)


def _draw(
    probabilities: torch.Tensor, order: torch.Tensor, uniform: torch.Tensor
) -> torch.Tensor:
    cumulative = probabilities.cumsum(dim=-1)
    target = uniform[:, None].double() * cumulative[:, -1:]
    ranks = torch.searchsorted(cumulative, target, right=True)
    last = (probabilities > 0).sum(dim=-1, keepdim=True) - 1
    return order.gather(1, torch.minimum(ranks, last)).squeeze(1)


def _mix(state: torch.Tensor) -> torch.Tensor:
    """One step of SplitMix64 on int64 tensors, whose products wrap as unsigned ones do."""
    state = state + _signed(0x9E3779B97F4A7C15)
    state = (state ^ _shift_right(state, 30)) * _signed(0xBF58476D1CE4E5B9)
    state = (state ^ _shift_right(state, 27)) * _signed(0x94D049BB133111EB)
    return state ^ _shift_right(state, 31)


def _shift_right(state: torch.Tensor, bits: int) -> torch.Tensor:
    return (state >> bits) & ((1 << (64 - bits)) - 1)


def _signed(constant: int) -> int:
    return constant - 2**64 if constant >= 2**63 else constant
