"""What the evaluation reports of a lossless cache is what the model without a cache would get."""

from functools import partial
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from tiny_directory import byte_tokenizer, save_tiny_mixtral
from transformers import GptOssConfig, GptOssForCausalLM

from pikv_megatron import PiKVConfig, pikv_layer_spec, process_groups
from pikv_megatron.checkpoint.huggingface import load_huggingface
from pikv_megatron.checkpoint.tokenizer import Tokenizer
from pikv_megatron.demo.corpus import load_corpus
from pikv_megatron.demo.evaluation import text_perplexity
from pikv_megatron.demo.training import forward
from pikv_megatron.evaluation.byte_ids import ByteIds
from pikv_megatron.evaluation.evaluator import Evaluator, lossless
from pikv_megatron.evaluation.figures import Figures, change
from pikv_megatron.evaluation.judge import Judge, Reference
from pikv_megatron.evaluation.task import Task
from pikv_megatron.evaluation.tasks.base import Source
from pikv_megatron.evaluation.tasks.registry import TASKS

LENGTH, BATCH_SIZE = 80, 3
SAMPLES = {"recall": 4, "text": 4, "greedy": 2}
SIZES = dict(
    shard_after=0, page_size=4, num_sinks=2, window=8, flush_interval=3, prefill_chunk_size=20
)
CACHES = {
    "lossless": SIZES,
    "quarter": dict(SIZES, selector=dict(name="budget", share=0.25)),
    "everything": dict(SIZES, selector=dict(name="budget", share=1.0)),
    "routed": dict(SIZES, router=dict(name="top_k", k=2), token_shards=4),
    "certified": dict(SIZES, selector=dict(name="certified", tolerance=0.2)),
    "half": dict(SIZES, retention="streaming", budget=dict(name="share", keep=0.5)),
    "four_bits": dict(SIZES, codec=dict(format="int4")),
    "by_experts": dict(SIZES, token_shards=4, expert_shards=4),
}
Evaluations = dict[str, dict[str, Figures]]  # by cache and task


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    save_tiny_mixtral(directory)
    return directory


def build_tasks(directory: Path) -> dict[str, list[Task]]:
    source = Source(Tokenizer.from_directory(directory), is_bytewise=True)
    return {name: TASKS[name].build(source, LENGTH, n, 0) for name, n in SAMPLES.items()}


def evaluate_all(directory: Path, num_ranks: int) -> Evaluations:
    with process_groups(expert_parallel_size=num_ranks, timeout_seconds=60) as groups:
        model = load_huggingface(
            directory, groups, torch.float32,
            spec_transform=lambda spec: pikv_layer_spec(spec, PiKVConfig()),
        ).eval()
        return run(Evaluator(model, 257, BATCH_SIZE), build_tasks(directory), CACHES)


def run(
    evaluator: Evaluator, tasks: dict[str, list[Task]], caches: dict[str, dict]
) -> Evaluations:
    found: Evaluations = {name: {} for name in caches}
    for task, parts in tasks.items():
        reference = Reference()
        for name, values in caches.items():
            pikv, steps = PiKVConfig(**values), []
            found[name][task] = evaluator.run(parts, pikv, reference, lambda: steps.append(1))
            assert len(steps) == evaluator.num_steps(parts, pikv)
    return found


@pytest.fixture(scope="module")
def by_ranks(directory) -> dict[int, Evaluations]:
    """On one rank and on two; all ranks find the same."""
    found = {}
    for num_ranks in (1, 2):
        found[num_ranks], *others = run_ranks(evaluate_all, num_ranks, directory, num_ranks)
        for other in others:
            for name, tasks in other.items():
                for task, figures in tasks.items():
                    assert same(figures, found[num_ranks][name][task], tolerance=0)
    return found


def same(one: Figures, two: Figures, tolerance: float) -> bool:
    counted = "num_answers", "exact", "num_judged", "accuracy", "agreed_tokens"
    measured = "perplexity", "divergence"
    assert all(getattr(one, name) == getattr(two, name) for name in counted)
    for name in (*measured, "pages_read", "pages_kept", "mass_read", "kept_by_position"):
        values = (torch.tensor(getattr(x, name)).double() for x in (one, two))
        assert torch.allclose(*values, rtol=tolerance, atol=tolerance), name
    return True


@pytest.fixture(params=[1, 2])
def evaluations(request, by_ranks) -> Evaluations:
    return by_ranks[request.param]


