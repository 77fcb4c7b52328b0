"""Trains the demo model with Megatron-Core, in one process."""

import time
from dataclasses import asdict, dataclass
from functools import partial

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from pikv_megatron.checkpoint.architecture import Architecture
from pikv_megatron.checkpoint.model_builder import build_model
from pikv_megatron.demo.batches import Batch, Batches
from pikv_megatron.demo.causal_attention import with_causal_attention
from pikv_megatron.demo.settings import TrainingSettings
from pikv_megatron.inference.progress import Advance

STEPS_PER_POINT = 50


@dataclass
class Losses:
    """What a step measured, before it changed the weights.

    Attributes:
        recall_loss: nats per answer.
        recall_accuracy: share of answers that were the likeliest token.
        text_loss: nats per byte.
    """

    recall_loss: float
    recall_accuracy: float
    text_loss: float


def build_for_training(
    architecture: Architecture,
    settings: TrainingSettings,
    pg_collection: ProcessGroupCollection,
    seed: int,
) -> GPTModel:
    """The model in training mode, with first weights that the seed decides."""
    torch.manual_seed(seed)
    overrides = dict(
        moe_router_load_balancing_type="aux_loss",
        moe_aux_loss_coeff=settings.balance_coefficient,
        init_method_std=settings.input_std,
        output_layer_init_method=partial(torch.nn.init.normal_, std=settings.output_std),
    )
    model = build_model(
        architecture, pg_collection, spec_transform=with_causal_attention, overrides=overrides
    )
    embedding = model.embedding.word_embeddings.weight
    torch.nn.init.normal_(embedding, std=settings.embedding_std)
    return model.train()


def train(model: GPTModel, settings: TrainingSettings, batches: Batches, advance: Advance) -> list:
    """Run every stage.

    Args:
        model: from `build_for_training`; changed in place, and left in evaluation mode.
        settings: optimizer and stages.
        batches: what to learn from.
        advance: called with (steps done, steps) after each.

    Returns:
        The curve, a point for each `STEPS_PER_POINT` steps: dictionaries of `step`, `seconds`,
        `stage` and the means of `Losses` since the point before.
    """
    optimizer = make_optimizer(model, settings)
    curve, recent, start = [], [], time.perf_counter()
    stages = [(i, s) for i, s in enumerate(settings.stages) for _ in range(s.steps)]
    for step, (index, stage) in enumerate(stages):
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate_at(step)
        recent.append(train_step(model, optimizer, settings, batches.batch(stage, step)))
        advance(step + 1, len(stages))
        if (step + 1) % STEPS_PER_POINT == 0 or step + 1 == len(stages):
            point = {"step": step + 1, "seconds": time.perf_counter() - start, "stage": index + 1}
            curve.append(point | _means(recent))
            recent = []
    model.eval()
    return curve


def make_optimizer(model: GPTModel, settings: TrainingSettings) -> torch.optim.Optimizer:
    """AdamW; norms, the only vectors, do not decay."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas)


def train_step(
    model: GPTModel,
    optimizer: torch.optim.Optimizer,
    settings: TrainingSettings,
    batch: Batch,
) -> Losses:
    """One step down the sum of the mean losses of answers and of text."""
    logits = forward(model, batch.ids)[:, :-1]
    targets = batch.ids[:, 1:]
    is_answer, is_text = batch.is_answer[:, 1:], batch.is_text[:, 1:]
    losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    recall_loss = losses[is_answer].mean()
    text_loss = losses[is_text].mean()
    optimizer.zero_grad()
    (recall_loss + text_loss).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_gradient_norm)
    optimizer.step()
    is_right = logits.detach().argmax(-1)[is_answer] == targets[is_answer]
    return Losses(recall_loss.item(), is_right.float().mean().item(), text_loss.item())


def forward(model: GPTModel, ids: Tensor) -> Tensor:
    """Logits `[b, s, vocab]` of whole sequences `[b, s]`, without a cache."""
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    return model(ids, positions, None)


def _means(losses: list[Losses]) -> dict[str, float]:
    rows = [asdict(loss) for loss in losses]
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
