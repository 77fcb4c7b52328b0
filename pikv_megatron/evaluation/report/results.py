"""`results.json`: a record of each configuration and task, so that none is measured twice."""

import hashlib
import json
import os
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from pikv_megatron.config import PiKVConfig
from pikv_megatron.evaluation.figures import Figures, Record
from pikv_megatron.evaluation.options import EvaluateOptions

# What a record holds: one of other figures is measured anew.
MEASURED = [field.name for field in fields(Figures)]
EDGE_BYTES = 2**16  # of a weight file, that tell one model from another


class Results:
    """Records by what they were measured with.

    Args:
        path: of the file; None: records are not kept.
        settings: of this run, as JSON: what a record depends on besides cache and task.

    Raises:
        ValueError: the file is there and holds something else.
    """

    def __init__(self, path: Path | None, settings: dict[str, Any]):
        self._path, self._settings = path, settings
        self._records: dict[str, dict[str, Any]] = {}
        if path is not None and path.is_file():
            try:
                self._records = {
                    record["key"]: record for record in json.loads(path.read_text())["records"]
                }
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}: is not the results of an evaluation: remove it, or name another --out"
                ) from error

    def find(self, name: str, task: str, pikv: PiKVConfig) -> Record | None:
        """What was measured, under whatever name."""
        found = self._records.get(self._key(task, pikv))
        if found is None:
            return None
        return Record(name, task, found["pikv"], Figures(**found["figures"]))

    def add(self, record: Record, pikv: PiKVConfig, provenance: dict[str, Any]) -> None:
        """Keep a record at once, with where and how it was measured."""
        key = self._key(record.task, pikv)
        self._records[key] = {
            "key": key, "settings": self._settings, **provenance, **asdict(record)
        }
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self._path.with_suffix(".part")
        text = json.dumps({"records": list(self._records.values())}, indent=1)
        unfinished.write_text(text + "\n", encoding="utf-8")
        os.replace(unfinished, self._path)

    def _key(self, task: str, pikv: PiKVConfig) -> str:
        return _digest([MEASURED, self._settings, task, pikv.model_dump(mode="json")])


def settings_of(options: EvaluateOptions, num_ranks: int) -> dict[str, Any]:
    """What a record depends on besides cache and task."""
    files = options.source.text, options.source.lines
    return {
        "model": {
            path.name: _weights(path) for path in sorted(options.model.iterdir())
            if path.suffix == ".safetensors" or path.name in ("config.json", "tokenizer.json")
        },
        "dtype": str(options.dtype).removeprefix("torch."),
        "expert_parallel_size": num_ranks,
        "length": options.length,
        "samples": options.samples,
        "seed": options.seed,
        "batch_size": options.batch_size,
        "files": [None if path is None else _digest(path.read_text()) for path in files],
    }


def _weights(path: Path) -> str:
    """Tells files apart without reading all of them."""
    size = path.stat().st_size
    with path.open("rb") as file:
        edges = file.read(EDGE_BYTES)
        file.seek(max(0, size - EDGE_BYTES))
        edges += file.read()
    return f"{size}-{hashlib.sha256(edges).hexdigest()[:12]}"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