def test_one_rank_and_two_find_the_same(by_ranks):
    """Shards are twice as many, so their open buffers are, and pages are sealed later."""
    for name in ("lossless", "everything", "routed"):
        for task, figures in by_ranks[1][name].items():
            other = by_ranks[2][name][task]
            assert figures.accuracy == other.accuracy
            assert figures.perplexity == pytest.approx(other.perplexity, rel=1e-4)
            assert figures.agreed_tokens == other.agreed_tokens
    for task, figures in by_ranks[1]["routed"].items():
        assert same(figures, by_ranks[2]["routed"][task], tolerance=1e-4)


@torch.no_grad()
def test_lossless_is_the_model_without_a_cache(evaluations, directory, one_rank):
    model = partial(forward, load_huggingface(directory, one_rank, torch.float32).eval())
    byte_ids = ByteIds(Tokenizer.from_directory(directory))
    corpus = byte_ids.translate(load_corpus(held_out=True))
    text = evaluations["lossless"]["text"]
    assert text.num_judged == text.num_answers == SAMPLES["text"] * LENGTH // 2
    assert text.perplexity == pytest.approx(
        text_perplexity(model, corpus, LENGTH, SAMPLES["text"]), rel=1e-5
    )
    (task,) = build_tasks(directory)["recall"]
    guesses = model(task.ids)[:, task.prompt_len - 1 : -1].argmax(-1)
    is_right = guesses == task.ids[:, task.prompt_len :]
    recall = evaluations["lossless"]["recall"]
    assert recall.num_judged == recall.num_answers == task.is_judged.sum()
    assert recall.accuracy == recall.exact == is_right[task.is_judged].double().mean()
    (task,) = build_tasks(directory)["greedy"]
    ids = task.ids[:, : task.prompt_len]
    while ids.shape[1] < LENGTH:
        ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], dim=1)
    greedy = evaluations["lossless"]["greedy"]
    assert greedy.accuracy == 1 and greedy.agreed_tokens == task.answer.shape[1]


@pytest.mark.parametrize("name", ["lossless", "everything"])
def test_what_reads_everything_loses_nothing(evaluations, name):
    for figures in evaluations[name].values():
        assert figures.pages_read == [1, 1] and figures.pages_kept == [1, 1]
        assert figures.mass_read == pytest.approx([1, 1], abs=1e-5)
        assert abs(figures.divergence) < 1e-6
        assert all(share in (1, -1) for layer in figures.kept_by_position for share in layer)


def test_pages_are_counted_where_they_are_read(evaluations):
    """A quarter is rounded up to whole pages, of at least a few; one in two shards is visited."""
    for task in ("recall", "text"):
        quarter, routed, half = (evaluations[n][task] for n in ("quarter", "routed", "half"))
        whole = evaluations["lossless"][task]
        assert all(0.25 <= share < 0.35 for share in quarter.pages_read)
        assert all(0.3 < share < 0.7 for share in routed.pages_read)
        assert all(0.5 <= share < 0.6 for share in half.pages_kept)
        assert half.pages_read == [1, 1]
        for figures in (quarter, routed, half):
            assert all(0.2 < mass < 1 for mass in figures.mass_read)
            assert figures.read_bytes < whole.read_bytes
        # Streaming keeps the newest.
        for layer in half.kept_by_position:
            there = [share for share in layer if share >= 0]
            assert there[0] == 0 and there[-1] == 1


def test_a_certified_cache_reads_all_but_its_bound(evaluations):
    for task in ("recall", "text"):
        figures = evaluations["certified"][task]
        assert evaluations["quarter"][task].bounds == []
        assert any(share < 1 for share in figures.pages_read)
        for mass, bound in zip(figures.mass_read, figures.bounds):
            assert 0 <= bound <= 0.2 and mass >= 1 - bound - 1e-5


def test_bytes_are_those_beside_a_dense_cache(evaluations):
    """Two KV heads of 8, two layers, keys and values, in bfloat16; the cache is float32."""
    for name, tasks in evaluations.items():
        for task, figures in tasks.items():
            count = min(BATCH_SIZE, SAMPLES[task])
            assert figures.dense_bytes == count * LENGTH * 2 * 2 * 2 * 8 * 2
            assert 0 < figures.read_bytes and figures.step_ms > 0
    whole = evaluations["lossless"]["text"]
    # Pages, open buffers and the window: all that is cached, twice as wide.
    assert whole.read_share == pytest.approx(2.0, rel=1e-3)
    for name in ("four_bits", "half"):
        assert evaluations[name]["text"].held_bytes < whole.held_bytes
        assert evaluations[name]["text"].read_bytes < whole.read_bytes


