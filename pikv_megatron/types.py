"""Values that travel between the rooms.

Legend: n sequences, sq query tokens, np query heads, ng KV heads, hn head width, p pages of a pool,
m pages listed for a sequence, S tokens a page, r_k and r_v stored widths of keys and values (hn,
unless a linear codec is absorbed into the query and the output), G ranks of the expert-parallel
group.
"""

import math
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor


class AttentionState(NamedTuple):
    """Softmax attention over a part of the keys, ready to be merged with other parts.

    Attributes:
        out: [n, sq, np, r_v], the part's own normalised output; 0 where it has no key.
        lse: [n, sq, np], float32, natural log of the sum of exponentials; -inf without keys.
    """

    out: Tensor
    lse: Tensor


class SharedRow(NamedTuple):
    """Of pages whose values are the first columns of the keys, as in latent attention.

    Attributes:
        page_size: S.
        value_width: r_v.
    """

    page_size: int
    value_width: int


class _PageTensors(NamedTuple):
    keys: Tensor
    values: Tensor | None
    key_scale: Tensor | None = None
    key_zero: Tensor | None = None
    value_scale: Tensor | None = None
    value_zero: Tensor | None = None
    log_multiplicity: Tensor | None = None
    shared: SharedRow | None = None


class KVPages(_PageTensors):
    """Pages of S tokens as they are stored.

    Keys and values are stored each in their own way: as plain float32, bfloat16 or float16
    numbers, or scaled, as float8_e4m3fn or as uint8 that hold 8, 4, 3 or 2 bits a number:
    x = q * scale + zero, without zero for float8. Keys have a scale for each channel and group of
    S / G_k tokens, values one for each token and group of r_v / G_v channels.

    A byte holds 8 / bits tokens of one channel. Byte row i of a page has the tokens i, i + R,
    i + 2 R, ... from its lowest bits up, R = S * bits / 8 rows, so that a kernel unpacks a tile of
    bytes into tiles of tokens. Numbers of 3 bits are packed as their 2 lower bits, and behind them,
    in further rows, as their highest bit.

    Example:
        S = 4 tokens of 2 bits, one channel: R = 1; tokens 3, 0, 2, 1 are one byte,
        3 + 0 * 4 + 2 * 16 + 1 * 64 = 99.

    Where values are the first columns of the keys, each row is there once, stored as keys are.

    Attributes:
        keys: [ng, p, R_k, r_k].
        values: [ng, p, R_v, r_v]; None: `shared` says which columns of the keys they are.
        key_scale: [ng, p, G_k, r_k], float16; None for plain keys.
        key_zero: like `key_scale`; None for plain and float8 keys.
        value_scale: [ng, p, S, G_v], float16; None for plain values.
        value_zero: like `value_scale`; None for plain and float8 values.
        log_multiplicity: [p], float32, natural log of the number of tokens that each token of a
            page stands for, added to its logits; None: every token stands for itself.
        shared: where values are columns of the keys; None: they are not.
    """

    @classmethod
    def plain(cls, keys: Tensor, values: Tensor | None, value_width: int) -> "KVPages":
        """Pages of numbers as computed; without values, these are columns of the keys."""
        if values is not None:
            return cls(keys, values)
        return cls(keys, None, shared=SharedRow(keys.shape[2], value_width))

    def __getstate__(self):
        """A kernel may note addresses in the instance's dict, which are of this process."""

    @property
    def tensors(self) -> list[Tensor]:
        """Those that there are."""
        return [part for part in self if isinstance(part, Tensor)]

    @property
    def page_size(self) -> int:
        """S."""
        if self.shared is not None:
            return self.shared.page_size
        return (self.values if self.value_scale is None else self.value_scale).shape[2]

    @property
    def value_width(self) -> int:
        """r_v."""
        return self.values.shape[3] if self.shared is None else self.shared.value_width

    @property
    def key_bits(self) -> int:
        """Of a code, where keys are scaled."""
        return 8 * self.keys.shape[2] // self.page_size

    @property
    def value_bits(self) -> int:
        """Of a code, where values are scaled."""
        return 8 * self.values.shape[2] // self.page_size


