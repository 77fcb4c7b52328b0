"""What the engine and `generate` hand back."""

from dataclasses import dataclass, field

from pikv_megatron.types import Recalled


@dataclass(frozen=True)
class GenerationOutput:
    """What was generated, by prompt.

    Attributes:
        token_ids: new tokens, a stop token included.
        logprobs: their natural log-probabilities under the model.
        finish_reasons: "stop", "length", "cancelled" or "error".
        errors: what ended those with an error; None for others.
    """

    token_ids: list[list[int]]
    logprobs: list[list[float]]
    finish_reasons: list[str]
    errors: list[str | None]


@dataclass(frozen=True)
class StepOutput:
    """One step, for a streaming callback.

    Attributes:
        step: counts from 0.
        tokens: the token chosen for each prompt; None where none was.
    """

    step: int
    tokens: list[int | None]


@dataclass(frozen=True)
class CacheReport:
    """What the cache costs on this rank.

    Attributes:
        allocated_bytes: every tensor of the cache, metadata included.
        dense_bytes: a dense cache of the whole batch, as a stock rank holds it.
        num_decode_steps: steps of the last call in which nothing of a prompt was fed.
        host_bytes: what pages take beside it in the host's memory, where tiers are planned.
        file_bytes: of the files that pages lie in.
        recalled: pages that came back in those steps.
    """

    allocated_bytes: int
    dense_bytes: int
    num_decode_steps: int
    host_bytes: int
    file_bytes: int
    recalled: Recalled


@dataclass(frozen=True)
class EngineStep:
    """What a step did, by sequence id.

    Attributes:
        token_ids: the tokens chosen.
        logprobs: their natural log-probabilities under the model.
        finish_reasons: of the sequences that ended: "stop", "length" or "error".
        num_prompt_tokens: tokens of prompts that were fed, on all ranks.
        recalled: pages that came back to this rank's device.
        errors: what ended sequences with an error.
    """

    token_ids: dict[int, int]
    logprobs: dict[int, float]
    finish_reasons: dict[int, str]
    num_prompt_tokens: int
    recalled: Recalled = Recalled()
    errors: dict[int, str] = field(default_factory=dict)
