"""Shows the windows of a text, layer by layer, to what is fitted to them.

Legend: t tokens, np query heads, ng KV heads, w width, h hidden size, E experts on all ranks.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from pikv_megatron.cache.layer_cache import LayerCache
from pikv_megatron.calibration.registry import FITS
from pikv_megatron.calibration.window import LayerWindow
from pikv_megatron.transformer.cached_attention import by_row
from pikv_megatron.transformer.context import PiKVInferenceContext
from pikv_megatron.transformer.transformer_layer import PiKVLayerMixin

Sums = dict[str, Tensor]  # by layer, fit and name


class Collector:
    """Listens to every layer of a context that has pages, on every rank of its group.

    Args:
        context: whose layers attend, one sequence a rank at a time.
        model: of the context.
        num_tokens: that are fed of a window.
        num_windows: of all ranks.
        per_expert: tokens are to be told apart by their experts wherever that is dear.

    Attributes:
        window: number of the window that this rank feeds; None: it feeds none that counts.
    """

    def __init__(
        self, context: PiKVInferenceContext, model: GPTModel, num_tokens: int, num_windows: int,
        per_expert: bool = False,
    ):
        self.window: int | None = None
        self._group, self._rank = context.ep_group, context.rank
        self._sums: Sums = {}
        self._layers = {
            layer.spec.number - 1: _Listener(
                self, layer, model.decoder.layers[layer.spec.number - 1], num_tokens, num_windows,
                per_expert,
            ) for layer in context.sharded_layers
        }

    def add(self, parts: Sums) -> None:
        """Add what a window gives."""
        for name, part in parts.items():
            self._sums[name] = self._sums[name] + part if name in self._sums else part

    def gather(self) -> Sums:
        """What all ranks have summed up so far, which the first one goes on with; called on all,
        each of which has seen a window."""
        if self._group is not None:
            for name in sorted(self._sums):
                dist.all_reduce(self._sums[name], group=self._group)
        found = dict(self._sums)
        if self._rank:
            self._sums = {name: torch.zeros_like(part) for name, part in found.items()}
        return found

    def restore(self, sums: Sums) -> None:
        """Go on with what `gather` gave."""
        self._sums = {
            name: part if self._rank == 0 else torch.zeros_like(part)
            for name, part in sums.items()
        }

    def close(self) -> None:
        """Stop listening."""
        for listener in self._layers.values():
            listener.close()

    def finish(self) -> dict[int, dict[str, Tensor]]:
        """What was fitted to every layer, by its number from 0."""
        sums = self.gather()
        return {
            number: listener.finish(sums, f"{number}.") for number, listener in
            self._layers.items()
        }


class _Listener:
    """Puts the steps of a layer together to windows.

    A step tells of its input, then of what it attends with, and of its experts at the end.
    """

    def __init__(
        self, owner: Collector, cache: LayerCache, layer: PiKVLayerMixin, num_tokens: int,
        num_windows: int, per_expert: bool,
    ):
        attention = layer.self_attention
        self._owner, self._spec, self._num_tokens = owner, cache.spec, num_tokens
        self._layer, self._per_expert = layer, per_expert
        self._fits = {kind.__name__: kind(attention, num_windows) for kind in FITS}
        self._parts: list[tuple[Tensor, ...]] = []
        self._hidden: Tensor | None = None
        self._attended: tuple[Tensor, ...] = ()
        self._angles: Tensor | None = None
        self._is_interleaved = attention.config.rotary_interleaved
        self._hooks = [
            attention.register_forward_pre_hook(self._hear_input, with_kwargs=True),
            layer.mlp.register_forward_hook(self._end_step),
        ]
        cache.on_attend = self._hear

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def finish(self, sums: Sums, prefix: str) -> dict[str, Tensor]:
        found = {}
        for name, fit in self._fits.items():
            start = f"{prefix}{name}."
            own = {key.removeprefix(start): x for key, x in sums.items() if key.startswith(start)}
            if own:
                found |= fit.finish(own)
        return found

    def _hear(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        """A step's query [t, np, w], key and value [t, ng, w]."""
        self._attended = query, key, value

    def _end_step(self, mlp, args, output) -> None:
        if self._owner.window is None:
            return
        count = len(self._attended[0])
        part = *self._attended, by_row(self._hidden, count)
        choice = self._layer.expert_choice()
        if choice is not None:
            best = choice.best(1)[:count, 0]
            part += (F.one_hot(best, self._layer.config.num_moe_experts).float(),)
        self._parts.append(part)
        if sum(len(part[0]) for part in self._parts) < self._num_tokens:
            return
        query, key, value, hidden, *experts = (torch.cat(parts) for parts in zip(*self._parts))
        self._parts = []
        window = LayerWindow(
            self._owner.window, self._spec.kv, query, key, value, self._spec.softmax_scale,
            self._angles, self._is_interleaved, hidden, *(experts or [None]),
            self._per_expert,
        )
        start = f"{self._spec.number - 1}."
        for name, fit in self._fits.items():
            parts = fit.of(window)
            self._owner.add({f"{start}{name}.{key}": part for key, part in parts.items()})

    def _hear_input(self, attention, args, kwargs) -> None:
        """Hidden states [sq, b, h], and angles by position [positions, 1, 1, w]."""
        self._hidden = args[0]
        if self._spec.kv.values_in_keys:
            return
        table = kwargs.get("rotary_pos_emb")
        table = table[0] if isinstance(table, tuple) else table
        skips = attention.config.no_rope_freq
        if table is None or skips and skips[attention.layer_number - 1]:
            width = self._spec.kv.key_width
            self._angles = torch.zeros(width, device=self._spec.kv.device)
        else:
            self._angles = table[1, 0, 0].float()
