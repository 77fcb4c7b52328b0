"""One open page for each group; a group that fills up gives a full page.

Legend: G groups (the last one takes padding), S tokens a page, t tokens of a block, c full pages.
"""

from typing import Mapping

import torch
import torch.nn.functional as F

from pikv_megatron.cache.pages.ledger import Admission, PageLedger


class TokenBuffers:
    """Circular buffers of S tokens, one a group: insertion costs O(1) a token (paper, 3.1).

    Args:
        ledger: numbers what is inserted.
        heads: width [ng, hn] of the tensors that have heads, by name: [ng, G, S, hn], as computed.
        metadata: type of the tensors that have none, by name: [G, S].
        dtype: type of the former.

    Attributes:
        ledger: as given.
        tensors: all of them by name.
    """

    def __init__(
        self, ledger: PageLedger, heads: Mapping[str, tuple[int, int]],
        metadata: Mapping[str, torch.dtype], dtype: torch.dtype, device: torch.device,
    ):
        self.ledger = ledger
        groups, size = ledger.padding_group + 1, ledger.page_size
        self.tensors = {
            name: torch.zeros(num_heads, groups, size, width, dtype=dtype, device=device)
            for name, (num_heads, width) in heads.items()
        } | {
            name: torch.zeros(groups, size, dtype=kind, device=device)
            for name, kind in metadata.items()
        }

    def insert(
        self, admission: Admission, tokens: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Append tokens to their groups.

        Args:
            admission: where they go.
            tokens: by name, [ng, t, hn] or [t].

        Returns:
            The pages that became full, by name, [ng, c, S, hn] or [c, S].
        """
        self.ledger.count(admission)
        pages = {}
        if admission.is_page.numel():
            pages = {
                name: _assemble(self.tensors[name], new, admission) for name, new in tokens.items()
            }
        place = admission.buffer, admission.offset
        for name, new in tokens.items():
            index = (slice(None),) * _group_dim(self.tensors[name]) + place
            self.tensors[name][index] = new.to(self.tensors[name].dtype)
        return pages

    def lens(self, group: torch.Tensor) -> torch.Tensor:
        """Tokens in the open page of each group [...]."""
        return self.ledger.num_tokens[group] % self.ledger.page_size


def _group_dim(buffers: torch.Tensor) -> int:
    return 1 if buffers.dim() == 4 else 0


def _assemble(
    buffers: torch.Tensor, tokens: torch.Tensor, admission: Admission
) -> torch.Tensor:
    """Full pages of a block: what the buffers held, then the block's tokens."""
    dim = _group_dim(buffers)
    pages = buffers.index_select(dim, F.pad(admission.page_group, (0, 1)))  # one more: lost writes
    page = torch.where(admission.page < 0, pages.shape[dim] - 1, admission.page)
    pages[(slice(None),) * dim + (page, admission.offset)] = tokens.to(pages.dtype)
    return pages.narrow(dim, 0, pages.shape[dim] - 1)
