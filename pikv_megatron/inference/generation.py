"""Text generation over a PiKV cache: what DeepSpeed-Inference's `generate` calls.

Every rank is given the same prompts and returns the same result. Sequences are dealt over the
ranks of the expert-parallel group; a rank runs the hidden states of its own and stores a share of
everyone's KV.
"""

import zlib
from dataclasses import dataclass
from typing import Callable, Iterable, Sequence

import deepspeed.comm as dist
import torch
from megatron.core.models.gpt import GPTModel

from pikv_megatron.cache.step_plan import StepRow
from pikv_megatron.config import PiKVConfig
from pikv_megatron.inference.sampling import SamplingParams, sample, uniform_numbers
from pikv_megatron.inference.sequence import LiveSequence, as_prompts, check_prompts
from pikv_megatron.inference.stopping import StopCriteria
from pikv_megatron.parallel.process_groups import deepspeed_expert_parallel_group
from pikv_megatron.transformer.context import PiKVInferenceContext

TOKENS_OP = "pikv_tokens"


@dataclass(frozen=True)
class GenerationOutput:
    """What was generated, by prompt.

    Attributes:
        token_ids: new tokens, a stop token included.
        logprobs: their natural log-probabilities under the model.
        finish_reasons: "stop", "length" or "cancelled".
    """

    token_ids: list[list[int]]
    logprobs: list[list[float]]
    finish_reasons: list[str]


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
        num_decode_steps: steps of the last call that fed one token a sequence.
    """

    allocated_bytes: int
    dense_bytes: int
    num_decode_steps: int


class PiKVForCausalLM(torch.nn.Module):
    """A Megatron GPT model with PiKV layers, ready for `deepspeed.init_inference`.

    Args:
        model: built from a spec that went through `pikv_layer_spec`.
        pikv: the same configuration.
        vocab_size: ids that may be chosen; default the model's (with tensor parallelism it is
            padded, and the padding must not be chosen).
    """

    def __init__(self, model: GPTModel, pikv: PiKVConfig, vocab_size: int | None = None):
        super().__init__()
        self.model = model.eval()
        self.pikv = pikv
        self.vocab_size = vocab_size or model.vocab_size
        self.max_sequence_length = pikv.max_sequence_length or model.max_sequence_length
        groups = model.pg_collection
        self.ep_group = deepspeed_expert_parallel_group(groups.ep, groups.tp.size())
        self.num_ranks, self.rank = self.ep_group.size(), self.ep_group.rank()
        pikv.num_shards(self.num_ranks)
        self.context: PiKVInferenceContext | None = None
        self._kept: list[LiveSequence] = []
        self._last_token: torch.Tensor | None = None
        self._num_decode_steps = 0
        self._longest = 0
        model.decoder.register_forward_hook(self._keep_last_tokens)

    def forward(self, *args, **kwargs):
        return self.model(*args, **kwargs)

    def reset_cache(self) -> None:
        """Free every sequence that was not kept by `keep_cache`; DeepSpeed calls it first."""
        if self.context is not None and not self._kept:
            self.context.reset()

    def cache_report(self) -> CacheReport:
        """Sizes after the last `generate`.

        Raises:
            ValueError: nothing was generated yet.
        """
        if self.context is None:
            raise ValueError("cache_report: call generate first")
        keys = [layer.window.keys for layer in self.context.layers.values()]
        token_bytes = sum(2 * k.shape[0] * k.shape[3] * k.element_size() for k in keys)
        return CacheReport(
            self.context.allocated_bytes(), token_bytes * self._longest, self._num_decode_steps
        )

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.Tensor | Sequence[Sequence[int]],
        max_new_tokens: int = 64,
        sampling: SamplingParams | None = None,
        stop: StopCriteria | None = None,
        callback: Callable[[StepOutput], Iterable[int] | None] | None = None,
        keep_cache: bool = False,
        resume: bool = False,
    ) -> GenerationOutput:
        """Continue prompts. Called on every rank with the same arguments.

        Args:
            input_ids: prompts, ragged lists of token ids or a tensor [b, s].
            max_new_tokens: most tokens to generate for each.
            sampling: how tokens are chosen; default greedy.
            stop: when a sequence ends; default only by length.
            callback: told of every step, on every rank; may return the prompts to cancel.
            keep_cache: leave the sequences in the cache for a next turn.
            resume: the prompts continue the sequences that the last call kept, in order.

        Raises:
            ValueError: a prompt is empty or too long, the ranks were given different prompts, or
                `resume` meets another number of sequences than was kept.
        """
        prompts = as_prompts(input_ids)
        sampling = sampling or SamplingParams()
        kept, self._kept = (self._kept, []) if resume else ([], [])
        if resume and len(kept) != len(prompts):
            raise ValueError(
                f"resume: {len(kept)} sequences were kept, {len(prompts)} prompts came"
            )
        cached = [s.cached.length + len(s.pending) for s in kept] or [0] * len(prompts)
        check_prompts(prompts, max_new_tokens, self.vocab_size, cached, self.max_sequence_length)
        self._check_same_on_all_ranks(prompts, max_new_tokens, sampling)
        if stop is not None:
            stop.reset()
        try:
            sequences = self._start(prompts, kept)
            self._reserve(sequences, max_new_tokens)
            self._run(sequences, max_new_tokens, sampling, stop, callback, keep_cache)
        except BaseException:
            if self.context is not None:
                self.context.reset()
            raise
        if keep_cache:
            self._kept = sequences
        return GenerationOutput(
            [s.token_ids for s in sequences],
            [s.logprobs for s in sequences],
            [s.finish_reason for s in sequences],
        )

    def _start(self, prompts, kept: list[LiveSequence]) -> list[LiveSequence]:
        if kept:
            return [s.next_turn(prompt) for s, prompt in zip(kept, prompts)]
        rows = -(-len(prompts) // self.num_ranks)
        if self.context is None or self.context.max_batch_size < rows:
            self.context = PiKVInferenceContext(
                rows, self.max_sequence_length, self.pikv, self.ep_group
            )
        self.context.reset()
        homes = [index % self.num_ranks for index in range(len(prompts))]
        return [
            LiveSequence(index, home, self.context.start(home), prompt, list(prompt))
            for index, (prompt, home) in enumerate(zip(prompts, homes))
        ]

    def _reserve(self, sequences: list[LiveSequence], max_new_tokens: int) -> None:
        lengths = [s.cached.length + len(s.pending) + max_new_tokens for s in sequences]
        self._longest = sum(lengths)
        self.context.reserve([(s.cached, length) for s, length in zip(sequences, lengths)])

    def _run(self, sequences, max_new_tokens, sampling, stop, callback, keep_cache) -> None:
        self._num_decode_steps = step = 0
        in_prefill = list(sequences)
        while True:
            rows = in_prefill or [s for s in sequences if not s.finish_reason]
            if not rows:
                return
            self._num_decode_steps += not in_prefill
            chosen = self._step(rows, sampling)
            in_prefill = [s for s in in_prefill if s.index not in chosen]
            tokens: list[int | None] = [None] * len(sequences)
            for index, (token_id, logprob) in chosen.items():
                sequences[index].take(token_id, logprob)
                tokens[index] = token_id
            cancelled = set(callback(StepOutput(step, tokens)) or ()) if callback else set()
            self._finish(sequences, tokens, max_new_tokens, stop, cancelled, keep_cache)
            in_prefill = [s for s in in_prefill if not s.finish_reason]
            step += 1

    def _finish(self, sequences, tokens, max_new_tokens, stop, cancelled, keep_cache) -> None:
        """End the sequences that are done and free what they hold."""
        for sequence, token_id in zip(sequences, tokens):
            if sequence.finish_reason:
                continue
            if token_id is not None and stop is not None:
                sequence.finish_reason = stop.update(sequence.index, token_id) or ""
            if not sequence.finish_reason and len(sequence.token_ids) == max_new_tokens:
                sequence.finish_reason = "length"
            if not sequence.finish_reason and sequence.index in cancelled:
                sequence.finish_reason = "cancelled"
            if sequence.finish_reason and not keep_cache:
                self.context.release(sequence.cached)

    def _step(self, rows: list[LiveSequence], sampling) -> dict[int, tuple[int, float]]:
        """Feed every row's pending tokens (a chunk of them in prefill), choose next tokens.

        Returns the token and log-probability by prompt index, of rows that were fed entirely.
        """
        chunk = self.pikv.prefill_chunk_size or self.max_sequence_length
        by_rank = [[s for s in rows if s.home == rank] for rank in range(self.num_ranks)]
        fed = {s.index: s.pending[:chunk] for s in rows}
        logits = self._forward(by_rank, fed)
        for s in rows:
            s.pending = s.pending[chunk:]
        chosen = self._choose(by_rank[self.rank], logits, sampling)
        chosen = self._exchange(chosen, max(map(len, by_rank)))
        return {
            s.index: (int(token_id), logprob)
            for rank, own in enumerate(by_rank)
            for s, (token_id, logprob) in zip(own, chosen[rank])
            if not s.pending
        }

    def _forward(self, by_rank: list[list[LiveSequence]], fed: dict[int, list[int]]):
        """Logits [n, vocab] behind each row's last fed token, rows of this rank."""
        steps = [[StepRow(s.cached, len(fed[s.index])) for s in own] for own in by_rank]
        own, device = by_rank[self.rank], next(self.model.parameters()).device
        self.context.begin_step(steps, device)
        plan = self.context.plan
        ids = torch.zeros(plan.max_rows, plan.seq_len, dtype=torch.int64)
        for row, s in enumerate(own):
            ids[row, : len(fed[s.index])] = torch.tensor(fed[s.index])
        positions = torch.zeros(plan.max_rows, plan.seq_len, dtype=torch.int64, device=device)
        positions[: len(own)] = plan.positions.t().clamp(max=self.max_sequence_length - 1)
        last = [len(fed[s.index]) - 1 for s in own] + [0] * (plan.max_rows - len(own))
        self._last_token = torch.tensor(last, device=device)
        try:
            logits = self.model(
                ids.to(device), positions, None, inference_context=self.context,
                runtime_gather_output=True,
            )
        finally:
            self._last_token = None
        self.context.finish_step()
        return logits[: len(own), -1, : self.vocab_size]

    def _keep_last_tokens(self, decoder, args, hidden_states):
        """Rows end at different places: [sq, b, h] -> [1, b, h], each row's last fed token."""
        if self._last_token is None:
            return None
        rows = torch.arange(hidden_states.shape[1], device=hidden_states.device)
        return hidden_states[self._last_token, rows].unsqueeze(0)

    def _choose(self, own: list[LiveSequence], logits, sampling) -> torch.Tensor:
        """[n, 2], float64: token and log-probability for each row of this rank."""
        if not own:
            return torch.zeros(0, 2, dtype=torch.float64, device=logits.device)
        uniform = previous = None
        if not sampling.is_greedy:
            indices, drawn = ([s.index for s in own], [len(s.token_ids) for s in own])
            uniform = uniform_numbers(sampling.seed, torch.tensor(indices), torch.tensor(drawn))
            uniform = uniform.to(logits.device)
        if sampling.repetition_penalty != 1.0:
            previous = torch.zeros_like(logits, dtype=torch.bool)
            for row, s in enumerate(own):
                previous[row, torch.tensor(s.history + s.token_ids)] = True
        tokens, logprobs = sample(logits, sampling, uniform, previous)
        return torch.stack([tokens.double(), logprobs.double()], dim=1)

    def _exchange(self, chosen: torch.Tensor, most: int) -> list[list[list[float]]]:
        """Every rank's choices; one small collective a step."""
        if self.num_ranks == 1:
            return [chosen.tolist()]
        padded = chosen.new_zeros(most, 2)
        padded[: chosen.shape[0]] = chosen
        gathered = chosen.new_empty(self.num_ranks * most, 2)
        dist.all_gather_into_tensor(gathered, padded, group=self.ep_group, log_name=TOKENS_OP)
        return gathered.view(self.num_ranks, most, 2).tolist()

    def _check_same_on_all_ranks(self, prompts, max_new_tokens, sampling) -> None:
        if self.num_ranks == 1:
            return
        digest = zlib.crc32(repr((prompts, max_new_tokens, sampling)).encode())
        device = next(self.model.parameters()).device
        mine = torch.tensor([digest], dtype=torch.int64, device=device)
        every = mine.new_empty(self.num_ranks)
        dist.all_gather_into_tensor(every, mine, group=self.ep_group, log_name=TOKENS_OP)
        if len(set(every.tolist())) > 1:
            raise ValueError("input_ids: every rank must be given the same prompts and settings")
