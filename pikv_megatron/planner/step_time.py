"""A roofline of a decode step: what it must read, multiply and send, at full speed.

With beta, gamma, phi, lambda and chi of `Hardware`, of the rank that has most sequences:

    T = max(W + C over beta, F over gamma) + X over phi + n lambda + Y over chi

W weights that are read, C the cache's bytes that are (of its pages the share that is read;
sketches, buffers and windows), F operations, X bytes sent to other ranks, n collectives: in a layer
two of the experts (lean decoding gathers tokens, and brings outputs home) and, where shards are
far, two of the cache (queries out, parts home), and two more where owners judge pages first, Y
bytes of pages that are read and have no room on the device: at least those come, and from host
memory at best. That home reads its window while queries travel is left out.

The paper (3.3) has T_read = 2 d k B / (rho beta) and T_decode = eta d k B / (rho gamma): see
`closed_form`.
"""

from typing import NamedTuple

from pikv_megatron.cache.layer_cache import LayerCache
from pikv_megatron.planner.hardware import Hardware
from pikv_megatron.planner.planned_cache import PlannedCache, PlannedLayer
from pikv_megatron.planner.target import Target
from pikv_megatron.planner.traffic import Traffic
from pikv_megatron.planner.weights import Weights

MASS_SHARE_READ = 0.3  # of the pages, where they are read until they have a share of the attention
READ_WHOLE = "windows", "buffers", "sketches"


class StepTime(NamedTuple):
    """Seconds of a decode step.

    Attributes:
        memory: of reading weights and cache.
        compute: of products.
        fabric: of sending, and of waiting for collectives.
        recall: of pages that come back to the device.
    """

    memory: float
    compute: float
    fabric: float
    recall: float

    @property
    def total(self) -> float:
        """Memory and compute work at the same time."""
        return max(self.memory, self.compute) + self.fabric + self.recall


def step_time(
    target: Target, cache: PlannedCache, weights: Weights, traffic: Traffic, hardware: Hardware
) -> StepTime:
    """Of the first rank, at the end of the context."""
    num_calls = 0
    if cache.footprint.is_far(target.last_in_shards):
        full = [x for x in cache.layers if isinstance(x.cache, LayerCache)]
        num_calls = sum(x.count * (4 if _asks_owners(x.cache) else 2) for x in full)
    return _step_time(
        target, weights, bytes_read(target, cache), _attention_products(target, cache),
        _fabric_time(target, traffic.total, num_calls, hardware), hardware,
        bytes_recalled(target, cache),
    )


def dense_step_time(target: Target, weights: Weights, hardware: Hardware) -> StepTime:
    """The same ranks and experts, each sequence's KV as computed, whole, on its home rank."""
    kv = products = 0.0
    for spec in target.specs:
        tokens = target.num_own * min(target.context, spec.sliding_window or target.context)
        kv += tokens * spec.kv.token_bytes
        products += tokens * spec.num_heads * (spec.kv.key_width + spec.kv.value_width)
    fabric = _fabric_time(target, 0.0, 0, hardware)
    return _step_time(target, weights, kv, products, fabric, hardware)


def _step_time(
    target: Target, weights: Weights, kv: float, products: float, fabric: float,
    hardware: Hardware, recalled: float = 0.0,
) -> StepTime:
    """From the bytes of the cache that are read, those of them that have to come to the device, and
    the products of the attention."""
    ranks, batch = target.num_ranks, target.batch
    products += weights.multiplied(ranks, batch) / target.dtype.itemsize
    read = weights.read(ranks, batch) + kv
    return StepTime(
        read / hardware.memory_bandwidth, 2 * products / hardware.compute, fabric,
        recalled / hardware.host_bandwidth,
    )


def _fabric_time(target: Target, kv: float, num_calls: int, hardware: Hardware) -> float:
    """Of the cache's bytes and collectives, and of those of the experts and the chosen tokens."""
    ranks = target.num_ranks
    if ranks == 1:
        return 0.0
    moe_layers = sum(target.architecture.is_moe_layer)
    hidden = target.num_own * target.architecture.hidden_size * target.dtype.itemsize
    # A rank's tokens go to all others, and what their experts made of them comes back.
    sent = kv * (ranks - 1) / ranks + 2 * moe_layers * hidden * (ranks - 1)
    num_calls += 2 * moe_layers + 1
    return sent / hardware.fabric_bandwidth + num_calls * hardware.fabric_latency


def bytes_read(target: Target, cache: PlannedCache) -> float:
    """Of the rank's cache, in a step."""
    return sum(layer.count * _layer_read(target, cache, layer) for layer in cache.layers)


def bytes_recalled(target: Target, cache: PlannedCache) -> float:
    """Of the rank's pages, in a step, at least: those read beyond what the device has room for."""
    total = 0.0
    for layer in cache.layers:
        if isinstance(layer.cache, LayerCache):
            read = share_read(target, cache, layer.cache) * layer.cache.store.stored_bytes
            total += layer.count * max(0.0, read - layer.bytes_by_part["pages"])
    return total


def share_read(target: Target, cache: PlannedCache, layer: LayerCache) -> float:
    """Of the pages in shards; `MASS_SHARE_READ` is assumed where the attention decides."""
    num_shards = cache.placement.num_shards
    share = min(1.0, getattr(layer.spec.options.router, "k", num_shards) / num_shards)
    columns = cache.num_columns(layer) * target.num_ranks
    if layer.selector is None or not columns:
        return share
    is_fixed = cache.num_read(layer) < columns
    return min(share, cache.num_read(layer) / columns if is_fixed else MASS_SHARE_READ)


def _layer_read(target: Target, cache: PlannedCache, layer: PlannedLayer) -> float:
    parts = layer.bytes_by_part
    whole = sum(parts.get(name, 0) for name in READ_WHOLE)
    if not isinstance(layer.cache, LayerCache):
        return whole
    share = share_read(target, cache, layer.cache)
    if _asks_owners(layer.cache):
        store = layer.cache.store
        keys = [store.pool.kv.keys, store.pool.kv.key_scale, store.pool.kv.key_zero]
        whole += sum(t.nbytes for t in keys if t is not None) / len(store.common.sharers)
    return whole + share * layer.cache.store.stored_bytes


def _asks_owners(layer: LayerCache) -> bool:
    return layer.directory is not None and layer.directory.asks_owners


def _attention_products(target: Target, cache: PlannedCache) -> float:
    products = 0.0
    for layer in cache.layers:
        spec = layer.cache.spec
        widths = spec.num_heads * (spec.kv.key_width + spec.kv.value_width)
        if isinstance(layer.cache, LayerCache):
            tokens = cache.num_columns(layer.cache) * target.pikv.page_size * target.batch
            tokens *= share_read(target, cache, layer.cache)
            tokens += target.num_own * target.pikv.window
        else:
            tokens = target.num_own * min(target.context, spec.sliding_window)
        products += layer.count * tokens * widths
    return products

