"""MoE layers in pairs, stock and lean, and steps to feed them."""

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from parity_models import build

from pikv_megatron import PiKVConfig, PiKVInferenceContext
from pikv_megatron.cache.step.step_rows import StepRow
from pikv_megatron.transformer.lean_moe import LeanMoELayer

PIKV = PiKVConfig(shard_after=0, page_size=4, window=3, num_sinks=1, flush_interval=2)


def moe_pair(pg, **changes) -> tuple[MoELayer, LeanMoELayer, PiKVInferenceContext]:
    """The MoE layers of a stock model and of a swapped one with the same drawn parameters."""
    changes = {"num_layers": 1, **changes}
    stock, lean = build(pg, None, **changes), build(pg, PIKV, seed=1, **changes)
    with torch.no_grad():
        for name, tensor in stock.state_dict().items():
            if name.endswith("bias"):  # Megatron starts them at zero
                tensor.normal_()
    lean.load_state_dict(stock.state_dict(), strict=True)
    context = PiKVInferenceContext.for_model(lean, PIKV, 40, 300)
    return stock.decoder.layers[0].mlp, lean.decoder.layers[0].mlp, context


def begin_step(context: PiKVInferenceContext, counts: list[list[int]]) -> None:
    """Feed new sequences so many tokens, by home rank."""
    rows = [[StepRow(context.start(rank), n) for n in own] for rank, own in enumerate(counts)]
    context.begin_step(rows, torch.device("cpu"))
