"""How the demo model is trained: `configs/demo/training.yaml`, checked."""

import math
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

from pikv_megatron.demo.recall import PAIR_LEN, SYMBOLS


class Stage(BaseModel):
    """Some steps on sequences of one kind; `configs/demo/training.yaml` explains the fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: str = Field(pattern="^(drill|needles)$")
    steps: PositiveInt
    lengths: tuple[PositiveInt, ...] = Field(min_length=1)
    recall_tokens: PositiveInt
    text_tokens: PositiveInt
    min_pairs: PositiveInt
    max_pairs: PositiveInt = Field(le=len(SYMBOLS))

    @model_validator(mode="after")
    def _check(self) -> "Stage":
        shortest, longest = min(self.lengths), max(self.lengths)
        if self.min_pairs > self.max_pairs:
            raise ValueError(f"min_pairs {self.min_pairs} exceeds max_pairs {self.max_pairs}")
        if longest > min(self.recall_tokens, self.text_tokens):
            raise ValueError(
                f"a length of {longest} needs at least as many recall_tokens and text_tokens, got "
                f"{self.recall_tokens} and {self.text_tokens}"
            )
        needed = 2 * self.max_pairs * PAIR_LEN  # told once, asked once at most
        if needed > shortest:
            raise ValueError(
                f"max_pairs {self.max_pairs} may take {needed} tokens, lengths has {shortest}"
            )
        return self


class TrainingSettings(BaseModel):
    """Optimizer, first weights and stages. Unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    learning_rate: PositiveFloat
    final_learning_rate: PositiveFloat
    warmup_steps: PositiveInt
    betas: tuple[PositiveFloat, PositiveFloat]
    weight_decay: float = Field(ge=0)
    max_gradient_norm: PositiveFloat
    balance_coefficient: float = Field(ge=0)
    embedding_std: PositiveFloat
    input_std: PositiveFloat
    output_std: PositiveFloat
    stages: tuple[Stage, ...] = Field(min_length=1)

    @classmethod
    def from_yaml(cls, path: str | Path) -> "TrainingSettings":
        """Read and check the file.

        Raises:
            ValueError: it does not hold the keys it must.
        """
        fields = yaml.safe_load(Path(path).read_text())
        if not isinstance(fields, dict):
            raise ValueError(f"{path} must hold keys and values, one a line")
        return cls(**fields)

    @property
    def num_steps(self) -> int:
        """Steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    def scaled(self, share: float) -> "TrainingSettings":
        """The same stages with `share` of their steps, one at least."""
        stages = tuple(
            stage.model_copy(update={"steps": max(1, round(stage.steps * share))})
            for stage in self.stages
        )
        return self.model_copy(update={"stages": stages})

    def learning_rate_at(self, step: int) -> float:
        """Linear warm-up, then a cosine down to the final rate."""
        warm = min(1.0, (step + 1) / self.warmup_steps)
        fall = 0.5 * (1 + math.cos(math.pi * step / self.num_steps))
        return warm * (
            self.final_learning_rate + fall * (self.learning_rate - self.final_learning_rate)
        )
