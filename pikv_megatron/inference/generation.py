"""Text generation over a PiKV cache: what DeepSpeed-Inference's `generate` calls."""

from collections.abc import Sequence
from functools import partial

import torch
from megatron.core.models.gpt import GPTModel

from pikv_megatron.cache.placement import Placement
from pikv_megatron.checkpoint.name_table import expert_biases
from pikv_megatron.config import PiKVConfig
from pikv_megatron.inference.agreement import same_on_all_ranks
from pikv_megatron.inference.batch import StepCallback, run_batch
from pikv_megatron.inference.engine import Engine
from pikv_megatron.inference.outputs import CacheReport, GenerationOutput
from pikv_megatron.inference.request import Request, as_prompts, check_requests
from pikv_megatron.inference.sampling import SamplingParams
from pikv_megatron.inference.stopping import StopCriteria
from pikv_megatron.runtime.process_groups import deepspeed_expert_parallel_group
from pikv_megatron.types import Recalled


class PiKVForCausalLM(torch.nn.Module):
    """A Megatron GPT model with PiKV layers, ready for `deepspeed.init_inference`.

    Args:
        model: built from a spec that went through `pikv_layer_spec`.
        pikv: the same configuration.
        vocab_size: ids that may be chosen; default the model's (with tensor parallelism it is
            padded, and the padding must not be chosen).

    Attributes:
        engine: what `generate` drives, made when it is first called; a batch that it has no place
            for gets a larger one.
    """

    def __init__(self, model: GPTModel, pikv: PiKVConfig, vocab_size: int | None = None):
        super().__init__()
        self.model = model.eval()
        self.pikv = pikv
        self.vocab_size = vocab_size or model.vocab_size
        self.max_sequence_length = pikv.max_sequence_length or model.max_sequence_length
        groups = model.pg_collection
        self.ep_group = deepspeed_expert_parallel_group(groups.ep, groups.tp.size())
        self.num_ranks = self.ep_group.size()
        Placement.resolve(pikv, self.num_ranks)
        self.engine: Engine | None = None
        self._kept: list[int] = []
        self._decoded = 0, Recalled()
        self._num_tokens = 0

    def forward(self, *args, **kwargs):
        return self.model(*args, **kwargs)

    def _apply(self, fn, recurse=True):
        """Cast or move; scores lie too close for 16 bits of a bias, and Megatron-Core would only
        widen again what was rounded."""
        exact = {name: bias.clone() for name, bias in expert_biases(self).items()}
        super()._apply(fn, recurse)
        for name, bias in expert_biases(self).items():
            bias.data = exact[name].to(bias.device)
        return self

    def reset_cache(self) -> None:
        """Free every sequence that was not kept by `keep_cache`; DeepSpeed calls it first."""
        if self.engine is not None and not self._kept:
            self.engine.reset()

    def cache_report(self) -> CacheReport:
        """Sizes after the last `generate`.

        Raises:
            ValueError: nothing was generated yet.
        """
        if self.engine is None:
            raise ValueError("cache_report: call generate first")
        context = self.engine.context
        token_bytes = sum(layer.spec.kv.token_bytes for layer in context.layers.values())
        num_decode_steps, recalled = self._decoded
        return CacheReport(
            context.allocated_bytes(), token_bytes * self._num_tokens, num_decode_steps,
            *context.tiers.num_bytes, recalled,
        )

    def generate(
        self,
        input_ids: torch.Tensor | Sequence[Sequence[int]],
        max_new_tokens: int = 64,
        sampling: SamplingParams | None = None,
        stop: StopCriteria | None = None,
        callback: StepCallback | None = None,
        keep_cache: bool = False,
        resume: bool = False,
    ) -> GenerationOutput:
        """Continue prompts. Called on every rank with the same arguments.

        Args:
            input_ids: prompts, ragged lists of token ids or a tensor [b, s]. DeepSpeed's engine
                takes lists by position only: under this name it asks for a tensor.
            max_new_tokens: most tokens to generate for each.
            sampling: how tokens are chosen; default greedy.
            stop: when a sequence ends; default only by length.
            callback: told of every step, on every rank; may return the prompts to cancel.
            keep_cache: leave the sequences in the cache for a next turn, but for those that end
                with an error.
            resume: the prompts continue the sequences that the last call kept, in order.

        Raises:
            ValueError: a prompt is empty or too long, the ranks were given different prompts, or
                `resume` meets another number of sequences than was kept. What was kept stays.
        """
        sampling = sampling or SamplingParams()
        prompts, *_ = same_on_all_ranks(
            lambda: (as_prompts(input_ids), max_new_tokens, sampling, keep_cache, resume),
            self.ep_group, next(self.model.parameters()).device,
        )
        kept = self._kept if resume else [None] * len(prompts)
        if len(kept) != len(prompts):
            raise ValueError(
                f"resume: {len(kept)} sequences were kept, {len(prompts)} prompts came; give a "
                "prompt for each, or leave resume out"
            )
        requests = [
            Request(
                prompt, max_new_tokens, sampling, stop and partial(stop.update, index), index,
                keep_cache, resumes,
            )
            for index, (prompt, resumes) in enumerate(zip(prompts, kept))
        ]
        if not resume:
            self._make_room(requests)
        ids = self.engine.add(requests)
        if stop is not None:
            stop.reset([list(self.engine.running[sequence_id].history) for sequence_id in ids])
        return self._run(ids, callback, keep_cache)

    def _make_room(self, requests: Sequence[Request]) -> None:
        """Forget what was kept, for requests that will not be refused."""
        no_past = [0] * len(requests)
        check_requests(requests, no_past, self.vocab_size, self.max_sequence_length)
        self._kept = []
        rows = -(-len(requests) // self.num_ranks)
        if self.engine is None or self.engine.context.max_batch_size < rows:
            learned = {} if self.engine is None else self.engine.context.visits
            self.engine = None  # its memory is free before the next one takes its own
            self.engine = Engine(
                self.model, self.pikv, self.ep_group, self.vocab_size, self.max_sequence_length,
                rows,
            )
            for number, visits in learned.items():
                self.engine.context.visits[number].taught = visits.taught
        self.engine.reset()

    def _run(
        self, ids: list[int], callback: StepCallback | None, keep_cache: bool
    ) -> GenerationOutput:
        self._kept = []
        self._num_tokens = sum(s.final_length for s in self.engine.running.values())
        try:
            output, *self._decoded = run_batch(self.engine, ids, callback)
        except BaseException:
            self.engine.reset()
            raise
        self._kept = [sequence_id for sequence_id in ids if sequence_id in self.engine.kept]
        return output
