"""The engine: sequences of different ages and settings in the same forward passes."""

import pytest
import torch
from parity_models import VOCAB, build, plain_logits
from ranks import run_ranks

from pikv_megatron import PiKVConfig, SamplingParams, process_groups
from pikv_megatron.inference.engine import Engine
from pikv_megatron.inference.request import Request
from pikv_megatron.inference.sampling import sample, uniform_numbers

CHUNK = 8
PIKV = PiKVConfig(
    shard_after=0, page_size=4, window=6, num_sinks=2, flush_interval=3, token_shards=4,
    prefill_chunk_size=CHUNK,
)
DRAWN = SamplingParams(temperature=0.8, top_k=30, seed=3)
EARLY = [
    Request([5, 9, 2], 14),
    Request([7] * 11, 9, DRAWN),
    Request([1], 20, DRAWN.model_copy(update={"seed": 9}), draw_index=2),
]
LATE = [
    Request(list(range(1, 46)), 8),
    Request([3, 1, 4, 1, 5], 12, SamplingParams(repetition_penalty=1.7)),
    Request(list(range(60, 20, -1)), 6, SamplingParams(temperature=1.1, top_p=0.8, seed=1)),
    Request([8], 5),
]


def new_engine(pg, model, max_batch_size: int = 7, pikv: PiKVConfig = PIKV) -> Engine:
    return Engine(model, pikv, pg.ep, VOCAB, 512, max_batch_size)


def without_cache(model, request: Request) -> list[int]:
    """The request's tokens, each chosen after a pass over all before it."""
    tokens, settings = list(request.prompt), request.sampling
    for drawn in range(request.max_new_tokens):
        logits = plain_logits(model, tokens)[-1:]
        index = torch.tensor([request.draw_index])
        previous = torch.zeros_like(logits, dtype=torch.bool)
        previous[0, tokens] = True
        uniform = uniform_numbers(settings.seed, index, drawn)
        tokens.append(int(sample(logits, settings, uniform, previous)[0]))
    return tokens[len(request.prompt) :]


def run(engine: Engine, steps: int | None = None) -> dict[int, list[int]]:
    """New tokens by id, of so many steps or of all that there are."""
    tokens: dict[int, list[int]] = {}
    while engine.running and steps != 0:
        for sequence_id, token in engine.step().token_ids.items():
            tokens.setdefault(sequence_id, []).append(token)
        steps = None if steps is None else steps - 1
    return tokens


def num_free_pages(engine: Engine) -> list[int]:
    return [layer.store.pool.free.num_free for layer in engine.context.layers.values()]


def check_empty(engine: Engine) -> None:
    """Nothing is left behind, and every page is free."""
    engine.context.check_integrity()
    assert not engine.running and not engine.kept and not engine.context._sequences
    pools = [layer.store.pool.free.num_pages for layer in engine.context.layers.values()]
    assert num_free_pages(engine) == pools


@pytest.fixture(scope="module")
def model(one_rank):
    return build(one_rank, PIKV)


@pytest.fixture
def engine(one_rank, model):
    engine = new_engine(one_rank, model)
    yield engine
    engine.reset()
    check_empty(engine)


def ages_and_settings(num_ranks: int) -> None:
    with process_groups(expert_parallel_size=num_ranks, timeout_seconds=60) as pg:
        for changes in ({}, {"expert_shards": 4, "replicas": 2, "dispatcher": "allgather"}):
            pikv = PIKV.model_copy(update=changes)
            model = build(pg, pikv)
            engine = new_engine(pg, model, pikv=pikv)
            ids = engine.add(EARLY)
            homes = [engine.running[i].home for i in ids]
            assert homes == [i % num_ranks for i in range(len(EARLY))]
            before = run(engine, steps=5)
            assert len(before[ids[0]]) == 5 and engine.running[ids[0]].is_decoding
            ids += engine.add(LATE)
            after = run(engine)
            for sequence_id, request in zip(ids, EARLY + LATE):
                tokens = before.get(sequence_id, []) + after.get(sequence_id, [])
                assert tokens == without_cache(model, request), (sequence_id, changes)
            check_empty(engine)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_tokens_are_those_of_the_model_without_a_cache(num_ranks):
    run_ranks(ages_and_settings, num_ranks, num_ranks, timeout=200)


