"""Whether a calibration file was made of this very model.

Shapes say little: a fine-tuned model has those of its base. What layers make of values is compared,
whatever the type of the weights and the number of ranks.
"""

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from pikv_megatron.calibrated import REMEDIES, Calibrated

NAME = "model.outputs"
# Of 16-bit weights beside their own float32 ones.
TOLERANCE = 0.01


def output_norms(attention: torch.nn.Module) -> Tensor:
    """[ng, w_v], float32: how much of the layer's output each number of a cached value makes."""
    return attention.value_outputs().detach().float().square().sum(dim=(1, 3)).sqrt()


def check_calibrated_model(calibrated: Calibrated, model: GPTModel) -> None:
    """See that a file is of this model.

    Raises:
        ValueError: it is of another one, which is named.
    """
    path, key, manifest, layers = calibrated
    for number, layer in layers.items():
        if number >= len(model.decoder.layers):
            is_same = False
        else:
            own = output_norms(model.decoder.layers[number].self_attention).cpu()
            fitted = layer[NAME]
            is_same = own.shape == fitted.shape and torch.allclose(
                own, fitted, rtol=TOLERANCE, atol=1e-6
            )
        if not is_same:
            raise ValueError(
                f"{key} {path}: it was made of the model {manifest.get('model')!r}, and layer "
                f"{number} of this one has other weights: {REMEDIES[key]}"
            )
