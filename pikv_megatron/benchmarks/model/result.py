"""Everything that a benchmark measured."""

from typing import Mapping, NamedTuple, Sequence

from pikv_megatron.benchmarks.model.measurement import Measurement
from pikv_megatron.benchmarks.model.prefill import PrefillMeasurement
from pikv_megatron.benchmarks.model.ragged import RaggedMeasurement


class BenchmarkResult(NamedTuple):
    """What was asked for; the rest is empty.

    Attributes:
        measurements: one for each context length.
        ragged: by PiKV cache.
        prefills: one for each prompt length, by contestant.
        latency_ms: of a collective that carries almost nothing; None on one rank.
    """

    measurements: Sequence[Measurement]
    ragged: Mapping[str, RaggedMeasurement]
    prefills: Sequence[Mapping[str, PrefillMeasurement]]
    latency_ms: float | None
