"""What a task is, and how texts become sequences of one length."""

import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch

from pikv_megatron.checkpoint.tokenizer import Tokenizer
from pikv_megatron.evaluation.task import NOT_JUDGED, Task
from pikv_megatron.evaluation.tasks.prose import sentence


@dataclass(frozen=True)
class Source:
    """What tasks are made of.

    Attributes:
        tokenizer: of the model.
        is_bytewise: it gives every byte a token of its own, as that of the demo model.
        text: a file of the user's to read; None: held-out sources of Python's library.
        lines: a file of JSON lines, where there is one.
    """

    tokenizer: Tokenizer
    is_bytewise: bool
    text: Path | None = None
    lines: Path | None = None

    def encode(self, text: str) -> list[int]:
        """Token ids without special tokens around them."""
        return self.tokenizer.encode(text, add_special_tokens=False)


class TaskKind(ABC):
    """A task; its docstring is what the table of tasks says of it."""

    name: ClassVar[str]
    num_samples: ClassVar[int] = 8  # sequences, where nobody says how many
    is_scored: ClassVar[bool] = True  # whether its accuracy is part of the average

    def unfit(self, source: Source) -> str | None:
        """Why a model cannot be judged by it; None: it can."""
        return "needs a tokenizer of words" if source.is_bytewise else None

    @abstractmethod
    def build(self, source: Source, length: int, num_samples: int, seed: int) -> list[Task]:
        """The sequences, those of one `Task` of one length.

        Raises:
            ValueError: `length` is too short; names the task.
        """


@dataclass(frozen=True)
class Turn:
    """A question, and the pieces of its answer with what stands between them.

    A piece is an answer of its own; `between` is fed and not judged.
    """

    question: str
    pieces: Sequence[str]
    between: str = ","


@dataclass(frozen=True)
class Problem:
    """One sequence, before filler brings it to its length.

    Attributes:
        turns: the first question ends the prompt, all but its last token, so that every answer
            is decoded from what the cache kept; the others are fed behind the first answer.
        facts: what the filler hides, in the order of the text.
        opening: what stands before all.
        asks_later: the first question, too, is fed behind the prompt: when the prompt is
            compressed, nobody knows what will be asked.
    """

    turns: Sequence[Turn]
    facts: Sequence[str] = ()
    opening: str = ""
    asks_later: bool = False


@dataclass
class _Fed:
    """Tokens behind the prompt."""

    ids: list[int] = field(default_factory=list)
    answer: list[int] = field(default_factory=list)

    def add(self, ids: Sequence[int], answer: int = NOT_JUDGED) -> None:
        self.ids += ids
        self.answer += [answer] * len(ids)


class TextTask(TaskKind):
    """A task that is told in sentences."""

    @abstractmethod
    def problem(self, rng: random.Random, length: int) -> Problem:
        """One sequence of about `length` tokens."""

    def filler(self, rng: random.Random, problem: Problem) -> Iterator[str]:
        """What the facts are hidden in, without end."""
        while True:
            yield " " + sentence(rng)

    def build(self, source, length, num_samples, seed):
        drawn = []
        for index in range(num_samples):
            rng = random.Random(f"{self.name}/{seed}/{index}")
            problem = self.problem(rng, length)
            drawn.append((rng, problem, _fed(source, problem)))
        num_fed = max(len(fed.ids) for _, _, fed in drawn)
        ids, answer = [], []
        for rng, problem, fed in drawn:
            # Shorter answers are followed by anything: it is not judged.
            spare = num_fed - len(fed.ids)
            fed.add(source.encode("\n")[:1] * spare)
            ids.append(self._prompt(source, rng, problem, length - num_fed) + fed.ids)
            answer.append(fed.answer)
        return [Task(torch.tensor(ids), torch.tensor(answer))]

    def _prompt(
        self, source: Source, rng: random.Random, problem: Problem, length: int
    ) -> list[int]:
        question = "" if problem.asks_later else problem.turns[0].question
        opening, question = source.encode(problem.opening), source.encode(question)[:-1]
        facts = [source.encode(fact) for fact in problem.facts]
        room = length - len(opening) - len(question) - sum(map(len, facts))
        if room < 0:
            raise ValueError(f"--length is {-room} tokens too short for the task {self.name}")
        filler: list[list[int]] = []
        filled = 0
        for text in self.filler(rng, problem):
            if filled >= room:
                break
            filler.append(source.encode(text)[: room - filled])
            filled += len(filler[-1])
        places = sorted(rng.choices(range(len(filler) + 1), k=len(facts)))
        for place, fact in reversed(list(zip(places, facts))):
            filler.insert(place, fact)
        return opening + [token for piece in filler for token in piece] + question


def _fed(source: Source, problem: Problem) -> _Fed:
    fed, number = _Fed(), 0
    for index, turn in enumerate(problem.turns):
        question = source.encode(turn.question)
        fed.add(question if index or problem.asks_later else question[-1:])
        for place, piece in enumerate(turn.pieces):
            if place:
                fed.add(source.encode(turn.between))
            fed.add(source.encode(piece), number)
            number += 1
    return fed
