"""Batches of the recall task are what they claim to be."""

import pytest

from pikv_megatron.demo.recall import (
    MARK,
    PAIR_LEN,
    SYMBOLS,
    RecallBatch,
    drill,
    needles,
    recall_rng,
)

TEXT = b"@decorated\ndef read(path):\n    return path @ path\n" * 4
LENGTH, NUM_PAIRS, NUM_QUERIES = 257, 12, 5


def some_needles(index: int = 0, held_out: bool = True) -> RecallBatch:
    rng = recall_rng(0, index, held_out)
    return needles(rng, 3, LENGTH, NUM_PAIRS, NUM_QUERIES, TEXT)


def test_every_answer_was_told_where_source_says():
    for batch in (some_needles(), drill(recall_rng(0, 0, True), 3, 64, 8)):
        for row, column in batch.is_answer.nonzero().tolist():
            told = batch.source[row, column]
            assert 0 < told < column
            assert batch.ids[row, column] == batch.ids[row, told]
            assert batch.ids[row, column - 1] == batch.ids[row, told - 1]


def test_questions_stand_at_the_end():
    batch = some_needles()
    expected = [LENGTH - PAIR_LEN * i + 2 for i in range(NUM_QUERIES, 0, -1)]
    for row in batch.is_answer:
        assert row.nonzero().flatten().tolist() == expected


def test_marks_stand_before_pairs_only():
    for row in some_needles().ids.tolist():
        marks = [i for i, token in enumerate(row) if token == MARK]
        assert len(marks) == NUM_PAIRS + NUM_QUERIES
        keys = [row[mark + 1] for mark in marks]
        assert len(set(keys)) == NUM_PAIRS
        for mark in marks:
            assert row[mark + 1] in SYMBOLS and row[mark + 2] in SYMBOLS
            assert row[mark + 3] == ord(";")


def test_a_drill_asks_for_every_key_told_before():
    batch = drill(recall_rng(0, 0, True), 2, 64, 8)
    for row, is_answer in zip(batch.ids.tolist(), batch.is_answer.tolist()):
        keys = row[::2]
        assert is_answer[1::2] == [key in keys[:i] for i, key in enumerate(keys)]
        assert not any(is_answer[::2])


def test_seeds_decide_and_held_out_ones_differ():
    assert some_needles().ids.equal(some_needles().ids)
    assert not some_needles(index=1).ids.equal(some_needles(index=2).ids)
    assert not some_needles(held_out=True).ids.equal(some_needles(held_out=False).ids)


@pytest.mark.parametrize(
    "length, num_pairs, num_queries, message",
    [
        (67, 12, 5, "take 68 tokens, length is 67"),
        (999, len(SYMBOLS) + 1, 1, "num_pairs"),
        (999, 4, 5, "num_queries 5"),
        (999, 4, 0, "num_queries 0"),
    ],
)
def test_needles_that_cannot_be_are_refused(length, num_pairs, num_queries, message):
    with pytest.raises(ValueError, match=message):
        needles(recall_rng(0, 0, True), 1, length, num_pairs, num_queries, TEXT)


@pytest.mark.parametrize("length, num_pairs", [(63, 8), (64, 0), (64, len(SYMBOLS) + 1)])
def test_drills_that_cannot_be_are_refused(length, num_pairs):
    with pytest.raises(ValueError, match="even length"):
        drill(recall_rng(0, 0, True), 1, length, num_pairs)
