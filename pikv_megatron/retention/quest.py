"""An MLP tells from keys and values which pages will be looked at (paper, Table 3, S_QUEST: u =
MLP_theta([K_i, V_i]), with a threshold).

Not the bounding boxes of the paper Quest, which are a sketch here: `sketch: bounding_box`.
"""

from typing import ClassVar, Literal

from pydantic import Field

from pikv_megatron.calibrated import section
from pikv_megatron.retention.base import RetentionOptions, RetentionPolicy
from pikv_megatron.retention.fitted import Rotary
from pikv_megatron.retention.scorer import Scorer, features


class QuestOptions(RetentionOptions):
    """Pages stay in which a calibrated MLP sees a token that far queries will attend to."""

    name: Literal["quest"] = "quest"
    threshold: float = Field(
        0.0, ge=0, le=1,
        description="share of a far query's attention; pages whose best token gets less go, "
        "whatever the budget allows",
    )

    needs_calibration: ClassVar[bool] = True

    def build(self, fitted=None):
        asker = f"retention {self.name}"
        scorer, rotary = (section(fitted, asker, part) for part in ("scorer", "rotary"))
        return QuestPolicy(Scorer(**scorer), Rotary(rotary), self.threshold)


class QuestPolicy(RetentionPolicy):
    """A page is worth its best token, in the head that wants it most.

    Args:
        scorer: by KV head; keys are given to it as they were before RoPE, so that a token is worth
            the same wherever it stands.
        rotary: how keys are rotated.
        threshold: see `QuestOptions`.
    """

    num_scores = 1

    def __init__(self, scorer: Scorer, rotary: Rotary, threshold: float):
        self._scorer, self._rotary, self._threshold = scorer, rotary, threshold

    def score_pages(self, keys, values, positions):
        inputs = features(self._rotary.turned_back(keys, positions), values)
        shares = self._scorer.predict(inputs.flatten(1, 2)).exp()
        return shares.unflatten(1, positions.shape).amax(dim=(0, 2)).unsqueeze(1)

    def utility(self, stats):
        return stats.score.squeeze(2)

    def drop(self, stats, limit):
        is_low = self.utility(stats) < self._threshold
        return super().drop(stats, limit) | (stats.is_page & is_low)