class KeyTurn(NamedTuple):
    """RoPE of keys that are stored before it: what turns them when they are read.

    Attributes:
        position: [q, S], int32, of the tokens of pages.
        rows: [n, m], int64, where in `position` each listed page is found.
        angles: cosines and sines, see `ops.turn_keys.angle_table`.
    """

    position: Tensor
    rows: Tensor
    angles: Tensor


class PageList(NamedTuple):
    """Which pages of a pool each sequence reads, and how much of them.

    Attributes:
        pages: the pool.
        table: [n, m], int64, page numbers; any page where `lens` is 0.
        lens: [n, m], int32, tokens of the page that are read, its first ones.
        token_mask: [n, m, S], bool, False hides a token of those; None hides none.
        logit_bias: [n, sq, np], float32, added to every logit of these pages (affine codecs).
        turn: what turns their keys to their positions; None: they are stored so.
    """

    pages: KVPages
    table: Tensor
    lens: Tensor
    token_mask: Tensor | None = None
    logit_bias: Tensor | None = None
    turn: KeyTurn | None = None


class MeanKeySketch(NamedTuple):
    """The mean key of every page.

    Attributes:
        mean: [ng, p, hn].
    """

    mean: Tensor


class BoundingBoxSketch(NamedTuple):
    """The smallest and the largest key of every page, channel by channel (Quest).

    Attributes:
        low: [ng, p, hn].
        high: [ng, p, hn].
    """

    low: Tensor
    high: Tensor