def test_what_is_sent_is_what_ranks_hand_to_collectives(by_ranks):
    """In a step a rank has one sequence, the mean over batches of three and one. Its query goes to
    both ranks in two layers, 4 heads of 8 numbers of float32, and comes home with a log-sum-exp a
    head; headers and flushes come on top."""
    assert all(x.sent_bytes == 0 for tasks in by_ranks[1].values() for x in tasks.values())
    queries = 2 * 2 * (4 * 8 * 4 + 4 * (8 + 1) * 4)
    for figures in by_ranks[2]["lossless"].values():
        assert queries < figures.sent_bytes < 2 * queries


def test_what_is_lost_shows(evaluations):
    whole = evaluations["lossless"]["text"]
    for name in ("quarter", "routed", "half", "four_bits"):
        assert evaluations[name]["text"].divergence > 1e-6, name
        assert abs(change(evaluations[name]["text"], whole)) > 1e-7


def test_shards_are_filled_and_experts_counted(evaluations):
    whole, placed = (evaluations[name]["text"] for name in ("lossless", "by_experts"))
    fed = SAMPLES["text"] * LENGTH // 2  # prompts
    for figures in (whole, placed):
        assert sum(map(sum, figures.tokens_by_expert)) == fed * 2 * 2  # layers, experts a token
    assert [len(row) for row in placed.tokens_by_expert] == [4] * 4
    left = [sum(layer) for layer in whole.tokens_by_shard]
    assert left[0] == left[1] > SAMPLES["text"] * (LENGTH - 20)
    assert all(0 < sum(layer) for layer in placed.tokens_by_shard)


def test_what_codecs_lose_is_measured_by_layer_and_head(evaluations):
    assert torch.tensor(evaluations["lossless"]["text"].errors).abs().max() == 0
    errors = torch.tensor(evaluations["four_bits"]["text"].errors)
    assert errors.shape == (2, 2, 2) and (errors > 0.005).all() and (errors < 0.15).all()
    sizes = [evaluations[name]["text"].token_bytes for name in ("lossless", "four_bits")]
    assert sizes[1] < sizes[0] / 2.8


@pytest.mark.parametrize("window, slides", [(16, (0,)), (16, (0, 1))])
def test_layers_with_a_sliding_window_have_no_pages(tmp_path, one_rank, window, slides):
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=257, hidden_size=32, intermediate_size=24, num_hidden_layers=2, head_dim=16,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
        max_position_embeddings=256, sliding_window=window, eos_token_id=256,
    )
    kinds = ["sliding_attention" if layer in slides else "full_attention" for layer in range(2)]
    GptOssForCausalLM(GptOssConfig(**sizes, layer_types=kinds)).save_pretrained(tmp_path)
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    model = load_huggingface(
        tmp_path, one_rank, torch.float32, lambda spec: pikv_layer_spec(spec, PiKVConfig())
    )
    caches = {name: CACHES[name] for name in ("lossless", "quarter")}
    found = run(Evaluator(model, 257, BATCH_SIZE), build_tasks(tmp_path), caches)
    for figures in found["quarter"].values():
        shares = [1.0 if layer in slides else figures.pages_read[layer] for layer in range(2)]
        assert figures.pages_read == shares and (1 in slides or figures.pages_read[1] < 1.0)
        assert all(figures.mass_read[layer] == 1 for layer in slides)


def test_answers_are_right_to_the_last_token():
    """Two answers of two tokens; the second one's last is wrong."""
    judge, vocabulary = Judge(), 4
    targets = torch.tensor([[0, 1, 2, 3, 1]])
    answer = torch.tensor([[-1, 0, 0, 1, 1]])
    judge.start(targets, answer)
    for place, guess in enumerate([3, 1, 2, 3, 0]):
        judge.hear(place, 9.0 * torch.eye(vocabulary)[[guess]], None)
    judge.end()
    count, right, _, divergence, answers, exact, sequences, agreed = judge.sums.tolist()
    assert (count, right, answers, exact, sequences, agreed) == (4, 3, 2, 1, 1, 3)
    assert divergence == 0


def test_the_reference_keeps_the_sizes_and_loses_nothing():
    pikv = PiKVConfig(
        page_size=16, retention="h2o", codec=dict(format="int8"), selector="mass",
        layers=[dict(match="0", selector="all")],
    )
    assert lossless(pikv) == PiKVConfig(page_size=16)
