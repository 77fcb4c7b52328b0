"""Continuous batching: sequences of any age and any settings share every forward pass.

Every rank of the expert-parallel group makes the same calls with the same arguments. A rank runs
the hidden states of its own sequences and stores a share of everyone's KV.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import chain
from math import isnan
from pathlib import Path

import deepspeed.comm as dist
import torch
from megatron.core.models.gpt import GPTModel

from pikv_megatron.cache.step.step_rows import CachedSequence
from pikv_megatron.cache.tiers.disk_tier import Loss
from pikv_megatron.config import PiKVConfig
from pikv_megatron.inference.homes import deal_homes
from pikv_megatron.inference.learned import save_learned
from pikv_megatron.inference.model_runner import ModelRunner
from pikv_megatron.inference.outputs import EngineStep
from pikv_megatron.inference.request import Request, check_requests
from pikv_megatron.inference.schedule import FeedsByRank, schedule
from pikv_megatron.inference.sequence import LiveSequence
from pikv_megatron.inference.token_choice import choose_tokens
from pikv_megatron.inference.token_exchange import exchange_tokens
from pikv_megatron.transformer.context import PiKVInferenceContext


class Engine:
    """Takes requests at any time and moves all of them on by one forward pass a step.

    Args:
        model: built from a spec that went through `pikv_layer_spec`.
        pikv: the same configuration.
        ep_group: the expert-parallel group.
        vocab_size: ids that may be chosen.
        max_sequence_length: tokens that a sequence can have.
        max_batch_size: sequences that each home rank holds at once.

    Attributes:
        context: the cache.
        running: sequences by id, the first come first.
        kept: ended sequences that stay in the cache, by id.
    """

    def __init__(
        self, model: GPTModel, pikv: PiKVConfig, ep_group: dist.ProcessGroup, vocab_size: int,
        max_sequence_length: int, max_batch_size: int,
    ):
        self.context = PiKVInferenceContext.for_model(
            model, pikv, max_batch_size, max_sequence_length, ep_group
        )
        self.context.tiers.is_driven = True
        self.running: dict[int, LiveSequence] = {}
        self.kept: dict[int, LiveSequence] = {}
        self._ep_group = ep_group
        self._prefill_chunk_size = pikv.prefill_chunk_size
        self._runner = ModelRunner(model, self.context, vocab_size)
        self._next_id = 0

    def reserve(self, num_sequences: int, num_tokens: int) -> None:
        """Take the memory of sequences to come before the first of them does.

        On a CPU pools grow where they are. On a GPU what they hold is copied when they grow, so a
        server reserves once, for as many sequences as it is to run at once.

        Args:
            num_sequences: of all ranks, besides those that are running.
            num_tokens: of each, new ones included.

        Raises:
            ValueError: there is no place for so many or such long sequences, or `memory_limit` is
                less than they take; nothing has changed.
        """
        if num_tokens > self.context.max_sequence_length:
            raise ValueError(
                f"num_tokens {num_tokens} exceeds max_sequence_length "
                f"{self.context.max_sequence_length}"
            )
        coming = [self.context.start(home) for home in self._homes(num_sequences)]
        try:
            self._reserve([(sequence, num_tokens) for sequence in coming])
        finally:
            for sequence in coming:
                self.context.release(sequence)

    def add(self, requests: Sequence[Request]) -> list[int]:
        """Take requests, all of them or none; the ids of their sequences.

        The pages of the whole length are reserved now: a step that lacked some would end them all.

        Raises:
            ValueError: a request can't be served, or there is no place for all of them; nothing
                has changed.
        """
        self._check(requests)
        homes = iter(self._homes(sum(request.resumes is None for request in requests)))
        added = [
            self._begin(request, next(homes)) if request.resumes is None
            else self.kept[request.resumes].next_turn(request)
            for request in requests
        ]
        try:
            self._reserve([(sequence.cached, sequence.final_length) for sequence in added])
        except BaseException:
            for sequence in added:
                if sequence.id not in self.kept:
                    self.context.release(sequence.cached)
            raise
        for sequence in added:
            self.kept.pop(sequence.id, None)
            self.running[sequence.id] = sequence
        return [sequence.id for sequence in added]

    @torch.no_grad()
    def step(self) -> EngineStep:
        """One forward pass; without a running sequence there is none.

        A sequence that was to read a page that is lost ends with an error, and is not kept.

        An exception ends every sequence: a cache that was written by half a step is of no use.

        Raises:
            ValueError: a token's logits are not numbers.
        """
        feeds = schedule(self.running.values(), self.context.num_ranks, self._prefill_chunk_size)
        try:
            return self._feed(feeds) if any(feeds) else EngineStep({}, {}, {}, 0)
        except BaseException:
            self.reset()
            raise

    def cancel(self, sequence_id: int) -> None:
        """End a running sequence. Its pages are free at once, unless it is to be kept.

        Raises:
            ValueError: it is not running.
        """
        if sequence_id not in self.running:
            raise ValueError(
                f"sequence_id {sequence_id} is not running: cancel one of {list(self.running)}"
            )
        self._end(self.running[sequence_id])

    def release(self, sequence_id: int) -> None:
        """Free the pages of a kept sequence.

        Raises:
            ValueError: it was not kept.
        """
        if sequence_id not in self.kept:
            raise ValueError(
                f"sequence_id {sequence_id} was not kept: release one of {list(self.kept)}"
            )
        self.context.release(self.kept.pop(sequence_id).cached)

    def shrink(self) -> None:
        """Give back the memory of pages that no sequence has or will need.

        What is kept is copied once, pool by pool.
        """
        self.context.compact()
        self._reserve()

    def save_learned(self, path: Path, model_name: str) -> None:
        """Write what routers have learned, for a later run whose configuration names the file under
        `learned`. Called on every rank.

        Args:
            model_name: for whoever meets the file with another model.

        Raises:
            ValueError: no router keeps what it learns.
        """
        save_learned(path, model_name, self._runner.model, self.context)

    def reset(self) -> None:
        """End every sequence, and forget those that were kept."""
        self.context.reset()
        self.running.clear()
        self.kept.clear()

    def _check(self, requests: Sequence[Request]) -> None:
        resumed = [r.resumes for r in requests if r.resumes is not None]
        for sequence_id in resumed:
            if sequence_id not in self.kept or resumed.count(sequence_id) > 1:
                raise ValueError(
                    f"resumes {sequence_id}: name a sequence that was kept, once; kept are "
                    f"{list(self.kept)}"
                )
        cached = [0 if r.resumes is None else self.kept[r.resumes].num_tokens for r in requests]
        check_requests(
            requests, cached, self._runner.vocab_size, self.context.max_sequence_length
        )

    def _homes(self, count: int) -> list[int]:
        held = Counter(s.home for s in (*self.running.values(), *self.kept.values()))
        return deal_homes(count, held, self.context.num_ranks, self.context.max_batch_size)

    def _begin(self, request: Request, home: int) -> LiveSequence:
        self._next_id += 1
        return LiveSequence.begin(self._next_id - 1, home, self.context.start(home), request)

    def _reserve(self, coming: Sequence[tuple[CachedSequence, int]] = ()) -> None:
        """Allocate what running sequences still lack, too: those that come must not take it."""
        running = [(s.cached, s.final_length) for s in self.running.values()]
        self.context.reserve([*running, *coming])

    def _feed(self, feeds: FeedsByRank) -> EngineStep:
        num_prompt_tokens = sum(
            feed.count for feed in chain(*feeds) if not feed.sequence.is_decoding
        )
        ends = [[feed.sequence for feed in rank if feed.is_whole] for rank in feeds]
        logits = self._runner.forward(feeds)
        for feed in chain(*feeds):
            del feed.sequence.pending[: feed.count]
        chosen = choose_tokens(ends[self.context.rank], logits)
        running = list(self.running.values())
        pairs, losses = exchange_tokens(
            chosen, [len(rank) for rank in ends], self._ep_group,
            self.context.tiers.take_losses([sequence.cached.slot for sequence in running]),
        )
        step = EngineStep({}, {}, {}, num_prompt_tokens, self.context.tiers.take_recalled())
        for rank, of_rank in enumerate(losses):
            for sequence, loss in zip(running, of_rank):
                if loss and sequence.id in self.running:
                    self._fail(sequence, rank, Loss(loss), step)
        for sequence, (token, logprob) in zip(chain(*ends), chain(*pairs)):
            if sequence.id in step.errors:
                continue
            if isnan(logprob):
                raise ValueError(
                    f"logits of sequence {sequence.id} are not numbers after "
                    f"{len(sequence.history)} tokens: a weight is NaN or infinite, or its type is "
                    "too narrow for the activations"
                )
            self._take(sequence, int(token), logprob, step)
        return step

    def _take(self, sequence: LiveSequence, token: int, logprob: float, step: EngineStep) -> None:
        step.token_ids[sequence.id], step.logprobs[sequence.id] = token, logprob
        reason = sequence.take(token)
        if reason:
            step.finish_reasons[sequence.id] = reason
            self._end(sequence)

    def _fail(self, sequence: LiveSequence, rank: int, loss: Loss, step: EngineStep) -> None:
        """End a sequence that was to read a page that is lost; others have all of theirs."""
        step.finish_reasons[sequence.id] = "error"
        step.errors[sequence.id] = (
            f"after {sequence.num_new} new tokens, a page on rank {rank} of those that decode "
            f"together could not be read: {loss.said}"
        )
        del self.running[sequence.id]
        self.context.release(sequence.cached)

    def _end(self, sequence: LiveSequence) -> None:
        del self.running[sequence.id]
        if sequence.request.keep_cache:
            self.kept[sequence.id] = sequence
        else:
            self.context.release(sequence.cached)
