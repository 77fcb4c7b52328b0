"""How many bytes the cache sends, from DeepSpeed's communication logger."""

from collections import Counter

import deepspeed.comm as dist
from deepspeed.comm.comm import comms_logger

# Queries to the owners, parts back home, tokens to their shards, chosen tokens to every rank.
KV_OPS = ("pikv_query", "pikv_combine", "pikv_flush", "pikv_tokens")
LOGGER_SETTINGS = ("enabled", "prof_all", "prof_ops", "verbose", "debug")


class TrafficMeter:
    """Counts what this rank hands to the cache's collectives between `start` and `stop`.

    The logger counts the tensor that goes into a collective, so the share that a rank sends to
    itself is in it. Only the named operations are logged: under `prof_all` the logger ends the
    process at the first collective of Python objects.
    """

    def __init__(self, ops: tuple[str, ...] = KV_OPS):
        self.ops = ops
        self._settings: dict | None = None
        self._before: Counter[str] = Counter()
        self._counted: Counter[str] = Counter()

    def start(self) -> None:
        """Begin to count, from zero."""
        if self._settings is None:
            self._settings = {name: getattr(comms_logger, name) for name in LOGGER_SETTINGS}
        self._before = self._logged()
        dist.configure(
            enabled=True, prof_all=False, prof_ops=list(self.ops), verbose=False, debug=False
        )

    def stop(self) -> None:
        """End counting and put the logger's settings back; without `start` it does nothing."""
        if self._settings is None:
            return
        self._counted = self._logged() - self._before
        for name, value in self._settings.items():
            setattr(comms_logger, name, value)
        self._settings = None

    def bytes_by_op(self) -> dict[str, int]:
        """Bytes by operation, between `start` and `stop`, or until now."""
        counted = self._counted if self._settings is None else self._logged() - self._before
        return {op: counted[op] for op in self.ops}

    def _logged(self) -> Counter[str]:
        return Counter({
            op: sum(size * entry[0] for size, entry in comms_logger.comms_dict.get(op, {}).items())
            for op in self.ops
        })
