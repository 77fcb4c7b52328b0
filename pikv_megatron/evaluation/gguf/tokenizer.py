"""`tokenizer.json` from the metadata of a GGUF file."""

from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

CONTROL = 3  # the type of special tokens in `tokenizer.ggml.token_type`
# By `tokenizer.ggml.pre`: what is cut before the byte-level rule of GPT-2 cuts the rest.
FIRST_CUTS = {
    "gpt-2": [],
    "smollm": [pre_tokenizers.Digits(individual_digits=True)],
}


def tokenizer_of(metadata: Mapping[str, Any]) -> Tokenizer:
    """The byte-pair tokenizer that the fields describe.

    Raises:
        ValueError: it is of another kind, or cuts text in a way that is not known here.
    """
    kind, cut = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind != "gpt2" or cut not in FIRST_CUTS:
        raise ValueError(
            f"tokenizer.ggml.model = {kind!r} with tokenizer.ggml.pre = {cut!r} is not supported: "
            f"only 'gpt2' with {', '.join(FIRST_CUTS)} is"
        )
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*FIRST_CUTS[cut], pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = metadata["tokenizer.ggml.token_type"]
    special = [token for token, kind in zip(tokens, types) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    return tokenizer
