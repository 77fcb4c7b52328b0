"""Tasks of the user's: JSON lines as LongBench's files have them (arXiv 2308.14508)."""

import json
from typing import Any

import torch

from pikv_megatron.evaluation.task import Task
from pikv_megatron.evaluation.tasks.base import Source, TaskKind

FIELDS = ("context", "input", "answers")


class JsonLines(TaskKind):
    """`context`, `input` and `answers` a line; the first answer's tokens are judged.

    Not LongBench's own score, which compares generated text. A context that is too long loses its
    middle, as there.
    """

    name = "json_lines"

    def unfit(self, source):
        return None if source.lines is not None else "needs a file: --lines FILE"

    def build(self, source, length, num_samples, seed):
        """The first lines of the file, whatever the seed."""
        try:
            lines = source.lines.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--lines {source.lines}: cannot read it: {error}") from error
        return [
            self._task(source, length, _entry(source, number, line))
            for number, line in enumerate(lines[:num_samples], start=1)
        ]

    def _task(self, source: Source, length: int, entry: dict[str, Any]) -> Task:
        context = source.encode(entry["context"])
        question = source.encode(f"\n\n{entry['input']}\nAnswer:")
        answer = source.encode(f" {entry['answers'][0]}")
        room = length - len(question) - len(answer)
        if room < 2:
            raise ValueError(f"--length {length} is too short for a question of --lines")
        if len(context) > room:
            context = context[: room // 2] + context[len(context) - (room - room // 2) :]
        ids = torch.tensor([context + question + answer])
        return Task(ids, torch.zeros(1, len(answer), dtype=torch.int64))


def _entry(source: Source, number: int, line: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"--lines {source.lines}: line {number}: {error}") from error
    is_object = isinstance(entry, dict) and all(field in entry for field in FIELDS)
    if not is_object or not isinstance(entry["answers"], list) or not entry["answers"]:
        raise ValueError(
            f"--lines {source.lines}: line {number} must have {', '.join(FIELDS)}, and an answer"
        )
    return entry
