"""The PiKV caches that a benchmark is given, by name."""

import math
import os
from pathlib import Path
from typing import Mapping, Sequence

from pikv_megatron.cache.placement import Placement
from pikv_megatron.config import PiKVConfig
from pikv_megatron.presets import preset_files


def read_caches(texts: Sequence[str], taken: Sequence[str]) -> dict[str, PiKVConfig]:
    """Read `--pikv`: each cache is named as its file is, without the ending.

    Args:
        texts: names of presets, or paths.
        taken: names of other contestants.

    Raises:
        ValueError: a name is taken, or a cache is no valid one for the ranks that were launched.
    """
    caches: dict[str, PiKVConfig] = {}
    presets = preset_files()
    for text in texts:
        path = presets.get(text, Path(text))
        if path.stem in (*taken, *caches):
            raise ValueError(f"--pikv {text}: another contestant is named {path.stem!r}, too")
        caches[path.stem] = _read_cache(path)
    return caches


def flush_interval(caches: Mapping[str, PiKVConfig]) -> int:
    """Steps after which every cache has flushed a whole number of times."""
    return math.lcm(*(pikv.flush_interval for pikv in caches.values()))


def _read_cache(path: Path) -> PiKVConfig:
    pikv = PiKVConfig.from_file(path)
    try:
        Placement.resolve(pikv, int(os.environ.get("WORLD_SIZE", "1")))
    except ValueError as error:
        raise ValueError(f"--pikv {path}: {error}") from error
    return pikv
