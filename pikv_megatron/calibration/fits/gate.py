"""Which experts' tokens a layer will attend to, by its input: the gate `router.source: gate`.

Legend: t tokens, h hidden size, E experts.
"""

import torch

from pikv_megatron.calibration.fits.base import LayerFit
from pikv_megatron.calibration.window import NEAR, SINKS

# Of the inputs' mean variance.
PENALTY = 1e-3


class GateFit(LayerFit):
    """Ridge regression from the attention's input to the shares of the far attention, mean over
    heads, that the tokens of each expert have. Sums in float64: h * h numbers a layer.

    Shares are of all attention, so that queries that look far count more.
    """

    def of(self, window):
        if window.experts is None:
            return {}
        first = SINKS + NEAR  # queries before it see nothing far
        hidden, mass = (x[first:].double() for x in (window.hidden, window.far.by_expert))
        return {
            "count": torch.tensor(len(hidden), dtype=torch.float64, device=hidden.device),
            "hidden": hidden.sum(dim=0), "mass": mass.sum(dim=0),
            "squares": hidden.T @ hidden, "products": hidden.T @ mass,
        }

    def finish(self, sums):
        count = sums["count"].clamp(min=1)
        hidden, mass = sums["hidden"] / count, sums["mass"] / count
        covariance = sums["squares"] / count - torch.outer(hidden, hidden)
        products = sums["products"] / count - torch.outer(hidden, mass)
        # Where all windows are too short to look far, there is nothing to tell.
        penalty = PENALTY * covariance.diagonal().mean().clamp(min=1e-9)
        covariance.diagonal().add_(penalty)
        weight = torch.linalg.solve(covariance, products)
        return {"gate.weight": weight.float(), "gate.bias": (mass - hidden @ weight).float()}
