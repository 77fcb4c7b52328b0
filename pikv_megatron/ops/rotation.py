"""RoPE (arXiv 2104.09864) by the angles of one step, in as few calls as it takes.

Legend: t tokens, hn head width, w channels that turn, the first ones of a head.
"""

import torch


class Rotation:
    """Turns the channels of heads in pairs.

    Args:
        angles: [t, 1, w], each pair's angle in both of its channels.
        scale: factor on what turns (YaRN, arXiv 2309.00071).
        is_interleaved: channels 2 i and 2 i + 1 are a pair, else i and i + w / 2.
        dtype: of the heads.
    """

    def __init__(
        self, angles: torch.Tensor, scale: float, is_interleaved: bool, dtype: torch.dtype
    ):
        self._is_interleaved = is_interleaved
        angles = angles.unsqueeze(1)
        self._cos, sin = ((f(angles) * scale).to(dtype) for f in (torch.cos, torch.sin))
        # (x, y) turns into (x cos - y sin, y cos + x sin).
        pairs = self._pairs(sin)
        pairs[..., 0, :] = -pairs[..., 0, :]
        self._signed_sin = sin

    def apply(self, heads: torch.Tensor) -> torch.Tensor:
        """Heads [t, groups, heads of a group, hn], rotated."""
        width = self._cos.shape[3]
        if width < heads.shape[3]:
            turned, rest = heads.split([width, heads.shape[3] - width], dim=3)
            return torch.cat([self.apply(turned), rest], dim=3)
        return torch.addcmul(heads * self._cos, self._swapped(heads), self._signed_sin)

    def _swapped(self, heads: torch.Tensor) -> torch.Tensor:
        """Each channel's partner in its place."""
        if self._is_interleaved:
            return heads.unflatten(3, (-1, 2)).flip(4).flatten(3)
        return heads.roll(heads.shape[3] // 2, dims=3)

    def _pairs(self, x: torch.Tensor) -> torch.Tensor:
        """[..., w] as [..., 2, w / 2], a view."""
        if self._is_interleaved:
            return x.unflatten(-1, (-1, 2)).transpose(-1, -2)
        return x.unflatten(-1, (2, -1))


def unrotated(
    heads: torch.Tensor, positions: torch.Tensor, angles: torch.Tensor, is_interleaved: bool
) -> torch.Tensor:
    """Heads [t, groups, hn] that were rotated at positions [t], turned back.

    Args:
        angles: [w], of position 1: they grow evenly.
    """
    back = -positions.to(torch.float32)[:, None, None] * angles.to(torch.float32)
    rotation = Rotation(back, 1.0, is_interleaved, heads.dtype)
    return rotation.apply(heads.unsqueeze(2)).squeeze(2)
