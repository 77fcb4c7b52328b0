"""Bytes as token ids, for any tokenizer that gives every byte a token of its own."""

import torch
from torch import Tensor

from pikv_megatron.checkpoint.tokenizer import Tokenizer
from pikv_megatron.demo.tokenizer import NUM_BYTES

# Together these characters hold every byte that UTF-8 can have.
_LEADS = [*range(0x800), *(lead << 12 for lead in range(1, 16)), *(k << 18 for k in range(5))]
_CHARACTERS = "".join(map(chr, [*_LEADS, 0x800, 0x10000]))


class ByteIds:
    """Translates the ids of `demo.corpus` and `demo.recall`, in which token i is byte i.

    Args:
        tokenizer: of the model.

    Raises:
        ValueError: it joins bytes into longer tokens, or names no token that ends a text.
    """

    def __init__(self, tokenizer: Tokenizer):
        if not is_bytewise(tokenizer):
            raise ValueError(
                "tokenizer.json: recall and perplexity a byte need a byte-level tokenizer, one "
                "token a byte and no merges, as that of models/demo"
            )
        raw = list(_CHARACTERS.encode())
        ids = tokenizer.encode(_CHARACTERS, add_special_tokens=False)
        # What is no byte ends a text.
        self._table = torch.full((NUM_BYTES + 1,), tokenizer.eod)
        self._table[torch.tensor(raw)] = torch.tensor(ids)

    def translate(self, tokens: Tensor) -> Tensor:
        """The model's ids for byte ids of any shape."""
        return self._table[tokens.clamp(max=NUM_BYTES)]


def is_bytewise(tokenizer: Tokenizer) -> bool:
    """Whether every byte has a token of its own, and no token has more."""
    raw = list(_CHARACTERS.encode())
    ids = tokenizer.encode(_CHARACTERS, add_special_tokens=False)
    return len(ids) == len(raw) and len(set(zip(raw, ids))) == len(set(raw))
