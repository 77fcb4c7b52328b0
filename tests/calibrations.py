"""What a calibration says of a layer, drawn."""

import torch

from pikv_megatron.retention.scorer import Scorer


def drawn_calibration(num_heads: int = 4, num_groups: int = 2, width: int = 8) -> dict:
    generator = torch.Generator().manual_seed(7)
    factor = 0.3 * torch.randn(num_heads, width, width, generator=generator)
    half = torch.arange(width // 2)
    shapes = ((1, 2 * width), (1, 2 * width), (2 * width, 5), (1, 5), (5, 1), (1, 1))
    scorer = Scorer(*(torch.rand(num_groups, *shape, generator=generator) for shape in shapes))
    return {
        "queries.mean": 0.5 * torch.randn(num_heads, width, generator=generator),
        "queries.covariance": factor @ factor.transpose(1, 2),
        "rotary.angles": (100.0 ** (-half / half.numel())).repeat(2),
        "rotary.interleaved": torch.tensor(0),
        "heads.far": torch.tensor([0.0, 0.05, 0.0, 0.9]),
    } | {f"scorer.{name}": part for name, part in scorer._asdict().items()}
