"""Any `ScorerPress` of NVIDIA kvpress as a retention policy (https://github.com/NVIDIA/kvpress).

A press scores the tokens of a prompt once, by KV head. A page is worth the mean over its tokens and
heads, as kvpress's own `ChunkKVPress` takes it; what is decoded later has no score, and stays. A
press sees the tokens that one forward pass feeds: with a `prefill_chunk_size` of the whole prompt
it scores what it would in kvpress, with a shorter one each chunk by itself.

Legend: t tokens, ng KV heads, w width of a head, r sequences, m columns.
"""

from types import SimpleNamespace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BeforeValidator, Field

from pikv_megatron.retention.base import RetentionOptions, RetentionPolicy
from pikv_megatron.retention.prompt import Prompt

EXTRA = "pip install pikv-megatron[kvpress]"
Parameter = tuple[str, bool | int | float | str | None]


def _pairs(value: Any) -> Any:
    """A mapping as a tuple, which can be a key."""
    return tuple(sorted(value.items())) if isinstance(value, dict) else value


class KVPressOptions(RetentionOptions):
    """Pages whose tokens a scorer of NVIDIA kvpress ranks best stay (extra `kvpress`)."""

    name: Literal["kvpress"] = "kvpress"
    press: str = Field("SnapKVPress", description="class in `kvpress`")
    parameters: Annotated[tuple[Parameter, ...], BeforeValidator(_pairs)] = Field(
        (), description="of the press, a mapping; the budget takes the place of compression_ratio"
    )

    needs_scores: ClassVar[bool] = True
    extra: ClassVar[str | None] = "kvpress"

    def build(self, fitted=None):
        return KVPressPolicy(_new_press(self.press, dict(self.parameters)))


class KVPressPolicy(RetentionPolicy):
    """Scores are a press's.

    Args:
        press: a `kvpress.ScorerPress`.
    """

    num_scores = 1

    def __init__(self, press: Any):
        self._press = press
        # Presses that look back over a window, or leave out the first tokens, need more than those.
        needs = (getattr(press, name, 0) for name in ("window_size", "n_sink"))
        self._most_too_short = max(needs)

    def utility(self, stats):
        return stats.score.squeeze(2)

    @torch.no_grad()
    def score(self, prompt: Prompt) -> torch.Tensor:
        if len(prompt.hidden) <= self._most_too_short:
            return prompt.hidden.new_full((len(prompt.hidden),), torch.inf, dtype=torch.float32)
        positions = torch.arange(len(prompt.hidden), device=prompt.hidden.device)
        module = _PressModule(prompt)
        keys, values = (x.transpose(0, 1).unsqueeze(0) for x in (prompt.keys, prompt.values))
        hidden = prompt.hidden.unsqueeze(0)
        embeddings = module.rotary_emb(hidden, positions.unsqueeze(0))
        kwargs = {"hidden_states": hidden, "position_embeddings": embeddings}
        scores = self._press.score(module, hidden, keys, values, None, kwargs)
        return scores[0].float().mean(dim=0)


class _PressModule:
    """What presses use of an attention module of `transformers`, in terms of a `Prompt`."""

    def __init__(self, prompt: Prompt):
        sizes, self._prompt = prompt.sizes, prompt
        self.layer_idx, self.head_dim = sizes.number, sizes.head_width
        self.num_key_value_groups = sizes.num_heads // sizes.num_groups
        self.config = SimpleNamespace(
            num_attention_heads=sizes.num_heads, num_key_value_heads=sizes.num_groups,
            hidden_size=sizes.hidden_size, num_hidden_layers=sizes.num_layers,
            head_dim=sizes.head_width,
        )

    def q_proj(self, hidden: torch.Tensor) -> torch.Tensor:
        """[1, t, h] -> [1, t, np * w]."""
        return self._prompt.project(hidden[0])[0].flatten(1).unsqueeze(0)

    def k_proj(self, hidden: torch.Tensor) -> torch.Tensor:
        """[1, t, h] -> [1, t, ng * w]."""
        return self._prompt.project(hidden[0])[1].flatten(1).unsqueeze(0)

    def rotary_emb(self, x: torch.Tensor, position_ids: torch.Tensor):
        """Cosines and sines [1, t, w]; a press counts positions from the chunk's first token."""
        angles = self._prompt.angles(position_ids[0] + self._prompt.past).unsqueeze(0)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def _new_press(name: str, parameters: dict[str, Any]) -> Any:
    """A press, if all that it needs can be given.

    Raises:
        ValueError: kvpress is not installed, or the press is unknown or needs something else.
    """
    try:
        import kvpress
    except ImportError as error:
        raise ValueError(f"retention kvpress: {EXTRA} ({error})") from error
    kind = getattr(kvpress, name, None)
    if not (isinstance(kind, type) and issubclass(kind, kvpress.ScorerPress)):
        raise ValueError(f"retention.press {name}: kvpress has no ScorerPress of that name")
    if kind.score is kvpress.ScorerPress.score:
        raise ValueError(f"retention.press {name} scores nothing: name one that does")
    if kind is kvpress.ObservedAttentionPress:
        raise ValueError(f"retention.press {name} needs all attention weights: try SnapKVPress")
    if kind.compress is not kvpress.ScorerPress.compress:
        raise ValueError(
            f"retention.press {name} drops tokens in a way of its own, and pages are dropped by "
            "the budget: name the press whose scores it takes, and a budget"
        )
    if kind.post_init_from_model is not kvpress.BasePress.post_init_from_model:
        raise ValueError(
            f"retention.press {name} is fitted to a model of `transformers`, which is not there"
        )
    try:
        return kind(**parameters)
    except (TypeError, AssertionError, ValueError) as error:
        raise ValueError(f"retention.parameters of {name}: {error}") from error
