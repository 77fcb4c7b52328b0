"""Tiny MoE models, and their logits through a PiKV cache and without one."""

import re
import zlib

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import TransformerConfig

from pikv_megatron import PiKVConfig, PiKVInferenceContext, pikv_layer_spec
from pikv_megatron.cache.step.step_rows import StepRow

VOCAB = 96


def config(pg, **changes) -> TransformerConfig:
    values = dict(
        num_layers=2, hidden_size=32, num_attention_heads=4, num_query_groups=2, kv_channels=16,
        num_moe_experts=8, moe_router_topk=2, moe_ffn_hidden_size=32, ffn_hidden_size=32,
        normalization="RMSNorm", add_bias_linear=False, gated_linear_unit=True,
        activation_func=F.silu, moe_token_dispatcher_type="alltoall", hidden_dropout=0.0,
        attention_dropout=0.0, attention_backend=AttnBackend.local, init_method_std=0.2,
        expert_model_parallel_size=pg.ep.size(), tensor_model_parallel_size=pg.tp.size(),
        expert_tensor_parallel_size=pg.tp.size(),
    )
    return TransformerConfig(**{**values, **changes})


def build(
    pg, pikv: PiKVConfig | None, spec=None, seed: int = 0, gpt: dict | None = None, **changes
):
    cfg = config(pg, **changes)
    if spec is None:
        spec = get_gpt_layer_local_spec(
            num_experts=cfg.num_moe_experts, normalization="RMSNorm",
            qk_layernorm=cfg.qk_layernorm,
        )
    if pikv is not None:
        spec = pikv_layer_spec(spec, pikv)
    torch.manual_seed(seed)
    arguments = dict(vocab_size=VOCAB, max_sequence_length=512, position_embedding_type="rope")
    return GPTModel(cfg, spec, pg_collection=pg, **{**arguments, **(gpt or {})}).eval()


@torch.no_grad()
def draw_weights(model, ep_rank: int) -> None:
    """Weights by their names in the whole model: the same at every expert-parallel size."""
    for name, weight in model.named_parameters():
        found = re.search(r"local_experts\.(\d+)", name)
        if found:
            number = ep_rank * model.decoder.layers[0].mlp.num_local_experts + int(found[1])
            name = name.replace(found[0], f"experts.{number}")
        if weight.dim() > 1:
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            weight.copy_(0.2 * torch.randn(weight.shape, generator=generator))


@torch.no_grad()
def plain_logits(model, sequence: list[int]) -> torch.Tensor:
    """[s, vocab] from one pass over the whole sequence, without a cache."""
    ids = torch.tensor([sequence])
    return model(ids, torch.arange(len(sequence))[None], None, runtime_gather_output=True)[0]


@torch.no_grad()
def cached_logits(
    model, context: PiKVInferenceContext, sequences: list[list[int]], prompt_lens: list[int],
    chunk: int,
) -> dict[int, torch.Tensor]:
    """[s, vocab] of this rank's sequences, fed in ragged prompt chunks, then token by token."""
    context.keep_all_logits()
    homes = [index % context.num_ranks for index in range(len(sequences))]
    live = [context.start(home) for home in homes]
    logits: dict[int, list] = {i: [] for i, home in enumerate(homes) if home == context.rank}
    while True:
        counts = [
            min(chunk, prompt_len - s.length) if s.length < prompt_len
            else min(1, len(tokens) - s.length)
            for s, tokens, prompt_len in zip(live, sequences, prompt_lens)
        ]
        if any(s.length < prompt_len for s, prompt_len in zip(live, prompt_lens)):
            counts = [c if s.length < p else 0 for c, s, p in zip(counts, live, prompt_lens)]
        active = [index for index, count in enumerate(counts) if count]
        if not active:
            return {index: torch.cat(parts) for index, parts in logits.items()}
        by_rank = [
            [i for i in active if homes[i] == rank] for rank in range(context.num_ranks)
        ]
        context.begin_step(
            [[StepRow(live[i], counts[i]) for i in own] for own in by_rank], torch.device("cpu")
        )
        plan, own = context.plan, by_rank[context.rank]
        index_of = {live[i].slot: i for i in own}
        order = [index_of[row.sequence.slot] for row in plan.rows]
        fed = [sequences[i][live[i].length : live[i].length + counts[i]] for i in order]
        ids = torch.zeros(1, plan.num_padded, dtype=torch.int64)
        ids[0, : plan.num_tokens] = torch.tensor([token for part in fed for token in part])
        out = model(
            ids, plan.tokens.positions.unsqueeze(0), None, inference_context=context,
            runtime_gather_output=True,
        )
        context.finish_step()
        context.check_integrity()
        parts = out[0, : plan.num_tokens].split([counts[i] for i in order])
        for i, part in zip(order, parts):
            logits[i].append(part)
