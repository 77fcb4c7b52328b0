"""Which of several caches each layer takes, by what each costs where one layer alone has it.

Layers differ more than tokens do: some find what is far, and most look at neighbours. What they
cost is taken to add up over layers, so the whole is measured again (`launch/tune.py`).
"""

from collections.abc import Mapping, Sequence
from math import ceil
from statistics import mean
from typing import NamedTuple

from pikv_megatron.calibration.allocation import Choice, allocate
from pikv_megatron.config import PiKVConfig
from pikv_megatron.evaluation.evaluator import LOSSLESS, lossless
from pikv_megatron.evaluation.report.tables import Grid, TextTable
from pikv_megatron.layer_options import LayerOptions, LayerOverride

PARTS = 20_000  # of a dense cache, in which bytes are counted


class Cost(NamedTuple):
    """Of one cache in one layer, the others being lossless.

    Attributes:
        cache: its name.
        divergence: mean over tasks, nats.
        saved: bytes less than the lossless cache holds, over a dense one's.
    """

    cache: str
    divergence: float
    saved: float


class Tuning(NamedTuple):
    """What was chosen.

    Attributes:
        caches: by layer, their names.
        divergence: nats, if costs add up.
        held: bytes over a dense cache's, likewise.
    """

    caches: list[str]
    divergence: float
    held: float


def one_by_one(caches: Mapping[str, PiKVConfig], num_layers: int) -> dict[str, PiKVConfig]:
    """Each of `caches`, the lossless one first, in each layer alone.

    Raises:
        ValueError: they differ in more than the methods of all layers.
    """
    whole, *others = caches.items()
    found = dict([whole])
    for name, pikv in others:
        if pikv.layers:
            raise ValueError(f"--pikv {name}: its layers are to be chosen; leave them out")
        if lossless(pikv) != whole[1]:
            raise ValueError(
                f"--pikv {name}: its sizes or its calibration are not those of the first cache, "
                "and layers that are tuned have them in common"
            )
        for layer in range(num_layers):
            found[_title(name, layer)] = combined(whole[1], {str(layer): pikv})
    return found


def costs(grid: Grid, caches: Sequence[str], num_layers: int) -> list[list[Cost]]:
    """Of every layer, that of the lossless cache first."""
    whole = held(grid, LOSSLESS)
    by_layer = []
    for layer in range(num_layers):
        found = [Cost(LOSSLESS, 0.0, 0.0)]
        for cache in caches:
            name = _title(cache, layer)
            divergence = mean(figures.divergence for figures in grid.every(name))
            found.append(Cost(cache, divergence, whole - held(grid, name)))
        by_layer.append(found)
    return by_layer


def choose(by_layer: Sequence[Sequence[Cost]], whole: float, share: float) -> Tuning:
    """The least divergence that `share` of a dense cache's bytes allows.

    Args:
        whole: what the lossless cache holds, over a dense one.

    Raises:
        ValueError: the smallest choices hold more.
    """
    most = [max(cost.saved for cost in layer) for layer in by_layer]
    least = whole - sum(most)
    if share < least:
        raise ValueError(
            f"--share {share:g}: layer by layer, the smallest of these caches hold {least:.3f} of "
            "a dense one; name smaller ones, or raise it"
        )
    menus = [
        [
            Choice(ceil(_parts(top - cost.saved)), cost.divergence, {"cost": cost})
            for cost in layer
        ]
        for top, layer in zip(most, by_layer)
    ]
    chosen = [choice.fields["cost"] for choice in allocate(menus, int(_parts(share - least)))]
    return Tuning(
        [cost.cache for cost in chosen], sum(cost.divergence for cost in chosen),
        whole - sum(cost.saved for cost in chosen),
    )


def tuned(caches: Mapping[str, PiKVConfig], tuning: Tuning) -> PiKVConfig:
    """The cache whose layers have what was chosen."""
    layers: dict[str, list[str]] = {}
    for number, name in enumerate(tuning.caches):
        if name != LOSSLESS:
            layers.setdefault(name, []).append(str(number))
    chosen = {",".join(numbers): caches[name] for name, numbers in layers.items()}
    return combined(caches[LOSSLESS], chosen)


def combined(whole: PiKVConfig, chosen: Mapping[str, PiKVConfig]) -> PiKVConfig:
    """A lossless cache but for layers that have the methods of others, by their numbers."""
    layers = [
        LayerOverride(match=match, **{
            name: getattr(pikv, name) for name in LayerOptions.model_fields
            if name in pikv.model_fields_set and getattr(pikv, name) is not None
        })
        for match, pikv in chosen.items()
    ]
    return whole.model_copy(update={"layers": tuple(layers)})


def costs_table(by_layer: Sequence[Sequence[Cost]], tuning: Tuning | None) -> TextTable:
    """A row a layer: the divergence of each cache, and what it saves; and what was chosen."""
    columns = ["layer", *(cost.cache for cost in by_layer[0][1:])]
    rows = [
        [str(number), *(f"{x.divergence:.4f} ({100 * x.saved:.1f})" for x in layer[1:])]
        for number, layer in enumerate(by_layer)
    ]
    if tuning is not None:
        columns.append("chosen")
        rows = [[*row, name] for row, name in zip(rows, tuning.caches)]
    title = "One layer alone: KL, nats (saved, percent of a dense cache)"
    return TextTable(title, columns, rows)


def held(grid: Grid, name: str) -> float:
    """Bytes of a cache over a dense one's, mean over tasks."""
    return mean(figures.held_share for figures in grid.every(name))


def _parts(share: float) -> float:
    """Of a dense cache, without what floating point adds to a whole number."""
    return round(PARTS * share, 6)


def _title(cache: str, layer: int) -> str:
    return f"{cache}, layer {layer}"
