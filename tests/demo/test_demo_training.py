"""A few steps of training lower the loss, the same way each time."""

from pathlib import Path

import pytest
import torch

from pikv_megatron.checkpoint.architecture import Architecture
from pikv_megatron.checkpoint.model_builder import build_model
from pikv_megatron.demo import training
from pikv_megatron.demo.batches import Batches
from pikv_megatron.demo.causal_attention import with_causal_attention
from pikv_megatron.demo.corpus import load_corpus
from pikv_megatron.demo.settings import TrainingSettings

CONFIGS = Path(__file__).parents[2] / "configs"
ARCHITECTURE = Architecture.from_yaml(CONFIGS / "model/demo.yaml").model_copy(
    update={"num_layers": 2, "hidden_size": 64, "num_attention_heads": 2, "num_query_groups": 1}
)


@pytest.fixture(scope="module")
def settings() -> TrainingSettings:
    settings = TrainingSettings.from_yaml(CONFIGS / "demo/training.yaml")
    small = {"recall_tokens": 512, "text_tokens": 512, "lengths": (64,), "max_pairs": 8}
    stages = [
        stage.model_copy(update=small | {"steps": steps, "min_pairs": 4})
        for stage, steps in zip(settings.stages, (6, 6))
    ]
    return settings.model_copy(update={"stages": tuple(stages), "warmup_steps": 2})


@pytest.fixture(scope="module")
def corpus() -> torch.Tensor:
    return load_corpus(held_out=True)


@pytest.fixture
def short_points(monkeypatch):
    monkeypatch.setattr(training, "STEPS_PER_POINT", 4)


def run(settings, corpus, groups, seed: int) -> tuple[list[dict], dict[str, torch.Tensor]]:
    model = training.build_for_training(ARCHITECTURE, settings, groups, seed)
    curve = training.train(model, settings, Batches(corpus, seed), lambda done, total: None)
    return curve, model.state_dict()


def without_time(curve: list[dict]) -> list[dict]:
    return [{name: value for name, value in point.items() if name != "seconds"} for point in curve]


def test_losses_fall_and_seeds_repeat(settings, corpus, one_rank, short_points):
    curve, weights = run(settings, corpus, one_rank, seed=0)
    assert [point["step"] for point in curve] == [4, 8, 12]
    assert [point["stage"] for point in curve] == [1, 2, 2]
    assert curve[-1]["text_loss"] < curve[0]["text_loss"] - 0.1
    assert curve[-1]["recall_loss"] < curve[0]["recall_loss"]
    again, same_weights = run(settings, corpus, one_rank, seed=0)
    assert without_time(again) == without_time(curve)
    for name, weight in weights.items():
        assert weight is None or torch.equal(weight, same_weights[name]), name
    other, _ = run(settings, corpus, one_rank, seed=1)
    assert without_time(other) != without_time(curve)


def test_progress_counts_every_step(settings, corpus, one_rank):
    calls = []
    model = training.build_for_training(ARCHITECTURE, settings, one_rank, 0)
    training.train(model, settings, Batches(corpus, 0), lambda *call: calls.append(call))
    assert calls == [(step, 12) for step in range(1, 13)] and not model.training


def test_first_weights_have_the_asked_spread(settings, one_rank):
    model = training.build_for_training(ARCHITECTURE, settings, one_rank, 0)
    attention = model.decoder.layers[0].self_attention
    for weight, std in (
        (model.embedding.word_embeddings.weight, settings.embedding_std),
        (attention.linear_qkv.weight, settings.input_std),
        (attention.linear_proj.weight, settings.output_std),
    ):
        assert weight.std().item() == pytest.approx(std, rel=0.05)


def test_batches_mix_recall_and_text(settings, corpus):
    for stage in settings.stages:
        batch = Batches(corpus, 0).batch(stage, 3)
        assert batch.ids.shape == batch.is_answer.shape == batch.is_text.shape == (16, 64)
        assert not (batch.is_answer & batch.is_text).any()
        assert batch.is_answer[:8].any(dim=1).all() and batch.is_text[8:].all()
        assert torch.equal(batch.ids, Batches(corpus, 0).batch(stage, 3).ids)
        assert not torch.equal(batch.ids, Batches(corpus, 0).batch(stage, 4).ids)


def test_attention_for_training_is_the_stock_one(one_rank):
    models = []
    for transform in ({}, {"spec_transform": with_causal_attention}):
        torch.manual_seed(0)
        models.append(build_model(ARCHITECTURE, one_rank, **transform))
    ids = torch.randint(0, 256, (2, 63), generator=torch.Generator().manual_seed(0))
    stock, fused = (training.forward(model, ids) for model in models)
    torch.testing.assert_close(fused, stock, rtol=0, atol=1e-5)
