"""A calibrated gate: where a query will attend, told by the input of its layer's attention.

Legend: t tokens, h hidden size, E experts on all ranks.
"""

from typing import Mapping

from torch import Tensor

from pikv_megatron.calibrated import section

# Share of the attention: a linear map can fall below 0, and shares become logits.
LEAST = 1e-4


class LinearGate:
    """Predicts the attention to the tokens of each expert, by ridge regression (`GateFit`).

    Args:
        fitted: what was calibrated of the layer, by name; None: nothing was.

    Raises:
        ValueError: there is no gate for the layer.
    """

    def __init__(self, fitted: Mapping[str, Tensor] | None):
        own = section(fitted, "router.source gate", "gate")
        self._weight, self._bias = own["weight"], own["bias"]

    def __call__(self, hidden: Tensor) -> Tensor:
        """[t, E], float32, of 1, for hidden states [t, h]."""
        mass = (hidden.float() @ self._weight + self._bias).clamp(min=LEAST)
        return mass / mass.sum(dim=1, keepdim=True)