def test_a_step_feeds_what_decodes_and_a_chunk_of_the_prompts(engine, monkeypatch):
    fed, begin_step = [], engine.context.begin_step

    def watched(*args):
        begin_step(*args)
        fed.append(engine.context.plan.num_tokens)

    monkeypatch.setattr(engine.context, "begin_step", watched)
    old = engine.add([Request([5, 9], 30), Request([4], 30), Request([2, 2, 2], 30)])
    run(engine, steps=1)
    long, short = engine.add([Request([7] * 21, 5), Request([6] * 5, 5)])
    tokens = [engine.step().token_ids for _ in range(5)]
    assert fed == [6, 3 + CHUNK, 3 + CHUNK, 3 + 5 + 3, 3 + 1 + 2, 3 + 1 + 1]
    assert all(set(old) <= set(chosen) for chosen in tokens)  # none waits for the long prompt
    assert [long in chosen for chosen in tokens] == [False, False, True, True, True]
    assert [short in chosen for chosen in tokens] == [False, False, False, True, True]


def test_a_step_counts_the_prompt_tokens_and_names_what_ended(engine):
    ids = engine.add([Request([1] * 10, 2), Request([2], 1), Request([3], 9, stop=lambda t: True)])
    steps = [engine.step() for _ in range(3)]
    assert [step.num_prompt_tokens for step in steps] == [8, 4, 0]
    reasons = {i: reason for step in steps for i, reason in step.finish_reasons.items()}
    assert reasons == dict(zip(ids, ["length", "length", "stop"]))
    assert all(step.token_ids.keys() == step.logprobs.keys() for step in steps)
    assert not engine.step().token_ids and engine.step().num_prompt_tokens == 0


def test_cancelled_sequences_give_their_pages_back_at_once(engine):
    decoding, prompt, other = engine.add([
        Request([5] * 6, 60), Request([7] * 90, 10), Request([3] * 4, 60)
    ])
    run(engine, steps=9)
    assert engine.running[decoding].is_decoding and not engine.running[prompt].is_decoding
    for sequence_id in (prompt, decoding):
        before = num_free_pages(engine)
        engine.cancel(sequence_id)
        engine.context.check_integrity()
        assert all(new > old for new, old in zip(num_free_pages(engine), before))
        run(engine, steps=2)
    engine.cancel(other)
    check_empty(engine)
    with pytest.raises(ValueError, match=f"sequence_id {other} is not running"):
        engine.cancel(other)


def cancel_on_ranks() -> None:
    with process_groups(expert_parallel_size=2, timeout_seconds=60) as pg:
        engine = new_engine(pg, build(pg, PIKV))
        ids = engine.add([Request([5] * 6, 60), Request([7] * 90, 10), Request([3] * 4, 60)])
        run(engine, steps=4)
        for sequence_id in ids[::-1]:
            engine.cancel(sequence_id)
            engine.context.check_integrity()
        check_empty(engine)
        first, second, third = engine.add([Request([5], 60)] * 3)
        engine.cancel(first)
        (fourth,) = engine.add([Request([5], 60)])
        homes = {i: sequence.home for i, sequence in engine.running.items()}
        assert homes == {second: 1, third: 0, fourth: 0}  # where the fewest are, the lowest first


def test_cancelled_sequences_leave_nothing_on_any_rank():
    run_ranks(cancel_on_ranks, 2)


