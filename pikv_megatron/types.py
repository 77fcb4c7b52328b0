"""Values that travel between the rooms.

Legend: n sequences, sq query tokens, np query heads, ng KV heads, hn head width.
"""

from typing import NamedTuple

from torch import Tensor


class AttentionState(NamedTuple):
    """Softmax attention over a part of the keys, ready to be merged with other parts.

    Attributes:
        out: [n, sq, np, hn], the part's own normalised output; 0 where it has no key.
        lse: [n, sq, np], float32, natural log of the sum of exponentials; -inf without keys.
    """

    out: Tensor
    lse: Tensor
