"""What an owner is told of a decode step's query, besides the query itself.

One row of int32 words for each (query, owner): the sequence's slot, the query's position and the
visited shards where queries are routed, the columns to read where pages are selected, those drawn
by lot and what they count for, those to be fetched for the next step, and the log-sum-exp of the
sequence's last attention where masses are counted.

Legend: n queries, G ranks, N shards, k columns, k' drawn ones, k'' fetched ahead, np query heads.
"""

from typing import NamedTuple

import torch

from pikv_megatron.cache.owner.owner_reads import OwnerReads
from pikv_megatron.parallel.packet import pack_bits, unpack_bits
from pikv_megatron.types import Reads


class HeaderLayout(NamedTuple):
    """Which words a header has: the same on all ranks.

    Attributes:
        num_shards: N where queries are routed, else 0.
        num_columns: k where pages are selected, else 0.
        num_heads: np where masses are counted, else 0.
        num_drawn: k' where pages are drawn by lot, else 0.
        num_ahead: k'' where pages are fetched ahead, else 0.
    """

    num_shards: int
    num_columns: int
    num_heads: int
    num_drawn: int = 0
    num_ahead: int = 0

    @property
    def num_words(self) -> int:
        """Of one row."""
        return sum(self._sizes)

    def pack(
        self, reads: Reads, own: OwnerReads, last_lse: torch.Tensor | None, num_ranks: int
    ) -> torch.Tensor | None:
        """[n, G, words], int32; None where there is nothing to tell.

        Args:
            own: the sequences and the positions of their queries.
            last_lse: [n, G, np], float32, of each owner's last part of the sequence.
            num_ranks: G.
        """
        fields = []
        if self.num_shards:
            who = torch.stack([own.slots, own.positions], dim=1).int()
            told = torch.cat([who, pack_bits(reads.shards)], dim=1)
            fields.append(told.unsqueeze(1).expand(-1, num_ranks, -1))
        if self.num_columns:
            fields.append(reads.columns.int())
        if self.num_drawn:
            weight = reads.log_weight.float().view(torch.int32)
            fields += [reads.drawn.int(), weight.view(-1, 1, 1).expand(-1, num_ranks, -1)]
        if self.num_ahead:
            fields.append(reads.ahead.int())
        if self.num_heads:
            fields.append(last_lse.contiguous().view(torch.int32))
        if not fields:
            return None
        return torch.cat(fields, dim=2)

    def unpack(
        self, header: torch.Tensor | None, reads: OwnerReads
    ) -> tuple[OwnerReads, torch.Tensor | None]:
        """What a header [R, words] asks for, and the log-sum-exps [R, np].

        Args:
            reads: of all rows of all ranks; where queries are routed, others may have come.
        """
        if header is None:
            return reads, None
        told, columns, drawn, ahead, lse = header.split(self._sizes, dim=1)
        if self.num_shards:
            slots, positions = told[:, :2].long().unbind(1)
            visited = unpack_bits(told[:, 2:], self.num_shards)
            reads = OwnerReads(slots, reads.num_columns, visited=visited, positions=positions)
        if self.num_columns:
            reads = reads._replace(columns=columns.long())
        if self.num_drawn:
            weight = drawn[:, -1].contiguous().view(torch.float32)
            reads = reads._replace(drawn=drawn[:, :-1].long(), log_weight=weight)
        if self.num_ahead:
            reads = reads._replace(ahead=ahead.long())
        return reads, lse.contiguous().view(torch.float32) if self.num_heads else None

    @property
    def _sizes(self) -> list[int]:
        """Words of each part of a row."""
        listed = self.num_columns, self._drawn_words, self.num_ahead
        return [self._shard_words, *listed, self.num_heads]

    @property
    def _drawn_words(self) -> int:
        """Columns, and what they count for."""
        return self.num_drawn + 1 if self.num_drawn else 0

    @property
    def _shard_words(self) -> int:
        """A slot, a position, and a bit a shard."""
        return 2 + -(-self.num_shards // 32) if self.num_shards else 0
