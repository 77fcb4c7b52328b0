"""Parts of an attention: how they travel, and how they are merged (arXiv 2205.14135).

Legend: n sequences, sq query tokens, np query heads, w width of an output, G ranks.
"""

from collections.abc import Sequence

import torch

from pikv_megatron.ops.merge_states import merge_states
from pikv_megatron.types import AttentionState


def num_words(width: int, dtype: torch.dtype) -> int:
    """Of 4 bytes that a part takes for each query and head: its output and its log-sum-exp."""
    return 1 + (width // 2 if _travels_in_pairs(width, dtype) else width)


def pack_state(state: AttentionState) -> torch.Tensor:
    """[..., w] and [...] -> [..., num_words], float32, so that one collective carries both.

    The output is no more exact than its type: two numbers of 16 bits go as one word.
    """
    out = state.out
    if _travels_in_pairs(out.shape[-1], out.dtype):
        out = out.contiguous().view(torch.float32)
    return torch.cat([out.float(), state.lse.unsqueeze(-1)], dim=-1)


def unpack_states(packed: torch.Tensor, like: torch.Tensor) -> list[AttentionState]:
    """Parts [G, ..., num_words] whose outputs have the width and the type of `like`."""
    outputs = packed[..., :-1]
    if _travels_in_pairs(like.shape[-1], like.dtype):
        outputs = outputs.view(like.dtype)
    return [AttentionState(*part) for part in zip(outputs, packed[..., -1])]


def shard_masses(parts: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """Shares of the whole attention, [n, N], mean over heads.

    Args:
        parts: [G, n, 1, np, 1 + s], each owner's log-sum-exp and what its shards had of its part;
            -inf where it was not asked.
        lse: [n, 1, np], of the whole.
    """
    factor = (parts[..., :1] - lse.unsqueeze(-1)).exp()
    shares = torch.where(factor > 0, parts[..., 1:] * factor, 0.0).mean(dim=(2, 3))
    # Shard s is number s // G of rank s mod G.
    return shares.permute(1, 2, 0).flatten(1)


def merge_parts(states: Sequence[AttentionState]) -> AttentionState:
    """The whole of some parts, in the type of the first."""
    out = torch.stack([state.out.float() for state in states])
    merged = merge_states(out, torch.stack([state.lse for state in states]))
    return AttentionState(merged.out.to(states[0].out.dtype), merged.lse)


def merge_rounds(
    rounds: Sequence[tuple[AttentionState, list[torch.Tensor] | None]]
) -> tuple[AttentionState, list[torch.Tensor] | None]:
    """The whole of what was read in rounds, and the shares of it that the pages of each list have,
    [n, sq, np, m], as of a `PageCodec.attend`; later rounds have read the first list alone."""
    if len(rounds) == 1:
        return rounds[0]
    state = merge_parts([part for part, _ in rounds])
    if rounds[0][1] is None:
        return state, None
    factors = [
        (part.lse - state.lse).exp().masked_fill(part.lse == -torch.inf, 0.0).unsqueeze(3)
        for part, _ in rounds
    ]
    masses = [mass * factors[0] for mass in rounds[0][1]]
    for factor, (_, part) in zip(factors[1:], rounds[1:]):
        masses[0] = masses[0] + part[0] * factor
    return state, masses


def merge_into(state: AttentionState, tokens: slice, part: AttentionState) -> None:
    """Merge a part [1, sq, np, w_v] into the tokens of a state [t, np, w_v]."""
    own = AttentionState(*(x[tokens].unsqueeze(0) for x in state))
    merged = merge_parts([own, part])
    state.out[tokens], state.lse[tokens] = merged.out[0], merged.lse[0]


def _travels_in_pairs(width: int, dtype: torch.dtype) -> bool:
    return dtype.itemsize == 2 and width % 2 == 0