def test_pools_do_not_grow_once_the_requests_are_taken(one_rank, model):
    engine = new_engine(one_rank, model)
    engine.add([Request([5] * 6, 60), Request([7] * 30, 40)])
    run(engine, steps=20)
    engine.add([Request([3] * 50, 60)])
    before = [layer.store.pool.free.num_pages for layer in engine.context.layers.values()]
    run(engine)
    after = [layer.store.pool.free.num_pages for layer in engine.context.layers.values()]
    assert before == after
    check_empty(engine)


def test_a_full_engine_refuses(one_rank, model):
    engine = new_engine(one_rank, model, max_batch_size=2)
    first, second = engine.add([Request([1], 9), Request([2], 9)])
    for requests in ([Request([3], 9)], [Request([3], 9)] * 3):
        with pytest.raises(ValueError, match="max_batch_size 2: .* wait until a sequence ends"):
            engine.add(requests)
    engine.cancel(first)
    with pytest.raises(ValueError, match="2 sequences came, and 1 ranks have 1 places free"):
        engine.add([Request([3], 9)] * 2)
    assert list(engine.running) == [second]
    (third,) = engine.add([Request([3], 9)])
    assert set(run(engine)) == {second, third}
    check_empty(engine)


@pytest.mark.parametrize("methods", [
    {},
    {"selector": {"name": "mass", "tail": "mean"}, "retention": "h2o",
     "codec": {"transform": "svd", "format": "int8"}},
    {"retention": "h2o", "budget": {"name": "share", "across_layers": 2}},
])
def test_the_memory_limit_is_kept_to_the_byte(one_rank, model, methods):
    """It is what the cache has once the pages are reserved; a byte less is refused."""
    fields = PIKV.model_dump(exclude_unset=True) | methods
    free = new_engine(one_rank, model, pikv=PiKVConfig(**fields))
    request = Request([1] * 200, 40)
    free.add([request])
    needed = free.context.allocated_bytes()
    exact = new_engine(one_rank, model, pikv=PiKVConfig(**fields, memory_limit=needed))
    exact.add([request])
    assert exact.context.allocated_bytes() == needed
    tight = new_engine(one_rank, model, pikv=PiKVConfig(**fields, memory_limit=needed - 1))
    before = tight.context.allocated_bytes()
    with pytest.raises(ValueError, match="memory_limit .*: a rank's cache would take"):
        tight.add([request])
    assert tight.context.allocated_bytes() == before and not tight.running
    tight.add([Request([1] * 20, 4)])
    run(tight)
    check_empty(tight)


def test_pools_do_not_grow_for_what_was_reserved(engine, model):
    """So nothing that they hold is copied, where they cannot grow in place."""
    (running,) = engine.add([Request([5, 9, 2], 14)])
    engine.reserve(3, 70)
    pages, size = engine.context.num_pages, engine.context.allocated_bytes()
    assert list(engine.running) == [running] and len(engine.context._sequences) == 1
    ids = [engine.add([request])[0] for request in (Request([1] * 60, 10), EARLY[1], EARLY[2])]
    tokens = run(engine)
    assert tokens[running] == without_cache(model, EARLY[0]) and len(tokens[ids[0]]) == 10
    assert (engine.context.num_pages, engine.context.allocated_bytes()) == (pages, size)
    with pytest.raises(ValueError, match="max_batch_size 7: 8 sequences came"):
        engine.reserve(8, 70)
    with pytest.raises(ValueError, match="num_tokens 513 exceeds max_sequence_length 512"):
        engine.reserve(1, 513)
    check_empty(engine)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (Request([], 4), "prompt 1 is empty"),
        (Request([1, VOCAB], 4), f"prompt 1 has token {VOCAB}"),
        (Request([-1], 4), "prompt 1 has token -1"),
        (Request([1], 0), "max_new_tokens"),
        (Request([1] * 500, 20), "max_sequence_length 512: prompt 1 needs 519"),
        (Request([1], 4, resumes=77), "resumes 77"),
    ],
)
def test_wrong_requests_change_nothing(engine, model, wrong, message):
    (running,) = engine.add([Request([5, 9, 2], 6)])
    before = run(engine, steps=2)[running]
    pages = num_free_pages(engine)
    with pytest.raises(ValueError, match=message):
        engine.add([Request([4], 400), wrong])
    assert list(engine.running) == [running] and len(engine.context._sequences) == 1
    assert num_free_pages(engine) == pages
    assert before + run(engine)[running] == without_cache(model, EARLY[0])[:6]


