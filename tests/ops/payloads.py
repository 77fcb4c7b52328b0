"""What keys and values are stored as: one name for both, or `keys/values`."""

PAYLOADS = (
    "float32", "bfloat16", "float16", "float8", "int8", "int4", "int3", "int2", "int4/int2",
    "int2/float8", "bfloat16/int3", "int8/float16",
)
PLAIN = ("float32", "bfloat16", "float16")
_TOGETHER = {"int4": 2, "int3": 8, "int2": 4}


def sides(payload: str) -> tuple[str, str]:
    """Names of what keys and values are stored as."""
    keys, _, values = payload.partition("/")
    return keys, values or keys


def together(payload: str) -> int:
    """Tokens that are packed together: a page has a multiple of them."""
    return max(_TOGETHER.get(side, 1) for side in sides(payload))


def is_fitted(side: str) -> bool:
    """Whether codes are of a line through each group, which may cut off its ends."""
    return side in _TOGETHER


def bits_of(side: str) -> int:
    """Of a scaled number."""
    return 8 if side == "float8" else int(side.removeprefix("int"))
