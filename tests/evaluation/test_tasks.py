"""Every task gives sequences of the length asked for, the same for the same seed, that hold what
they ask for."""

import json
import random
from pathlib import Path

import pytest
import torch
from tiny_directory import EOS, byte_tokenizer

from pikv_megatron.checkpoint.tokenizer import Tokenizer
from pikv_megatron.evaluation.task import NOT_JUDGED, Task
from pikv_megatron.evaluation.tasks.base import Source, TextTask
from pikv_megatron.evaluation.tasks.greedy import MOST_FREE
from pikv_megatron.evaluation.tasks.prose import NAMES, names, sentence
from pikv_megatron.evaluation.tasks.registry import TASKS

TOKENIZER = Tokenizer(byte_tokenizer(), eos_ids=[EOS])
# Bytes are words that are short: enough to build all tasks.
SOURCE = Source(TOKENIZER, is_bytewise=False)
BYTES = Source(TOKENIZER, is_bytewise=True)
LENGTH, SAMPLES = 3000, 2
TOLD = [name for name, kind in TASKS.items() if isinstance(kind, TextTask)]
# Their answers are counted, or are told behind the prompt.
NOT_TOLD = {"common_words", "frequent_words", "state"}


def build(name: str, source: Source = SOURCE, seed: int = 0) -> Task:
    (task,) = TASKS[name].build(source, LENGTH, SAMPLES, seed)
    return task


def source_of(name: str) -> Source:
    return SOURCE if TASKS[name].unfit(BYTES) else BYTES


@pytest.mark.parametrize("name", [name for name in TASKS if name != "json_lines"])
def test_a_seed_gives_sequences_of_one_length(name):
    task, again, other = (build(name, source_of(name), seed) for seed in (0, 0, 1))
    assert task.ids.shape == (SAMPLES, LENGTH) and task.answer.shape[0] == SAMPLES
    assert torch.equal(task.ids, again.ids) and torch.equal(task.answer, again.answer)
    assert not torch.equal(task.ids, other.ids)
    assert task.is_judged.any(1).all() and 0 < task.prompt_len < LENGTH
    assert task.is_free == (name == "greedy")


@pytest.mark.parametrize("name", TOLD)
def test_what_is_judged_are_the_answers_and_the_prompt_holds_them(name):
    kind, task = TASKS[name], build(name)
    # What is judged first is decoded, behind a token that is not.
    assert bool((task.answer[:, 0] == NOT_JUDGED).all())
    for index, (ids, answer) in enumerate(zip(task.ids, task.answer)):
        problem = kind.problem(random.Random(f"{name}/0/{index}"), LENGTH)
        pieces = [piece for turn in problem.turns for piece in turn.pieces]
        behind = ids[task.prompt_len :]
        found = [TOKENIZER.decode(behind[answer == i].tolist()) for i in range(len(pieces))]
        assert found == pieces and answer.max() == len(pieces) - 1
        prompt = TOKENIZER.decode(ids[: task.prompt_len].tolist())
        assert all(fact in prompt for fact in problem.facts)
        assert prompt.startswith(problem.opening)
        assert problem.asks_later or prompt.endswith(problem.turns[0].question[:-1])
        if name not in NOT_TOLD:
            assert all(piece.strip() in prompt for piece in pieces)


def test_states_follow_from_what_was_said_last():
    text = TOKENIZER.decode(build("state").ids[0].tolist())
    held, right = {}, 0
    for line in text.split("\n"):
        words = line.replace(".", "").split()
        if line.startswith("Look"):
            right += held[words[3]] == words[-1]
        elif " box holds " in line:
            held[words[words.index("box") - 1]] = words[words.index("holds") + 1]
    assert right == TASKS["state"].num_changes


def test_frequencies_of_words_are_as_asked():
    for name in ("common_words", "frequent_words"):
        task = build(name)
        words = TOKENIZER.decode(task.ids[0, : task.prompt_len].tolist()).split()
        counts = sorted(NAMES, key=words.count, reverse=True)[:3]
        behind = task.ids[0, task.prompt_len :]
        found = [TOKENIZER.decode(behind[task.answer[0] == i].tolist()).strip() for i in range(3)]
        assert set(found) == set(counts)


def test_names_are_no_words_of_the_filler():
    rng = random.Random(0)
    words = {word.strip(".") for _ in range(2000) for word in sentence(rng).split()}
    assert not words & set(NAMES)
    assert len(set(names(rng, 200))) == 200


def test_text_counts_the_second_half_or_512_tokens(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(chr(97 + i % 26) for i in range(2000)))
    own = Source(TOKENIZER, is_bytewise=False, text=path)
    (task,) = TASKS["text"].build(own, 300, 3, 0)
    assert task.ids.shape == (3, 300) and task.prompt_len == 150 and task.is_judged.all()
    assert TOKENIZER.decode(task.ids[0, :5].tolist()) == "abcde"
    (task,) = TASKS["text"].build(own, 1600, 1, 0)
    assert task.prompt_len == 1600 - 512
    (task,) = TASKS["greedy"].build(own, 1600, 1, 0)
    assert task.answer.shape[1] == MOST_FREE
    with pytest.raises(ValueError, match="--text: 2001 tokens are fewer than --length 5000"):
        TASKS["text"].build(own, 5000, 1, 0)


def lines_of(folder: Path, *entries: dict) -> Source:
    path = folder / "lines.jsonl"
    path.write_text("\n".join(map(json.dumps, entries)))
    return Source(TOKENIZER, is_bytewise=True, lines=path)


def test_json_lines_lose_the_middle_of_what_is_too_long(tmp_path):
    short = {"context": "It is red.", "input": "Colour?", "answers": ["red", "crimson"]}
    long = {"context": "a" * 500 + "b" * 500, "input": "What?", "answers": ["b"]}
    parts = TASKS["json_lines"].build(lines_of(tmp_path, short, long, short), 100, 2, 0)
    texts = [TOKENIZER.decode(part.ids[0].tolist()) for part in parts]
    assert texts[0] == "It is red.\n\nColour?\nAnswer: red"
    assert len(parts) == 2 and len(texts[1]) == 100
    assert abs(texts[1].count("a") - texts[1].count("b")) <= 1
    assert [part.answer.tolist() for part in parts] == [[[0] * 4], [[0] * 2]]


@pytest.mark.parametrize(
    "entry, message",
    [
        ({"context": "c", "input": "i"}, "line 1 must have context, input, answers"),
        ({"context": "c", "input": "i", "answers": []}, "line 1 must have"),
        ({"context": "c", "input": "i" * 99, "answers": ["a"]}, "--length 100 is too short"),
    ],
)
def test_refuses_json_lines(tmp_path, entry, message):
    with pytest.raises(ValueError, match=message):
        TASKS["json_lines"].build(lines_of(tmp_path, entry), 100, 2, 0)


@pytest.mark.parametrize("name", [*TOLD, "recall"])
def test_refuses_what_is_too_short(name):
    with pytest.raises(ValueError, match=f"--length .* too short for the task {name}"):
        TASKS[name].build(source_of(name), 8, 1, 0)


def test_says_which_tasks_fit_which_tokenizer():
    fit = {name for name, kind in TASKS.items() if kind.unfit(BYTES) is None}
    assert fit == {"recall", "text", "greedy"}
    assert "byte-level" in TASKS["recall"].unfit(SOURCE)
    assert "--lines" in TASKS["json_lines"].unfit(SOURCE)
