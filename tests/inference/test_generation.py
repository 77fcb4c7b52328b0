"""`generate`, alone, under DeepSpeed's engine and against Megatron's own engine."""

import deepspeed
import pytest
import torch
from parity_models import VOCAB, build, plain_logits
from ranks import run_ranks

from pikv_megatron import PiKVConfig, PiKVForCausalLM, SamplingParams, process_groups
from pikv_megatron.inference.stopping import StopCriteria

PIKV = PiKVConfig(
    shard_after=0, page_size=4, window=6, num_sinks=2, flush_interval=3, token_shards=4
)
PROMPTS = [[5, 9, 2], [7] * 40, [1], [3, 1, 4, 1, 5, 9, 2, 6], [8, 8, 8, 8, 9]]


def greedy(model, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(plain_logits(model, tokens)[-1].argmax()))
    return tokens[len(prompt) :]


@pytest.fixture(scope="module")
def lm(one_rank):
    return PiKVForCausalLM(build(one_rank, PIKV), PIKV)


def test_greedy_tokens_are_those_of_the_model_without_a_cache(lm):
    out = lm.generate(PROMPTS, max_new_tokens=16)
    assert out.token_ids == [greedy(lm.model, prompt, 16) for prompt in PROMPTS]
    assert out.finish_reasons == ["length"] * 5


def test_logprobs_are_the_models(lm):
    out = lm.generate(PROMPTS[:2], max_new_tokens=6)
    for prompt, tokens, logprobs in zip(PROMPTS, out.token_ids, out.logprobs):
        expected = plain_logits(lm.model, prompt + tokens).log_softmax(-1)
        for step, (token, logprob) in enumerate(zip(tokens, logprobs)):
            assert abs(expected[len(prompt) + step - 1, token] - logprob) < 1e-4


def test_a_next_turn_continues_the_cache(lm):
    first = lm.generate(PROMPTS, max_new_tokens=7, keep_cache=True)
    turn = [[11, 12, 13], [2], [4, 4], [6] * 20, [9]]
    second = lm.generate(turn, max_new_tokens=7, resume=True)
    for index, prompt in enumerate(PROMPTS):
        whole = prompt + first.token_ids[index] + turn[index]
        assert second.token_ids[index] == greedy(lm.model, whole, 7)


def test_a_refused_next_turn_changes_nothing(lm):
    first = lm.generate(PROMPTS[:2], max_new_tokens=5, keep_cache=True)
    stop = StopCriteria(stop_token_ids=[first.token_ids[0][0]])
    stop.update(0, first.token_ids[0][0])
    for turn in ([[11]], [[11], [VOCAB]], [[11], []], [[11], [1] * 500]):
        with pytest.raises(ValueError):
            lm.generate(turn, stop=stop, resume=True)
    with pytest.raises(ValueError):
        lm.generate([[VOCAB]])
    assert stop.update(0, 1) == "stop"  # a refused call does not reset it
    second = lm.generate([[11], [2]], max_new_tokens=5, resume=True)
    for prompt, tokens, turn, new in zip(PROMPTS, first.token_ids, [[11], [2]], second.token_ids):
        assert new == greedy(lm.model, prompt + tokens + turn, 5)
    with pytest.raises(ValueError, match="resume: 0 sequences"):
        lm.generate([[11], [2]], resume=True)


def test_a_turn_that_deepspeeds_engine_refuses_changes_nothing(lm):
    engine = deepspeed.init_inference(lm, dtype=torch.float32)
    first = engine.generate(PROMPTS[:2], max_new_tokens=5, keep_cache=True)
    for turn in ([[11]], [[11], [1] * 500], [[11], "2"], [11, 2]):
        with pytest.raises(ValueError):
            engine.generate(turn, resume=True)
    second = engine.generate([[11], [2]], max_new_tokens=5, resume=True)
    for prompt, tokens, turn, new in zip(PROMPTS, first.token_ids, [[11], [2]], second.token_ids):
        assert new == greedy(lm.model, prompt + tokens + turn, 5)


class Numbers:
    """A tokenizer whose first word has no space before it."""

    def decode(self, ids):
        return " ".join(map(str, ids))


