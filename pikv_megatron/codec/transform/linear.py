"""Linear transforms: x^ = shift + (x - shift) E D, E and D by KV head (paper, Table 2).

q . k^ = q . shift + (q D^T) . ((k - shift) E): stored are the numbers (k - shift) E, the query is
multiplied by D^T, and the output over stored values by D. A method is how E and D are fitted.

Legend: n sequences, sq query tokens, np query heads, ng KV heads, g = np / ng, c pages, S tokens a
page, w width, r rank.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from pikv_megatron.codec.transform.base import KVTransform, TransformOptions
from pikv_megatron.codec.transform.moments import Moments
from pikv_megatron.types import KVShape

TINY = 1e-30


class Factors(NamedTuple):
    """A fitted map, head by head. All float32.

    Attributes:
        shift: [ng, w].
        encoder: E, [ng, w, r].
        decoder: D, [ng, r, w]; None: E^T, of orthonormal directions.
    """

    shift: Tensor
    encoder: Tensor
    decoder: Tensor | None = None

    @property
    def inverse(self) -> Tensor:
        """D."""
        return self.encoder.transpose(-1, -2) if self.decoder is None else self.decoder


class LinearOptions(TransformOptions):
    """A linear transform of some rank.

    Attributes:
        is_shared: all sequences have the same factors.
        is_orthogonal: D is E^T.
    """

    is_shared: ClassVar[bool] = False
    is_orthogonal: ClassVar[bool] = True

    rank: int | None = Field(None, ge=1, description="numbers of a key; null: half the width")
    value_rank: int | None = Field(None, ge=1, description="numbers of a value; null: as of a key")
    per_expert: bool = Field(False, description="a basis for the tokens of each expert shard")

    @property
    def is_by_expert(self):
        return self.per_expert

    def build(self, kv, num_slots, moments=None, num_bases=1):
        keys, values = (None, None) if moments is None else zip(*moments)
        if kv.values_in_keys:
            if self.value_rank is not None:
                raise ValueError(
                    f"codec.transform.value_rank {self.value_rank}: the values of latent attention "
                    "are columns of its keys and stored with them; set rank alone"
                )
            rows = self.row_map(kv, num_slots, keys, num_bases)
            return SharedLinearTransform(rows, kv.value_width)
        return LinearTransform(
            self.key_map(kv, num_slots, keys, num_bases),
            self.value_map(kv, num_slots, values, num_bases),
        )

    def key_map(
        self, kv: KVShape, num_slots: int, moments: Sequence[Moments] | None, num_bases: int = 1
    ) -> "LinearMap":
        """The map of keys."""
        rank = _checked("rank", self.rank or max(1, kv.key_width // 2), kv.key_width)
        return LinearMap(
            kv, kv.key_width, rank, num_slots, self, self.fit_keys, moments, num_bases
        )

    def value_map(
        self, kv: KVShape, num_slots: int, moments: Sequence[Moments] | None, num_bases: int = 1
    ) -> "LinearMap":
        """The map of values."""
        wanted = self.value_rank or self.rank or max(1, kv.value_width // 2)
        rank = _checked("value_rank", wanted, kv.value_width)
        return LinearMap(
            kv, kv.value_width, rank, num_slots, self, self.fit_values, moments, num_bases
        )

    def row_map(
        self, kv: KVShape, num_slots: int, moments: Sequence[Moments] | None, num_bases: int = 1
    ) -> "LinearMap":
        """The map of rows whose first columns are values: RoPE turns few of the others."""
        rank = _checked("rank", self.rank or max(1, kv.key_width // 2), kv.key_width)
        return LinearMap(
            kv, kv.key_width, rank, num_slots, self, self.fit_values, moments, num_bases
        )

    @abstractmethod
    def fit_keys(self, moments: Moments, rank: int) -> Factors:
        """The map of keys with these moments."""

    def fit_values(self, moments: Moments, rank: int) -> Factors:
        """The map of values; RoPE does not turn them."""
        return self.fit_keys(moments, rank)


def _checked(name: str, rank: int, width: int) -> int:
    if rank > width:
        raise ValueError(
            f"codec.transform.{name} {rank} exceeds the width of a head, {width}: lower it"
        )
    return rank


class LinearMap:
    """The factors of keys, or of values, of all sequences.

    Args:
        kv: tokens as computed.
        width: w.
        rank: r.
        num_slots: sequences.
        options: the method.
        fit: its factors from moments and a rank.
        moments: of a calibration, of each part: all sequences then have the factors fitted to them;
            None: those of a sequence's first sealed pages, of its prompt or its first chunk.
        num_bases: parts of a sequence, each of which has its own.

    Attributes:
        rank: as given.
        num_groups: ng.
    """

    def __init__(
        self, kv: KVShape, width: int, rank: int, num_slots: int, options: LinearOptions,
        fit: Callable[[Moments, int], Factors], moments: Sequence[Moments] | None,
        num_bases: int = 1,
    ):
        self.rank, self.num_groups = rank, kv.num_groups
        self._fit = fit
        self._is_shared = options.is_shared or moments is not None
        self._fitted: set[int] = set()
        shapes = [(width,), (width, rank)] + [(rank, width)] * (not options.is_orthogonal)
        self._num_bases = num_bases
        maps = min(num_bases, num_slots) if self._is_shared else num_slots
        self._factors = Factors(
            *(torch.zeros(maps, kv.num_groups, *shape, device=kv.device) for shape in shapes)
        )
        if moments is not None and num_slots:
            for part, own in enumerate(moments):
                self._keep(part, fit(own.to(kv.device), rank))

    def is_fitted(self, slot: int) -> bool:
        return self._index(slot) in self._fitted

    def fit(self, slot: int, x: Tensor) -> None:
        """Learn from tokens [ng, t, w], unless that was done."""
        if not self.is_fitted(slot):
            # In numbers up to 1, whose squares are finite. Only the shift has a size.
            size = x.float().abs().amax(dim=(1, 2)).clamp(min=TINY)
            shift, *factors = self._fit(Moments.of(x / size.view(-1, 1, 1)), self.rank)
            self._keep(self._index(slot), Factors(shift * size.unsqueeze(1), *factors))

    def forget(self, slot: int) -> None:
        if not self._is_shared:
            self._fitted.discard(slot)

    def factors(self, slots: Tensor) -> Factors:
        """Of the sequences, [n, ng, ...]; or [1, ng, ...] for all of them."""
        if self._is_shared:
            if self._num_bases == 1:
                return self._factors
            slots = slots % self._num_bases
        return Factors(*(None if part is None else part[slots] for part in self._factors))

    def tensors(self) -> list[Tensor]:
        return [part for part in self._factors if part is not None]

    def encode(self, x: Tensor, slots: Tensor) -> Tensor:
        """[ng, c, S, w] -> [ng, c, S, r]."""
        shift, encoder, _ = self.factors(slots)
        return torch.matmul(x.float() - shift.transpose(0, 1).unsqueeze(2), encoder.transpose(0, 1))

    def decode(self, x: Tensor, slots: Tensor) -> Tensor:
        """[ng, c, S, r] -> [ng, c, S, w]."""
        factors = self.factors(slots)
        shift = factors.shift.transpose(0, 1).unsqueeze(2)
        return torch.matmul(x.float(), factors.inverse.transpose(0, 1)) + shift

    def absorb(self, query: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Query [n, sq, np, w] -> [n, sq, np, r] and what is added to its logits [n, sq, np]."""
        factors = self.factors(slots)
        heads = _by_group(query, self.num_groups)
        bias = torch.matmul(heads, factors.shift.unsqueeze(3))
        inner = torch.matmul(heads, factors.inverse.transpose(2, 3))
        return _by_head(inner, query), _by_head(bias, query).squeeze(3)

    def emit(self, out: Tensor, slots: Tensor) -> Tensor:
        """Output over encoded rows [n, sq, np, r] -> [n, sq, np, w]."""
        factors = self.factors(slots)
        full = torch.matmul(_by_group(out, self.num_groups), factors.inverse)
        return _by_head(full + factors.shift.unsqueeze(2), out).to(out.dtype)

    def _keep(self, index: int, factors: Factors) -> None:
        for kept, new in zip(self._factors, factors):
            if kept is not None:
                kept[index] = new
        self._fitted.add(index)

    def _index(self, slot: int) -> int:
        return slot % self._num_bases if self._is_shared else slot