def test_kept_sequences_are_resumed_beside_others(engine, model):
    first = Request([5, 9, 2, 4, 4], 7, keep_cache=True)
    (kept,) = engine.add([first])
    tokens = run(engine)[kept]
    whole = [*first.prompt, *tokens, 11, 12]
    (other,) = engine.add([Request([7] * 20, 12)])
    run(engine, steps=4)
    with pytest.raises(ValueError, match="prompt 0 has token"):
        engine.add([Request([VOCAB], 6, resumes=kept)])
    with pytest.raises(ValueError, match=f"resumes {kept}: .* once"):
        engine.add([Request([1], 6, resumes=kept)] * 2)
    assert engine.add([Request([11, 12], 6, keep_cache=True, resumes=kept)]) == [kept]
    assert run(engine)[kept] == without_cache(model, Request(whole, 6))
    assert list(engine.kept) == [kept] and other not in engine.running
    engine.release(kept)
    with pytest.raises(ValueError, match=f"sequence_id {kept} was not kept"):
        engine.release(kept)
    check_empty(engine)


@pytest.mark.parametrize("where", ["stop", "forward"])
def test_a_failing_step_leaves_nothing_behind(engine, model, monkeypatch, where):
    def fail(*args, **kwargs):
        raise KeyError(where)

    (kept,) = engine.add([Request([1] * 9, 3, keep_cache=True)])
    run(engine)
    engine.add([Request([2] * 30, 9), Request([3], 9, stop=fail if where == "stop" else None)])
    with monkeypatch.context() as patch:
        if where == "forward":
            patch.setattr(model.decoder.layers[1], "forward", fail)
        with pytest.raises(KeyError):
            run(engine)
    check_empty(engine)
    (again,) = engine.add([EARLY[0]])
    assert again > kept and run(engine)[again] == without_cache(model, EARLY[0])


SHRUNK = [
    {},
    {"retention": "h2o", "sketch": "bounding_box",
     "selector": {"name": "budget", "share": 0.5, "tail": "mean"}},
    {"retention": "h2o", "budget": {"name": "share", "across_layers": 1.5}},
]


def shrinks(num_ranks: int) -> None:
    with process_groups(expert_parallel_size=num_ranks, timeout_seconds=60) as pg:
        for changes in SHRUNK:
            pikv = PiKVConfig(**PIKV.model_dump(exclude_unset=True), **changes)
            model, tokens = build(pg, pikv), []
            for is_shrunk in (False, True):
                engine = new_engine(pg, model, pikv=pikv)
                ids = engine.add([Request([9] * 70, 4), Request([5, 9, 2] * 5, 40)])
                before = run(engine, steps=16)
                assert ids[0] not in engine.running
                size = engine.context.bytes_by_part()["pages"]
                if is_shrunk:
                    engine.shrink()
                    assert engine.context.bytes_by_part()["pages"] < size
                    engine.context.check_integrity()
                    size = engine.context.bytes_by_part()["pages"]
                after = run(engine)
                assert engine.context.bytes_by_part()["pages"] == size
                tokens.append(before[ids[1]] + after[ids[1]])
                check_empty(engine)
            assert tokens[0] == tokens[1], changes


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_pools_shrink_to_what_running_sequences_need(num_ranks):
    run_ranks(shrinks, num_ranks, num_ranks, timeout=200)