def test_stop_strings_see_what_came_before(lm):
    token = lm.generate([PROMPTS[0]], max_new_tokens=1, keep_cache=True).token_ids[0][0]
    stop = StopCriteria(stop_strings=[f" {token}"], tokenizer=Numbers())
    out = lm.generate([PROMPTS[0]], max_new_tokens=4, stop=stop)
    assert out.finish_reasons == ["stop"] and stop.text(0) == ""


def test_biases_of_experts_stay_exact_in_half_types(one_rank):
    sigmoid = dict(moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True)
    lm = PiKVForCausalLM(build(one_rank, PIKV, **sigmoid), PIKV)
    router = lm.model.decoder.layers[1].mlp.router
    exact = torch.linspace(7.0, 7.001, 8)
    router.expert_bias.copy_(exact)
    engine = deepspeed.init_inference(lm, dtype=torch.bfloat16)
    assert router.weight.dtype == torch.bfloat16
    assert router.expert_bias.dtype == torch.float32 and torch.equal(router.expert_bias, exact)
    assert len(engine.generate(PROMPTS[:2], max_new_tokens=3).token_ids[1]) == 3


def test_logits_that_are_not_numbers_are_told(one_rank):
    lm = PiKVForCausalLM(build(one_rank, PIKV), PIKV)
    lm.model.output_layer.weight.data[5, 3] = float("nan")
    with pytest.raises(ValueError, match="logits of sequence 0 are not numbers after 3 tokens"):
        lm.generate([PROMPTS[0]], max_new_tokens=2)
    assert lm.engine.context._sequences == {}


def test_finished_and_cancelled_sequences_give_their_pages_back(lm):
    stop_token = lm.generate([PROMPTS[0]], max_new_tokens=4).token_ids[0][2]

    def cancel(step):
        lm.engine.context.check_integrity()
        return [1] if step.step == 5 else None

    stop = StopCriteria(stop_token_ids=[stop_token], stop_strings=[], tokenizer=None)
    out = lm.generate(PROMPTS, max_new_tokens=12, stop=stop, callback=cancel)
    assert out.finish_reasons[0] == "stop" and len(out.token_ids[0]) <= 3
    assert len(out.token_ids[1]) <= 6
    assert lm.engine.context._sequences == {}
    lm.engine.context.check_integrity()


def test_a_failing_callback_leaves_nothing_behind(lm):
    def fail(step):
        raise KeyError("callback")

    with pytest.raises(KeyError):
        lm.generate(PROMPTS, callback=fail)
    lm.engine.context.check_integrity()
    assert lm.engine.context._sequences == {}
    assert lm.generate(PROMPTS[:1], max_new_tokens=3).token_ids == [greedy(lm.model, PROMPTS[0], 3)]


def test_drawn_tokens_depend_on_the_seed_only(lm):
    params = SamplingParams(temperature=0.9, top_k=20, top_p=0.9, repetition_penalty=1.2, seed=4)
    together = lm.generate(PROMPTS, max_new_tokens=8, sampling=params)
    assert together == lm.generate(PROMPTS, max_new_tokens=8, sampling=params)
    alone = lm.generate(PROMPTS[:1], max_new_tokens=8, sampling=params)
    assert alone.token_ids[0] == together.token_ids[0]