class LinearTransform(KVTransform):
    """One map of keys and one of values."""

    learns = True

    def __init__(self, keys: LinearMap, values: LinearMap):
        self.key_width, self.value_width = keys.rank, values.rank
        self._keys, self._values = keys, values

    def is_fitted(self, slot):
        return self._keys.is_fitted(slot) and self._values.is_fitted(slot)

    def fit(self, slot, keys, values):
        self._keys.fit(slot, keys)
        self._values.fit(slot, values)

    def forget(self, slot):
        self._keys.forget(slot)
        self._values.forget(slot)

    def encode(self, keys, values, slots):
        return self._keys.encode(keys, slots), self._values.encode(values, slots)

    def decode(self, keys, values, slots):
        return self._keys.decode(keys, slots), self._values.decode(values, slots)

    def absorb(self, query, slots):
        return self._keys.absorb(query, slots)

    def emit(self, out, slots):
        return self._values.emit(out, slots)

    def tensors(self):
        return self._keys.tensors() + self._values.tensors()


class SharedLinearTransform(KVTransform):
    """One map of rows whose first columns are the values.

    The whole stored row is the value: the output over it is mapped back, and cut.
    """

    learns = True

    def __init__(self, rows: LinearMap, value_width: int):
        self.key_width = self.value_width = rows.rank
        self._rows, self._width = rows, value_width

    def is_fitted(self, slot):
        return self._rows.is_fitted(slot)

    def fit(self, slot, keys, values):
        self._rows.fit(slot, keys)

    def forget(self, slot):
        self._rows.forget(slot)

    def encode(self, keys, values, slots):
        rows = self._rows.encode(keys, slots)
        return rows, rows

    def decode(self, keys, values, slots):
        rows = self._rows.decode(keys, slots)
        return rows, rows[..., : self._width]

    def absorb(self, query, slots):
        return self._rows.absorb(query, slots)

    def emit(self, out, slots):
        return self._rows.emit(out, slots)[..., : self._width]

    def tensors(self):
        return self._rows.tensors()


def _by_group(x: Tensor, num_groups: int) -> Tensor:
    """[n, sq, np, w] -> [n, ng, sq * g, w], float32."""
    return x.float().unflatten(2, (num_groups, -1)).transpose(1, 2).flatten(2, 3)


def _by_head(x: Tensor, like: Tensor) -> Tensor:
    """[n, ng, sq * g, w] -> [n, sq, np, w], sq as in `like`."""
    return x.unflatten(2, (like.shape[1], -1)).transpose(1, 2).flatten(2, 3)
