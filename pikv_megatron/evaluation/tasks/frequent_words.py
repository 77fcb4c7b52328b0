"""Frequent words, an aggregation shape of RULER (arXiv 2404.06654)."""

from pikv_megatron.evaluation.tasks.common_words import CommonWords
from pikv_megatron.evaluation.tasks.prose import NAMES


class FrequentWords(CommonWords):
    """The three most frequent words where frequencies fall as 1 / rank squared (Zipf)."""

    name = "frequent_words"
    weights = [1 / rank**2 for rank in range(1, len(NAMES) + 1)]
