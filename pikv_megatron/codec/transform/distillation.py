"""Distillation (paper, Table 2, C_Dis).

Legend: ng KV heads, w width, r rank.
"""

from typing import ClassVar, Literal

import torch

from pikv_megatron.codec.transform.fits import eigh, leading
from pikv_megatron.codec.transform.linear import Factors, LinearOptions

# Directions that no query, and no output, ever looked at may still be looked at later.
FLOOR = 1e-4


class DistillationOptions(LinearOptions):
    """The student that a calibrated layer's queries and output projection tell least from it.

    Keys lose least of the logits, E (q . (k - k^))^2; values least of the layer's output,
    E |(v - v^) W_o|^2: to second order that is the KL divergence of teacher and student. Without a
    calibration, nothing is known of either, and it is as `svd`.
    """

    name: Literal["distillation"] = "distillation"

    is_orthogonal: ClassVar[bool] = False

    def fit_keys(self, moments, rank):
        if moments.metric is None:
            basis = leading(moments.scatter, rank)
            return Factors(moments.mean, basis, basis.transpose(1, 2))
        root, inverse = _roots(moments.metric)
        basis = leading(root @ moments.scatter @ root, rank)
        return Factors(moments.mean, root @ basis, basis.transpose(1, 2) @ inverse)


def _roots(metric: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The symmetric square root of a metric [ng, w, w], kept off zero, and its inverse."""
    values, vectors = eigh(metric)
    values = values.clamp(min=0) + FLOOR * values.mean(dim=1, keepdim=True) + 1e-12
    root = (vectors * values.sqrt().unsqueeze(1)) @ vectors.transpose(1, 2)
    inverse = (vectors * values.rsqrt().unsqueeze(1)) @ vectors.transpose(1, 2)
    return root, inverse
