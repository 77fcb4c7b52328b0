"""One forward pass over the tokens of a step.

Legend: T tokens of the pass, padding included, m of this rank's sequences that are fed entirely,
h hidden size, vocab token ids.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from megatron.core.models.gpt import GPTModel

from pikv_megatron.cache.step.step_plan import StepPlan
from pikv_megatron.cache.step.step_rows import StepRow
from pikv_megatron.inference.decode_graphs import DecodeGraphs, check_graphs, record_on_cuda
from pikv_megatron.inference.schedule import Feed, FeedsByRank
from pikv_megatron.transformer.context import PiKVInferenceContext


class ModelRunner:
    """Feeds a model, and keeps the logits that a token is chosen from.

    Args:
        model: built from a spec that went through `pikv_layer_spec`.
        context: its cache.
        vocab_size: ids that may be chosen, the first ones of the model's.

    Attributes:
        graphs: what replays steps that only decode; None: nothing does.

    Raises:
        ValueError: `cuda_graphs` is set and a step of this model cannot be recorded.
    """

    def __init__(self, model: GPTModel, context: PiKVInferenceContext, vocab_size: int):
        self.model = model.eval()
        self.context = context
        self.vocab_size = vocab_size
        context.keep_all_logits()
        self.graphs: DecodeGraphs | None = None
        weight = next(model.parameters())
        if context.pikv_config.cuda_graphs and weight.is_cuda:
            check_graphs(weight.dtype)
            self.graphs = DecodeGraphs(context, self.feed, record_on_cuda())

    def forward(self, feeds: FeedsByRank) -> torch.Tensor:
        """Feed every rank's tokens. A rank without any takes part with one token of padding.

        Returns:
            [m, vocab]: what follows this rank's feeds that are whole, in the order given.
        """
        rows = [[StepRow(feed.sequence.cached, feed.count) for feed in rank] for rank in feeds]
        device = next(self.model.parameters()).device
        self.context.begin_step(rows, device)
        plan, own = self.context.plan, feeds[self.context.rank]
        ids, last = self._token_ids(plan, own).to(device), self._last_tokens(plan, own)
        if plan.prefill.is_anywhere:
            with only_tokens(self.model, last):
                logits = self.feed(ids, plan)[: len(last), 0]
        else:
            feed = self.feed if self.graphs is None else self.graphs.feed
            logits = feed(ids, plan)[0].index_select(0, last)
        self.context.finish_step()
        return logits[:, : self.vocab_size]

    def feed(self, ids: torch.Tensor, plan: StepPlan) -> torch.Tensor:
        """The model's logits [1, T, vocab] of tokens [1, T]."""
        return self.model(
            ids, plan.tokens.positions.unsqueeze(0), None, inference_context=self.context,
            runtime_gather_output=True,
        )

    def _token_ids(self, plan: StepPlan, own: list[Feed]) -> torch.Tensor:
        """[1, T], in the plan's order."""
        tokens = {feed.sequence.cached.slot: feed.tokens for feed in own}
        ids = torch.zeros(1, plan.num_padded, dtype=torch.int64)
        flat = [token for row in plan.rows for token in tokens[row.sequence.slot]]
        ids[0, : plan.num_tokens] = torch.tensor(flat, dtype=torch.int64)
        return ids

    def _last_tokens(self, plan: StepPlan, own: list[Feed]) -> torch.Tensor:
        """[m], places of the last tokens of feeds that are whole."""
        row_of = {row.sequence.slot: number for number, row in enumerate(plan.rows)}
        rows = [row_of[feed.sequence.cached.slot] for feed in own if feed.is_whole]
        return plan.tokens.last_tokens[torch.tensor(rows, dtype=torch.int64)]


@contextmanager
def only_tokens(model: GPTModel, places: torch.Tensor) -> Iterator[None]:
    """Give the output layer, the widest of all, those tokens only: [T, 1, h] -> [1, m, h].

    Where there are none it gets one, as not every output layer takes an empty batch.

    Args:
        model: what is fed meanwhile.
        places: [m], int64, of the tokens in the pass.
    """
    kept = places if len(places) else places.new_zeros(1)
    handle = model.decoder.register_forward_hook(
        lambda decoder, args, hidden_states: hidden_states[kept].transpose(0, 1)
    )
    try:
        yield
    finally:
        handle.remove()
