"""Latent attention with a router of sigmoid scores: a bias chooses, in groups of experts."""

from abc import abstractmethod

from pikv_megatron.checkpoint.families.base import TensorNames, expert_groups, sigmoid_router
from pikv_megatron.checkpoint.families.latent import LatentFamily, shared_experts, written_latent


class LatentSigmoidFamily(LatentFamily):
    """What DeepSeek-V3 and those after it have in common."""

    has_prediction_layers = True
    names = TensorNames(expert_bias=("gate.e_score_correction_bias",) * 2)

    @abstractmethod
    def dense_layers(self, fields) -> dict:
        """Which layers have no experts, as fields of the architecture."""

    @abstractmethod
    def written_dense_layers(self, architecture) -> dict:
        """The same, as the family's own fields."""

    def experts(self, fields):
        return {
            **shared_experts(fields),
            **sigmoid_router(fields, "routed_scaling_factor"),
            **expert_groups(fields),
            **self.dense_layers(fields),
        }

    def refuse_unsupported(self, fields):
        super().refuse_unsupported(fields)
        fields.refuse("norm_topk_prob", True, "sigmoid scores are always normalised, set it true")
        fields.refuse("topk_method", "noaux_tc", "experts are chosen with a bias, noaux_tc")

    def write(self, architecture):
        return {
            **written_latent(architecture),
            **self.written_dense_layers(architecture),
            "norm_topk_prob": True,
        }
