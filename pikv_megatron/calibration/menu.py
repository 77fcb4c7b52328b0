"""What the keys and the values of a layer can be stored as, with bytes and measured errors."""

from statistics import mean
from typing import Iterator, Sequence

from pikv_megatron.calibration.allocation import Choice
from pikv_megatron.calibration.sample import LayerSample
from pikv_megatron.codec.registry import CodecOptions
from pikv_megatron.layer_spec import LayerSpec
from pikv_megatron.types import KVShape

FORMATS = ("plain", "int8", "int4", "int3", "int2")
# Of the width, in eighths; the last is all of it.
RANKS = (4, 6, 8)
METHODS = {"keys": "pruning", "values": "svd"}


def layer_menus(
    samples: Sequence[LayerSample], spec: LayerSpec, page_size: int
) -> tuple[list[Choice], list[Choice]]:
    """Choices for the keys and for the values of a layer; errors are means over samples."""
    keys, values = [], []
    for fields in _sides(spec.kv, page_size):
        options = CodecOptions(**codec_fields(fields, fields))
        found = [
            sample.errors(options.build(spec.kv, page_size, 1, spec.moments), page_size)
            for sample in samples
        ]
        pool = options.build(spec.kv, page_size, 1).allocate(1)
        parts = (pool.keys, *pool[2:4]), (pool.values, *pool[4:6])
        for menu, part, errors in zip((keys, values), parts, zip(*found)):
            num_bytes = sum(x.nbytes for x in part if x is not None)
            menu.append(Choice(-(-num_bytes // page_size), mean(errors), fields))
    return keys, values


def codec_fields(keys: dict, values: dict) -> dict:
    """`codec` of a configuration."""
    fields = {"format": {"keys": keys["format"], "values": values["format"]}}
    if not (keys["is_whole"] and values["is_whole"]):
        fields["transform"] = {
            "keys": {"name": METHODS["keys"], "rank": keys["key_rank"]},
            "values": {"name": METHODS["values"], "rank": values["value_rank"]},
        }
    return fields


def _sides(kv: KVShape, page_size: int) -> Iterator[dict]:
    for eighths in RANKS:
        for name in FORMATS:
            if name == "int3" and page_size % 8 or name in ("int4", "int2") and page_size % 4:
                continue
            yield {
                "format": name, "is_whole": eighths == RANKS[-1],
                "key_rank": max(1, kv.key_width * eighths // 8),
                "value_rank": max(1, kv.value_width * eighths // 8),
            }
