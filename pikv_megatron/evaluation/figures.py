"""What is measured of one cache on one task."""

import math
from dataclasses import dataclass
from statistics import mean

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from pikv_megatron.config import PiKVConfig


@dataclass(frozen=True)
class Figures:
    """One cache on one task, all ranks together.

    Attributes:
        num_judged: tokens.
        accuracy: share of them that were the likeliest.
        perplexity: of a judged token, which is a byte.
        divergence: mean Kullback-Leibler divergence of the prediction from the lossless cache's,
            nats.
        pages_read: by layer, share of the pages in shards that a decode step read.
        pages_kept: by layer, share of the pages ever filled that were there in the end.
        step_ms: mean milliseconds of a decode step on the first rank.
    """

    num_judged: int
    accuracy: float
    perplexity: float
    divergence: float
    pages_read: list[float]
    pages_kept: list[float]
    step_ms: float

    @classmethod
    def of(cls, judged: Tensor, pages: list[Tensor], step_seconds: list[float]) -> "Figures":
        """From what `judge` gave, summed, and from read, held, kept and sealed pages."""
        count, right, loss, divergence = judged.tolist()
        read, held, kept, sealed = (counts.double() for counts in pages)
        return cls(
            num_judged=round(count),
            accuracy=right / count,
            perplexity=math.exp(loss / count),
            divergence=divergence / count,
            pages_read=_shares(read, held),
            pages_kept=_shares(kept, sealed),
            step_ms=1000 * mean(step_seconds),
        )


@dataclass(frozen=True)
class Evaluation:
    """One cache on every task.

    Attributes:
        name: of the configuration.
        pikv: the configuration.
        figures: by task.
        allocated_bytes: of all ranks' caches.
        token_bytes: of a token in a sealed page, all layers, scales and metadata included.
        errors: by layer, of keys and of values, by KV head: |x - x^| / |x| of what was sealed.
    """

    name: str
    pikv: PiKVConfig
    figures: dict[str, Figures]
    allocated_bytes: int
    token_bytes: float
    errors: list[list[list[float]]]

    def mean_error(self, side: int) -> float:
        """Of keys (0) or values (1), over layers and heads."""
        return mean(error for layer in self.errors for error in layer[side])


def judge(logprobs: Tensor, targets: Tensor, is_judged: Tensor, reference: Tensor) -> Tensor:
    """Judged tokens, those that were the likeliest, their loss and divergence, summed: [4].

    Args:
        logprobs: [n, t, V].
        targets: [n, t], int64.
        is_judged: [n, t], bool.
        reference: [n, t, V], the lossless cache's.
    """
    logprobs, targets, reference = (x[is_judged] for x in (logprobs, targets, reference))
    is_right = logprobs.argmax(dim=1) == targets
    loss = F.nll_loss(logprobs, targets, reduction="sum")
    divergence = F.kl_div(logprobs, reference, reduction="sum", log_target=True)
    count = torch.tensor(float(len(targets)))
    return torch.stack([count, is_right.sum(), loss, divergence]).double()


def summed(numbers: Tensor, group) -> Tensor:
    """The same over the ranks of `group`; None is one rank."""
    if group is not None:
        numbers = numbers.clone()
        dist.all_reduce(numbers, group=group)
    return numbers


def _shares(part: Tensor, whole: Tensor) -> list[float]:
    """Where there was no page, all of them were read and kept."""
    return torch.where(whole > 0, part / whole.clamp(min=1), 1.0).tolist()
