"""What is measured of one cache on one task."""

import math
from dataclasses import dataclass, field
from typing import Any

from pikv_megatron.config import PiKVConfig


@dataclass(frozen=True)
class Figures:
    """One cache on one task, all ranks together.

    Attributes:
        num_answers: how many were asked for.
        exact: share of them that were right to the last token, as greedy text would have been.
        num_judged: tokens of the answers.
        accuracy: share of the tokens that were the likeliest.
        perplexity: of a judged token.
        divergence: mean Kullback-Leibler divergence of the prediction from the lossless cache's,
            nats.
        agreed_tokens: mean tokens of a sequence until the likeliest one is not the judged one; of
            greedy text, until it leaves the lossless cache's.
        pages_read: by layer, share of the pages in shards that a decode step read.
        pages_kept: by layer, share of the pages ever filled that were there in the end.
        mass_read: by layer, share of the true attention over all tokens that a decode step read,
            windows included.
        held_bytes: of the rank whose cache is largest, metadata included.
        dense_bytes: of one dense cache of the sequences, in bfloat16.
        read_bytes: of a decode step and sequence, all layers: windows, pages, sketches.
        dense_read_bytes: the same over the dense cache.
        token_bytes: of a token in a sealed page, all layers, scales and metadata included.
        errors: by layer, of keys and of values, by KV head: |x - x^| / |x| of what was sealed.
        sent_bytes: that a rank hands to the cache's collectives in a decode step, mean over ranks
            and flush intervals, its share for itself included; 0 on one rank.
        step_ms: mean milliseconds of a decode step; on CPUs of a rank's processor, waiting left
            out, as other programs may share it. 0 where no step was timed.
        batch_size: sequences that a step feeds.
        tokens_by_shard: by layer and shard, held in the end.
        kept_by_position: by layer and part of the sequence, share of the tokens that left the
            window that were there in the end; -1 where none left it.
        tokens_by_expert: by expert and shard, of prompts, all layers together.
        bounds: by layer, the largest share of a query's attention that may not have been read;
            empty where nothing is certified.
    """

    num_answers: int
    exact: float
    num_judged: int
    accuracy: float
    perplexity: float
    divergence: float
    agreed_tokens: float
    pages_read: list[float]
    pages_kept: list[float]
    mass_read: list[float]
    held_bytes: int
    dense_bytes: int
    read_bytes: float
    dense_read_bytes: float
    token_bytes: float
    errors: list[list[list[float]]]
    sent_bytes: float
    step_ms: float
    batch_size: int
    tokens_by_shard: list[list[int]]
    kept_by_position: list[list[float]]
    tokens_by_expert: list[list[int]]
    bounds: list[float] = field(default_factory=list)

    @property
    def held_share(self) -> float:
        """Of the largest rank's cache in a dense one."""
        return self.held_bytes / self.dense_bytes

    @property
    def read_share(self) -> float:
        """Of what a step reads in what it reads of a dense cache."""
        return self.read_bytes / self.dense_read_bytes

    @property
    def mean_mass(self) -> float:
        """`mass_read` over layers."""
        return sum(self.mass_read) / len(self.mass_read)

    def mean_error(self, side: int) -> float:
        """Of keys (0) or values (1), over layers and heads."""
        errors = [error for layer in self.errors for error in layer[side]]
        return sum(errors) / len(errors)


@dataclass(frozen=True)
class Record:
    """A configuration on a task.

    Attributes:
        name: of the configuration.
        task: its name.
        pikv: the configuration.
        figures: what was measured.
    """

    name: str
    task: str
    pikv: dict[str, Any]
    figures: Figures

    @classmethod
    def of(cls, name: str, task: str, pikv: PiKVConfig, figures: Figures) -> "Record":
        """Of a configuration."""
        return cls(name, task, pikv.model_dump(mode="json"), figures)


def change(figures: Figures, reference: Figures) -> float:
    """Of the perplexity over the lossless cache's; 0.01 is a percent."""
    return math.exp(math.log(figures.perplexity) - math.log(reference.perplexity)) - 1
