"""Everything that is watched of a run, and the figures that it comes to."""

import math

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from pikv_megatron.cache.layer_cache import LayerCache
from pikv_megatron.evaluation.figures import Figures
from pikv_megatron.evaluation.probes.attention_mass import (
    MOST_SEQUENCES,
    MOST_STEPS,
    AttentionMass,
)
from pikv_megatron.evaluation.probes.certified_bounds import CertifiedBounds
from pikv_megatron.evaluation.probes.codec_errors import CodecErrors
from pikv_megatron.evaluation.probes.expert_traffic import ExpertTraffic
from pikv_megatron.evaluation.probes.held_tokens import HeldTokens
from pikv_megatron.evaluation.probes.page_counter import PageCounter
from pikv_megatron.evaluation.probes.sent_bytes import SentBytes
from pikv_megatron.evaluation.task import Task
from pikv_megatron.evaluation.teacher_forcing import Watcher
from pikv_megatron.transformer.context import PiKVInferenceContext

DENSE_BYTES = 2  # of a number of a dense cache, bfloat16


class Watch(Watcher):
    """Watches a context on one task.

    Attention masses are measured on the first batch, `MOST_STEPS` steps of it; these steps are not
    timed, nor are those whose traffic is counted.

    Args:
        model: that is run.
        context: its cache.
    """

    def __init__(self, model: GPTModel, context: PiKVInferenceContext):
        self._context = context
        self._shapes = [layer.spec.kv for layer in context.layers.values()]
        self._device = self._shapes[0].device
        self._pages, self._held = PageCounter(context), HeldTokens(context)
        self._mass, self._errors = AttentionMass(context), CodecErrors(context)
        self._bounds = CertifiedBounds(context)
        self._traffic = ExpertTraffic(model, context)
        self._sent = SentBytes(context.pikv_config.flush_interval)
        self._pages.on_read = self._mass.mark
        self._seconds: list[float] = []
        self._probed: set[int] | None = None
        self._largest = 0
        self._num_sequences = 0
        self._dense_tokens = 0  # held by the largest batch
        self._dense_reads = self._num_reads = 0

    def start(self, sequences, own, task):
        self._sequences, self._own, self._task = sequences, own, task
        self._num_sequences = max(self._num_sequences, len(sequences))
        self._dense_tokens = max(self._dense_tokens, task.ids.numel())
        is_first = self._probed is None
        self._probed = _spread(task) if is_first and len(sequences) <= MOST_SEQUENCES else set()
        if self._probed:
            self._mass.begin(own, task.ids.shape[1])
        self._traffic.open()

    def before(self, place):
        self._traffic.close()
        self._pages.count_step(self._own)
        self._pages.is_on = True
        self._dense_reads += len(self._sequences) * (self._task.prompt_len + place)
        self._num_reads += len(self._sequences)
        if place in self._probed:
            self._mass.probe()
        self._sent.before(place)

    def after(self, place, seconds):
        is_timed = not self._sent.is_on and place not in self._probed
        self._sent.end()
        self._pages.is_on = False
        if place in self._probed:
            self._mass.measure()
        if is_timed:
            self._seconds.append(seconds)

    def end(self):
        self._traffic.close()
        self._mass.end()
        self._pages.count_end()
        self._held.count_end(self._own, self._task.ids.shape[1])
        self._largest = max(self._largest, self._context.allocated_bytes())

    def figures(self, judged: Tensor) -> Figures:
        """Called on every rank, with what it judged; see `Judge.sums`."""
        count, right, loss, divergence, answers, exact, sequences, agreed = self._sum(
            judged.to(self._device)
        ).tolist()
        read, held, kept, sealed, read_bytes = map(self._sum, self._pages.counts())
        by_shard, by_position, filled = map(self._sum, self._held.counts())
        lost, whole = map(self._sum, (self._errors.lost, self._errors.whole))
        mass, probes = self._sum(self._mass.mass), self._sum(self._mass.count)
        sent, num_sent = self._total([self._sent.num_bytes, self._sent.num_steps])
        seconds, num_timed = self._total([sum(self._seconds), len(self._seconds)])
        token_bytes = DENSE_BYTES * sum(kv.token_numbers for kv in self._shapes)
        return Figures(
            num_answers=round(answers),
            exact=exact / answers,
            num_judged=round(count),
            accuracy=right / count,
            perplexity=math.exp(loss / count),
            divergence=divergence / count,
            agreed_tokens=agreed / sequences,
            pages_read=_shares(read, held),
            pages_kept=_shares(kept, sealed),
            mass_read=self._by_layer((mass / probes).tolist(), 1.0) if int(probes) else [],
            bounds=self._most(self._bounds.most).tolist() if self._bounds.is_certified else [],
            held_bytes=int(self._most(torch.tensor(self._largest, device=self._device))),
            dense_bytes=token_bytes * self._dense_tokens,
            read_bytes=int(read_bytes.sum()) / max(1, self._num_reads),
            dense_read_bytes=token_bytes * self._dense_reads / max(1, self._num_reads),
            token_bytes=self._page_bytes_a_token(),
            errors=(lost / whole.clamp(min=1e-300)).sqrt().tolist(),
            sent_bytes=sent / max(1, num_sent),
            step_ms=1000 * seconds / max(1, num_timed),
            batch_size=self._num_sequences,
            tokens_by_shard=by_shard.tolist(),
            kept_by_position=torch.where(filled > 0, by_position / filled.clamp(min=1), -1.0)
            .tolist(),
            tokens_by_expert=self._sum(self._traffic.tokens).tolist(),
        )

    def _by_layer(self, values: list[float], otherwise: float) -> list[float]:
        """A layer without pages reads all that it is to read."""
        layers = self._context.layers.values()
        return [v if isinstance(x, LayerCache) else otherwise for v, x in zip(values, layers)]

    def _page_bytes_a_token(self) -> float:
        """Of the pools of all layers that have any, for a token that they have room for."""
        pools = [layer.store.pool for layer in self._context.sharded_layers]
        return sum(sum(t.nbytes for t in p.tensors()) / p.position.numel() for p in pools)

    def _total(self, numbers: list[float]) -> list[float]:
        """Over the ranks."""
        numbers = torch.tensor(numbers, dtype=torch.float64, device=self._device)
        return self._sum(numbers).tolist()

    def _sum(self, numbers: Tensor) -> Tensor:
        """Over the ranks."""
        if self._context.ep_group is not None:
            numbers = numbers.clone()
            dist.all_reduce(numbers, group=self._context.ep_group)
        return numbers

    def _most(self, numbers: Tensor) -> Tensor:
        """Over the ranks."""
        if self._context.ep_group is not None:
            numbers = numbers.clone()
            dist.all_reduce(numbers, op=dist.ReduceOp.MAX, group=self._context.ep_group)
        return numbers


def _spread(task: Task) -> set[int]:
    """Places of a few judged tokens that are decoded, evenly spread."""
    places = (task.is_judged.any(0)[1:].nonzero().flatten() + 1).tolist()
    count = min(MOST_STEPS, len(places))
    return {places[i * len(places) // count] for i in range(count)}


def _shares(part: Tensor, whole: Tensor) -> list[float]:
    """Where there was no page, all of them were read and kept."""
    return torch.where(whole > 0, part / whole.clamp(min=1), 1.0).tolist()