@pytest.mark.parametrize(
    "prompts, settings, message",
    [
        ([], {}, "no prompts"),
        ([[]], {}, "prompt 0 is empty"),
        ([[1], [VOCAB]], {}, "prompt 1 has token 96"),
        ([[1] * 500], {"max_new_tokens": 20}, "max_sequence_length 512"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens"),
        ([[1]], {"max_new_tokens": 2.5}, "max_new_tokens.*2.5"),
        ("hello", {}, "input_ids.*'hello'.*encode texts"),
        (["hello"], {}, "prompt 0 is 'hello'.*encode texts"),
        ([1, 2, 3], {}, "prompt 0 is the number 1: give a list of prompts"),
        ([[1, 2.5]], {}, "prompt 0 holds 2.5"),
        ([[1, None]], {}, "prompt 0 holds None"),
        (3, {}, "input_ids.*3"),
        ([[1]], {"resume": True}, "resume: 0 sequences"),
    ],
)
def test_what_cannot_be_generated_is_refused(lm, prompts, settings, message):
    with pytest.raises(ValueError, match=message):
        lm.generate(prompts, **settings)


def test_the_report_counts_the_allocated_tensors(lm):
    lm.generate(PROMPTS, max_new_tokens=5)
    parts = [part for layer in lm.engine.context.layers.values() for part in layer.parts().values()]
    tensors = [t for part in parts for t in part]
    # Address space that pools can grow into is not memory; nor is a view of another's.
    assert lm.cache_report().allocated_bytes == sum(t.nbytes for t in tensors)
    assert len({t.untyped_storage().data_ptr() for t in tensors}) == len(tensors)
    assert lm.cache_report().num_decode_steps == 4


def on_ranks(expert_parallel_size: int, tensor_parallel_size: int) -> list:
    with process_groups(expert_parallel_size, tensor_parallel_size, timeout_seconds=60) as pg:
        results = []
        for dispatcher in ("alltoall", "allgather"):
            pikv = PIKV.model_copy(update={"dispatcher": dispatcher})
            lm = PiKVForCausalLM(build(pg, pikv), pikv, vocab_size=VOCAB)
            engine = deepspeed.init_inference(lm, dtype=torch.float32)
            for prompts in (PROMPTS, PROMPTS[:1]):  # fewer sequences than ranks too
                out = engine.generate(prompts, max_new_tokens=10)
                expected = [greedy(lm.model, prompt, 10) for prompt in prompts]
                results.append(out.token_ids == expected)
            lm.engine.context.check_integrity()
        return results


@pytest.mark.parametrize("ep, tp", [(2, 1), (4, 1), (2, 2)])
def test_every_rank_returns_the_whole_batch(ep, tp):
    assert all(all(flags) for flags in run_ranks(on_ranks, ep * tp, ep, tp, timeout=200))


def different_prompts(prompts: list) -> str:
    with process_groups(expert_parallel_size=2, timeout_seconds=30) as pg:
        lm = PiKVForCausalLM(build(pg, PIKV), PIKV)
        try:
            lm.generate([prompts[pg.ep.rank()]])
        except ValueError as error:
            return str(error)
        return ""


@pytest.mark.parametrize("prompts, message", [
    ([[1], [2]], "same prompts"),
    ([[1], [VOCAB]], "same prompts"),  # it is refused on its own, too
    ([[1], "text"], "prompt 0 is 'text': encode texts"),
])
def test_ranks_with_different_prompts_are_told(prompts, message):
    assert all(message in told for told in run_ranks(different_prompts, 2, prompts))


def one_rank_fails() -> None:
    with process_groups(expert_parallel_size=2, timeout_seconds=10) as pg:
        lm = PiKVForCausalLM(build(pg, PIKV), PIKV)

        def fail(step):
            if pg.ep.rank() == 1 and step.step == 3:
                raise OSError("rank 1 is broken")

        lm.generate(PROMPTS, callback=fail)


def test_a_failing_rank_ends_the_job():
    with pytest.raises(RuntimeError, match="rank 1 is broken|Connection|timed out|Gloo|gloo"):
        run_ranks(one_rank_fails, 2, timeout=60)


def shard_bytes(num_ranks: int) -> tuple[int, int]:
    """Bytes of a rank's pages, and of a dense cache of the same tokens."""
    with process_groups(expert_parallel_size=num_ranks, timeout_seconds=60) as pg:
        pikv = PiKVConfig(shard_after=0, page_size=4, window=8, num_sinks=0, flush_interval=4)
        lm = PiKVForCausalLM(build(pg, pikv), pikv)
        lm.generate([[3] * 396] * 4, max_new_tokens=4)
        pools = [layer.store.pool for layer in lm.engine.context.layers.values()]
        pages = sum(t[:, :-1].nbytes for p in pools for t in (p.kv.keys, p.kv.values))
        return pages, lm.cache_report().dense_bytes


def test_a_ranks_pages_are_its_share_of_the_dense_cache():
    for num_ranks in (1, 2, 4):
        page_bytes = 2 * 2 * 16 * 4 * 4  # K and V, 2 KV heads of 16, 4 tokens of float32
        rounding = 2 * 4 * page_bytes  # at most a page a layer and sequence
        for pages, dense in run_ranks(shard_bytes, num_ranks, num_ranks):
            assert pages <= dense / num_ranks + rounding
