"""Which shard stores a token, and which rank owns a shard (paper, section 3.1)."""

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict

from pikv_megatron.config import PiKVConfig

# Which earlier replicas a token has is kept in the bits of an integer.
MAX_REPLICA_SHARDS = 32


class Placement(BaseModel):
    """s(t, e) = (floor(t / b) mod N_tok) XOR (e mod N_exp); shard s belongs to rank s mod G.

    With one expert shard nothing is XORed, and N_tok is any multiple of G. The first
    `shard_after` tokens behind the sinks stay on their home rank, in that of its shards which has
    the place of s among its owner's.

    Example:
        N_tok = 4, N_exp = 2, b = 64, G = 2: token 130 of expert 5 has the token hash
        (130 // 64) % 4 = 2 and the expert hash 5 % 2 = 1, so shard 2 ^ 1 = 3, owned by rank 1. If
        it is to stay at home, on rank 0, its shard is 2, like 3 the second one of its owner.
    """

    model_config = ConfigDict(frozen=True)

    token_shards: int
    expert_shards: int
    hash_block: int
    num_ranks: int
    rank: int
    num_sinks: int = 0
    shard_after: int = 0

    @classmethod
    def resolve(cls, config: PiKVConfig, num_ranks: int, rank: int = 0) -> "Placement":
        """The placement of a configuration over G expert-parallel ranks: the one definition of N.

        Raises:
            ValueError: the shards cannot be dealt over the ranks; names both.
        """
        placement = cls(
            token_shards=config.token_shards or num_ranks,
            expert_shards=config.expert_shards,
            hash_block=config.hash_block or config.page_size,
            num_ranks=num_ranks,
            rank=rank,
            num_sinks=config.num_sinks,
            shard_after=config.shard_after,
        )
        placement._check(config.token_shards is None, config.replicas)
        return placement

    @property
    def num_shards(self) -> int:
        """N, shards of a sequence."""
        return max(self.token_shards, self.expert_shards)

    @property
    def shards_per_rank(self) -> int:
        return self.num_shards // self.num_ranks

    @property
    def own_shards(self) -> range:
        """Numbers of the rank's shards."""
        return range(self.rank, self.num_shards, self.num_ranks)

    def shard(self, position: torch.Tensor, expert: torch.Tensor | None) -> torch.Tensor:
        """The shard of each token of this home rank's sequences: position [t], expert [t] or None
        for a layer without experts."""
        shard = (position // self.hash_block) % self.token_shards
        if expert is not None:
            shard = shard ^ (expert % self.expert_shards)
        if self.shard_after == 0 or self.num_ranks == 1:
            return shard
        at_home = self.local_shard(shard) * self.num_ranks + self.rank
        return torch.where(position < self.num_sinks + self.shard_after, at_home, shard)

    def shards_of_experts(self, num_experts: int, device: torch.device) -> torch.Tensor:
        """[E, N], float32: which part of an expert's tokens lies in each shard, all positions
        alike.

        Example:
            One token shard, two expert shards, three experts: 1, 0; 0, 1; 1, 0.
        """
        expert = torch.arange(num_experts, device=device) % self.expert_shards
        shard = torch.arange(self.token_shards, device=device) ^ expert.unsqueeze(1)
        parts = torch.zeros(num_experts, self.num_shards, device=device)
        return parts.scatter_(1, shard, 1 / self.token_shards)

    def tokens_by_shard(self, home: int, length: np.ndarray) -> np.ndarray:
        """[r, N]: tokens [num_sinks, length) of sequences [r] of a home rank, by their shard, where
        experts have no say."""
        sinks, far = self.num_sinks, np.asarray(length)
        if self.shard_after == 0 or self.num_ranks == 1:
            return self._hashed(far) - self._hashed(sinks)
        border = sinks + self.shard_after
        counts = self._hashed(np.maximum(far, border)) - self._hashed(border)
        near = self._hashed(np.minimum(far, border)) - self._hashed(sinks)
        at_home = near.reshape(len(near), self.shards_per_rank, self.num_ranks).sum(axis=2)
        counts[:, home :: self.num_ranks] += at_home
        return counts

    def _hashed(self, length: np.ndarray | int) -> np.ndarray:
        """[..., N]: tokens [0, length) by the hash of their positions."""
        period = self.token_shards * self.hash_block
        whole, rest = np.divmod(np.asarray(length)[..., None], period)
        first = np.arange(self.token_shards) * self.hash_block
        return whole * self.hash_block + np.clip(rest - first, 0, self.hash_block)

    def owner(self, shard: torch.Tensor) -> torch.Tensor:
        return shard % self.num_ranks

    def local_shard(self, shard: torch.Tensor) -> torch.Tensor:
        """The owner's own number of each shard."""
        return shard // self.num_ranks

    def _check(self, is_default: bool, replicas: int) -> None:
        tokens, experts, ranks = self.token_shards, self.expert_shards, self.num_ranks
        source = "null, the expert-parallel size: " if is_default else ""
        if experts > 1 and tokens & (tokens - 1):
            raise ValueError(
                f"token_shards ({source}{tokens}) must be a power of two beside expert_shards "
                f"{experts}, as both hashes are XORed; set it, or expert_shards to 1"
            )
        if self.num_shards % ranks:
            raise ValueError(
                f"expert_parallel_size {ranks} must divide the number of shards "
                f"{self.num_shards}, the larger of token_shards ({source}{tokens}) and "
                f"expert_shards {experts}"
            )
        if replicas > 1 and self.num_shards > MAX_REPLICA_SHARDS:
            raise ValueError(
                f"replicas {replicas} allow at most {MAX_REPLICA_SHARDS} shards, and token_shards "
                f"is {tokens}: lower it"
            )
