"""Codecs keep finite what is finite, whatever the pages hold."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from pikv_megatron.codec.registry import CodecOptions, Format, Transform
from pikv_megatron.options import members
from pikv_megatron.types import KVShape, PageList

FORMATS, TRANSFORMS = list(members(Format)), list(members(Transform))
STEP = {"int4": 2, "int3": 8, "int2": 4, "mixed": 4, "aged": 4}


def nasty(kind: str, shape: tuple[int, ...], rng: torch.Generator) -> torch.Tensor:
    x = torch.randn(shape, generator=rng)
    if kind == "zeros":
        return torch.zeros(shape)
    if kind == "denormals":
        return x * 1e-41
    if kind == "constant channels":
        return x[:, :, :1].expand(shape) * (torch.arange(shape[-1]) % 2) + 3.7
    if kind == "outlier channel":
        x[..., shape[-1] // 2] *= 5e3
    if kind == "beyond float16":
        x[..., 0] *= 1e20
    return x


KINDS = (
    "normal", "zeros", "denormals", "constant channels", "outlier channel", "beyond float16",
)


@settings(deadline=None, max_examples=150)
@given(
    transform=st.sampled_from(TRANSFORMS), packing=st.sampled_from(FORMATS),
    kind=st.sampled_from(KINDS), width=st.sampled_from([2, 7, 16, 33]),
    value_width=st.sampled_from([3, 16]), rows=st.integers(1, 3), is_rotated=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]), seed=st.integers(0, 999),
)
def test_finite_tokens_stay_finite(
    transform, packing, kind, width, value_width, rows, is_rotated, dtype, seed
):
    """Pages of one packed row and more; odd widths."""
    rng = torch.Generator().manual_seed(seed)
    page_size = rows * STEP.get(packing, 1) * (2 if transform == "pyramidkv" else 1)
    kv = KVShape(2, width, value_width, dtype, torch.device("cpu"))
    fields = {"transform": transform, "format": packing}
    try:
        codec = CodecOptions(**fields, rotation="hadamard" if is_rotated else "none").build(
            kv, page_size, 1
        )
    except ValueError as error:
        assert is_rotated and "is odd" in str(error)
        return
    keys = nasty(kind, (2, 3, page_size, width), rng).to(dtype)
    values = nasty(kind, (2, 3, page_size, value_width), rng).to(dtype)
    page, slots = torch.arange(3), torch.zeros(3, dtype=torch.int64)
    if codec.learns:
        codec.fit(0, keys[:, :1].flatten(1, 2), values[:, :1].flatten(1, 2))
    pool = codec.allocate(4)
    codec.seal(keys, values, pool, page, slots)
    stored = [codec.restore(pool, page, slots)]
    if codec.older is not None:
        old = codec.allocate_old(4)
        codec.reseal(pool, page, old, page)
        stored.append(codec.restore(old, page, slots))
    for part in (part for pair in stored for part in pair):
        assert part.isfinite().all()
    sealed = PageList(pool, page[None], torch.full((1, 3), page_size, dtype=torch.int32))
    query = torch.randn(1, 2, 4, width, generator=rng).to(dtype)
    state, (mass,) = codec.attend(query, [sealed], [], 0.3, slots[:1], with_mass=True)
    assert state.out.isfinite().all() and state.lse.isfinite().all() and mass.isfinite().all()
    if kind != "beyond float16":  # there, logits of 1e7 are not told apart
        torch.testing.assert_close(mass.sum(3), torch.ones(1, 2, 4), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("packing", [name for name in FORMATS if name != "plain"])
@pytest.mark.parametrize("kind", ["zeros", "constant channels", "outlier channel"])
def test_formats_are_off_by_half_a_scale(packing, kind):
    """A channel's outlier costs its own numbers only, since keys are scaled by channel.

    Each number to half a scale that covers the channel, or all of them in the mean of the squares
    to twice its square.
    """
    kv = KVShape(2, 16, 16, torch.float32, torch.device("cpu"))
    codec = CodecOptions(format=packing).build(kv, 8, 1)
    keys = nasty(kind, (2, 2, 8, 16), torch.Generator().manual_seed(0))
    pool, page = codec.allocate(3), torch.arange(2)
    codec.seal(keys, keys, pool, page, page * 0)
    stored, _ = codec.restore(pool, page, page * 0)
    spread = keys.amax(2, keepdim=True) - keys.amin(2, keepdim=True)
    # Of a channel's range; float8 keeps a sixteenth of each number.
    share = {"float8": 0.0, "int8": 1 / 510, "int4": 1 / 30, "int3": 1 / 14, "int2": 1 / 6,
             "mixed": 1 / 30, "aged": 1 / 30}[packing]
    allowed = spread * share * 1.01 + keys.abs() * (1 / 15 if packing == "float8" else 2e-3) + 1e-6
    if packing in ("float8", "int8"):
        assert ((stored - keys).abs() <= allowed).all()
    else:
        assert ((stored - keys).square().mean(2) <= 2 * allowed.square().amax(2)).all()