class LowRankSketch(NamedTuple):
    """Every token's key in r leading directions, packed to 2 or 4 bits as keys of `KVPages` are.

    Attributes:
        codes: [ng, p, R, r], uint8.
        scale: [ng, p, r], float16.
        zero: [ng, p, r], float16.
        residual: [ng, p], float32, largest norm of what the directions leave of a token's key.
        page_size: S.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    residual: Tensor
    page_size: int


PageSketch = MeanKeySketch | BoundingBoxSketch | LowRankSketch


class PageScores(NamedTuple):
    """How much each listed page matters to a query.

    Attributes:
        logit: [n, np, m], float32, estimate of (or upper bound on) the page's logit by head, -inf
            where nothing is listed.
        score: [n, m], float32, mean over heads of the softmax of `logit` over the pages.
        chosen: [n, k], int64, the columns of the k best in rising order, the lower column first
            among equals; -1 behind them where fewer are listed.
    """

    logit: Tensor
    score: Tensor
    chosen: Tensor


class KVShape(NamedTuple):
    """What one token's keys and values are in one layer of a rank.

    Attributes:
        num_groups: ng, KV heads.
        key_width: of a head's key.
        value_width: of a head's value.
        dtype: as computed.
        device: where they are computed.
        values_in_keys: values are the first columns of the keys, and stored with them only (latent
            attention).
    """

    num_groups: int
    key_width: int
    value_width: int
    dtype: torch.dtype
    device: torch.device
    values_in_keys: bool = False

    @property
    def heads(self) -> dict[str, tuple[int, int]]:
        """Groups and width of what is stored of a token, by name."""
        keys = {"keys": (self.num_groups, self.key_width)}
        return keys if self.values_in_keys else keys | {
            "values": (self.num_groups, self.value_width)
        }

    def values_of(self, keys: Tensor, values: Tensor | None) -> Tensor:
        """The values [..., value_width], or the columns of keys [..., key_width] that they are."""
        return keys[..., : self.value_width] if values is None else values

    @property
    def token_numbers(self) -> int:
        """What is stored of a token."""
        return sum(ng * width for ng, width in self.heads.values())

    @property
    def token_bytes(self) -> int:
        """Of a token as computed."""
        return self.token_numbers * self.dtype.itemsize


class Directory(NamedTuple):
    """What a home rank knows of its sequences' pages, wherever they lie.

    Column j of rank r is the page that r lists in column j for the same sequence.

    Attributes:
        table: [n, G, m], int64, where in the sketch each page is found; any place for padding.
        is_page: [n, G, m], bool, False marks padding.
        shard: [n, G, m], int64, the shard of each page; any for padding.
        num_shards: N.
        newest: [n, G, m], int64, position of a page's newest token, any for padding; None where
            neither selector nor router asks.
    """

    table: Tensor
    is_page: Tensor
    shard: Tensor
    num_shards: int
    newest: Tensor | None = None


class Reads(NamedTuple):
    """What a step's queries read. Token buffers are read in every visited shard.

    Attributes:
        shards: [n, N], bool, the shards that each sequence visits; None: all of them.
        columns: [n, G, k], int64, the pages that it reads of each rank, by their columns in
            `Directory`, -1 behind them; None: all pages.
        drawn: [n, G, k'], int64, like `columns`, further pages, which stand for others; None: no
            page does.
        log_weight: [n], float32, log of how often each drawn page counts; None where none is drawn.
        ahead: [n, G, k''], int64, like `columns`, pages that the next step may read; None: nothing
            is fetched ahead.
    """

    shards: Tensor | None = None
    columns: Tensor | None = None
    drawn: Tensor | None = None
    log_weight: Tensor | None = None
    ahead: Tensor | None = None


class PageStats(NamedTuple):
    """Pages that an owner holds of r sequences, in m columns.

    Times are positions of queries. What no method asks for is None.

    Attributes:
        is_page: [r, m], bool, False marks padding.
        newest: [r, m], int64, position of a page's newest token.
        shard: [r, m], int64, which of the rank's shards it lies in, from 0; any for padding.
        mass: [r, m, ng], float32, share of the attention that the page had, summed over queries
            and over the heads of a group.
        seen: [r, m], float32, queries that `mass` was summed over.
        observed: [r, m], float32, mean share that the last queries of the latest prompt gave it;
            -1: none of a prompt has seen it.
        last_used: [r, m], int64, when a query last used it, see `RetentionOptions.use_threshold`;
            -1: never.
        uses: [r, m], float32, queries that used it.
        score: [r, m, scores], float32, what the policy made of the page's tokens when it was
            sealed, or the mean of what it made of them as they came; inf where any had none.
    """

    is_page: Tensor
    newest: Tensor
    shard: Tensor
    mass: Tensor | None = None
    seen: Tensor | None = None
    observed: Tensor | None = None
    last_used: Tensor | None = None
    uses: Tensor | None = None
    score: Tensor | None = None

    @property
    def own_shard(self) -> Tensor:
        """`shard`, 0 for padding."""
        return self.shard.masked_fill(~self.is_page, 0)


class TierPlan(NamedTuple):
    """Where the pages of a rank lie that are not on the device.

    Attributes:
        host: share of all pages that lie in the host's memory, at most; the others lie in a file.
        directory: of the file; None: the system's for such files.
        ahead: pages of a sequence that are fetched before they are asked for.
    """

    host: float
    directory: Path | None
    ahead: int

    @property
    def needs_file(self) -> bool:
        """Whether memory may have no room for some pages."""
        return self.host < 1

    def rows(self, num_pages: int, num_here: int) -> tuple[int, int]:
        """Of so many pages, of which some are on the device, room for how many there is in host
        memory and in the file.

        What comes back from the file leaves its record there, so it has room for more than lie in
        it alone.

        Example:
            Half in host memory: of 8 pages, 2 of them on the device, 4, and room for 4.
        """
        in_host = min(math.ceil(self.host * num_pages), num_pages - num_here)
        return in_host, 0 if num_here + in_host == num_pages else num_pages - in_host


@dataclass(frozen=True)
class Recalled:
    """Pages that came back to the device.

    Attributes:
        from_host: out of host memory.
        from_file: out of a file, when they were asked for.
        ahead: out of a file, before they were.
        seconds: that were waited for all of them, and for others to make room.
    """

    from_host: int = 0
    from_file: int = 0
    ahead: int = 0
    seconds: float = 0.0

    def __add__(self, other: "Recalled") -> "Recalled":
        return Recalled(*(a + b for a, b in zip(astuple(self), astuple(other))))


class Ageing(NamedTuple):
    """How older pages of a shard become fewer.

    Attributes:
        young: pages of each level that stay as they are.
        levels: times that a page takes part, at most.
        pages: that become one.
    """

    young: int
    levels: int
    pages: int = 2

    def most(self, num_pages: int, num_shards: int) -> int:
        """Most pages that are left of so many in so many shards."""
        waiting = num_shards * self.levels * (self.young + self.pages - 1)
        return min(num_pages, waiting + num_shards + num_pages // self.pages**self.levels)
