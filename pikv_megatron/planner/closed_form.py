"""The paper's own plan (3.1, 3.3), which counts keys and values of one layer and nothing else.

    M_total = (2 d / rho) (L / (G S) + K S)     S* = sqrt(L / (K G))
    M*_total = (4 d / rho) sqrt(K L / G)
    T_read = 2 d k B / (rho beta)               T_decode = eta d k B / (rho gamma), eta = 2

2 d are the numbers of a token's key and value, L tokens of context, G ranks, S tokens a page, K
pages of a sequence that stay on a rank, rho the ratio of a token's bytes as computed to those in a
page, k shards that a query visits, B sequences. Bytes here are of all full layers and sequences.
"""

from dataclasses import dataclass
from math import sqrt

from pikv_megatron.cache.layer_cache import LayerCache
from pikv_megatron.planner.hardware import Hardware
from pikv_megatron.planner.planned_cache import PlannedCache, PlannedLayer
from pikv_megatron.planner.target import Target

ETA = 2.0


@dataclass(frozen=True)
class ClosedForm:
    """Of the first full layer's K and rho; see the module for the formulas.

    Attributes:
        page_size: S, as configured.
        best_page_size: S*.
        num_pages: K.
        compression: rho.
        total_bytes: M_total.
        best_bytes: M*_total.
        read_seconds: T_read.
        decode_seconds: T_decode.
    """

    page_size: int
    best_page_size: float
    num_pages: int
    compression: float
    total_bytes: float
    best_bytes: float
    read_seconds: float
    decode_seconds: float

    @classmethod
    def of(
        cls, target: Target, cache: PlannedCache, hardware: Hardware
    ) -> "ClosedForm | None":
        """None for a model all of whose layers see a sliding window."""
        full = [layer for layer in cache.layers if isinstance(layer.cache, LayerCache)]
        if not full:
            return None
        length, ranks, size = target.context, target.num_ranks, target.pikv.page_size
        filled = cache.footprint.enough_pages(target.last_in_shards, at_home=False)
        pages = max(1, full[0].cache.store.keeper.num_columns(filled))
        rho = _compression(full[0])
        unit = target.batch * sum(x.count * x.cache.spec.kv.token_bytes for x in full) / rho
        visited = getattr(full[0].cache.spec.options.router, "k", cache.placement.num_shards)
        return cls(
            page_size=size,
            best_page_size=sqrt(length / (pages * ranks)),
            num_pages=pages,
            compression=rho,
            total_bytes=unit * (length / (ranks * size) + pages * size),
            best_bytes=2 * unit * sqrt(pages * length / ranks),
            read_seconds=unit * visited / hardware.memory_bandwidth,
            decode_seconds=ETA / 2 * unit / target.dtype.itemsize * visited / hardware.compute,
        )


def _compression(layer: PlannedLayer) -> float:
    """rho, of the pages that are sealed."""
    store, kv = layer.cache.store, layer.cache.spec.kv
    page = store.pool.stored_bytes / (store.pool.free.num_pages + 1)
    return kv.token_bytes * store.page_size / page
