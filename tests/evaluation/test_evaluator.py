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
from pikv_megatron.evaluation.figures import Evaluation
from pikv_megatron.evaluation.task import RECALL, TEXT, build_tasks

LENGTH, QUESTIONS, TEXTS, BATCH_SIZE = 80, 20, 4, 3
SIZES = dict(
    shard_after=0, page_size=4, num_sinks=2, window=8, flush_interval=3, prefill_chunk_size=20
)
CACHES = {
    "lossless": SIZES,
    "quarter": dict(SIZES, selector=dict(name="budget", share=0.25)),
    "everything": dict(SIZES, selector=dict(name="budget", share=1.0)),
    "routed": dict(SIZES, router=dict(name="top_k", k=2), token_shards=4),
    "half": dict(SIZES, retention="streaming", budget=dict(name="share", keep=0.5)),
    "four_bits": dict(SIZES, codec=dict(format="int4")),
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    save_tiny_mixtral(directory)
    return directory


def evaluate_all(directory: Path, num_ranks: int) -> dict[str, Evaluation]:
    with process_groups(expert_parallel_size=num_ranks, timeout_seconds=60) as groups:
        model = load_huggingface(
            directory, groups, torch.float32,
            spec_transform=lambda spec: pikv_layer_spec(spec, PiKVConfig()),
        ).eval()
        byte_ids = ByteIds(Tokenizer.from_directory(directory))
        tasks = build_tasks(byte_ids, LENGTH, QUESTIONS, TEXTS)
        evaluator = Evaluator(model, 257, tasks, BATCH_SIZE)
        return {name: run(evaluator, name, values) for name, values in CACHES.items()}


def run(evaluator: Evaluator, name: str, values: dict) -> Evaluation:
    pikv, steps = PiKVConfig(**values), []
    evaluation = evaluator.run(name, pikv, lambda: steps.append(1))
    assert len(steps) == evaluator.num_steps(pikv)
    return evaluation


@pytest.fixture(scope="module", params=[1, 2])
def evaluations(request, directory) -> dict[str, Evaluation]:
    """On one rank and on two; all ranks find the same."""
    first, *others = run_ranks(evaluate_all, request.param, directory, request.param)
    for other in others:
        for name, evaluation in other.items():
            assert evaluation.allocated_bytes == first[name].allocated_bytes
            for task, figures in evaluation.figures.items():
                assert figures.perplexity == first[name].figures[task].perplexity
    return first


@torch.no_grad()
def test_lossless_is_the_model_without_a_cache(evaluations, directory, one_rank):
    model = partial(forward, load_huggingface(directory, one_rank, torch.float32).eval())
    byte_ids = ByteIds(Tokenizer.from_directory(directory))
    corpus = byte_ids.translate(load_corpus(held_out=True))
    text = evaluations["lossless"].figures[TEXT]
    assert text.num_judged == TEXTS * LENGTH // 2
    assert text.perplexity == pytest.approx(
        text_perplexity(model, corpus, LENGTH, TEXTS), rel=1e-5
    )
    task = build_tasks(byte_ids, LENGTH, QUESTIONS, TEXTS)[RECALL]
    guesses = model(task.ids)[:, task.prompt_len - 1 : -1].argmax(-1)
    is_right = guesses == task.ids[:, task.prompt_len :]
    recall = evaluations["lossless"].figures[RECALL]
    assert recall.num_judged == QUESTIONS == task.is_judged.sum()
    assert recall.accuracy == is_right[task.is_judged].double().mean()


@pytest.mark.parametrize("name", ["lossless", "everything"])
def test_what_reads_everything_loses_nothing(evaluations, name):
    for figures in evaluations[name].figures.values():
        assert figures.pages_read == [1, 1] and figures.pages_kept == [1, 1]
        assert abs(figures.divergence) < 1e-6


def test_pages_are_counted_where_they_are_read(evaluations):
    """A quarter is rounded up to whole pages, of at least a few; one in two shards is visited."""
    for task in (RECALL, TEXT):
        for share in evaluations["quarter"].figures[task].pages_read:
            assert 0.25 <= share < 0.35
        for share in evaluations["routed"].figures[task].pages_read:
            assert 0.3 < share < 0.7
        for share in evaluations["half"].figures[task].pages_kept:
            assert 0.5 <= share < 0.6
        assert evaluations["half"].figures[task].pages_read == [1, 1]


def test_what_is_lost_shows(evaluations):
    for name in ("quarter", "routed", "half", "four_bits"):
        assert evaluations[name].figures[TEXT].divergence > 1e-6, name
    whole = evaluations["lossless"].allocated_bytes
    assert evaluations["four_bits"].allocated_bytes < whole
    assert evaluations["half"].allocated_bytes < whole


def test_what_codecs_lose_is_measured_by_layer_and_head(evaluations):
    assert torch.tensor(evaluations["lossless"].errors).abs().max() == 0
    errors = torch.tensor(evaluations["four_bits"].errors)
    assert errors.shape == (2, 2, 2) and (errors > 0.005).all() and (errors < 0.15).all()
    sizes = [evaluations[name].token_bytes for name in ("lossless", "four_bits")]
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
    tasks = build_tasks(ByteIds(Tokenizer.from_directory(tmp_path)), LENGTH, 4, 2)
    evaluator = Evaluator(model, 257, tasks, BATCH_SIZE)
    run(evaluator, "lossless", CACHES["lossless"])
    quarter = run(evaluator, "quarter", CACHES["quarter"])
    for figures in quarter.figures.values():
        shares = [1.0 if layer in slides else figures.pages_read[layer] for layer in range(2)]
        assert figures.pages_read == shares and (1 in slides or figures.pages_read[1] < 1.0)


def test_the_reference_keeps_the_sizes_and_loses_nothing():
    pikv = PiKVConfig(
        page_size=16, retention="h2o", codec=dict(format="int8"), selector="mass",
        layers=[dict(match="0", selector="all")],
    )
    assert lossless(pikv) == PiKVConfig(page_size=16)
