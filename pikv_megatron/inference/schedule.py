"""What each sequence feeds in a step: prompts in chunks beside the sequences that decode."""

from collections.abc import Iterable
from dataclasses import dataclass

from pikv_megatron.inference.sequence import LiveSequence


@dataclass(frozen=True)
class Feed:
    """The first `count` pending tokens of a sequence."""

    sequence: LiveSequence
    count: int

    @property
    def tokens(self) -> list[int]:
        return self.sequence.pending[: self.count]

    @property
    def is_whole(self) -> bool:
        """Whether nothing is pending behind it, so that a next token is chosen."""
        return self.count == len(self.sequence.pending)


FeedsByRank = list[list[Feed]]


def schedule(
    sequences: Iterable[LiveSequence], num_ranks: int, prefill_chunk_size: int
) -> FeedsByRank:
    """The feeds of each home rank: one token of every sequence that decodes, and of the prompts, in
    the order given, at most `prefill_chunk_size` tokens in all.

    Example:
        A chunk size of 8, one rank, a sequence that decodes and prompts of 5 and 9 tokens: the
        steps feed 1 + 5 + 3, then 1 + 1 + 6 tokens.
    """
    feeds: FeedsByRank = [[] for _ in range(num_ranks)]
    left = [prefill_chunk_size] * num_ranks
    for sequence in sequences:
        count = len(sequence.pending)
        if not sequence.is_decoding:
            count = min(count, left[sequence.home])
            left[sequence.home] -= count
        if count:
            feeds[sequence.home].append(Feed(sequence, count))
    return feeds
