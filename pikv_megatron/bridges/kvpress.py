"""Retention and codecs as a press of NVIDIA kvpress, on models of `transformers`.

    from kvpress import KVPressTextGenerationPipeline
    press = PiKVPress(PiKVConfig(preset="h2o"))
    with cache_positions(model):
        pipeline("kv-press-text-generation", model=model)(context, question=..., press=press)

Legend: b sequences, t tokens of each, np query heads, ng KV heads, w width of a head.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from math import sqrt

import torch
from kvpress import BasePress
from kvpress.utils import get_prerope_query_states
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import rotate_half

from pikv_megatron.cache.step.step_rows import StepRow
from pikv_megatron.config import PiKVConfig
from pikv_megatron.layer_spec import LayerShape, LayerSpec
from pikv_megatron.retention.keep_all import KeepAllOptions
from pikv_megatron.router.all_shards import AllShardsOptions
from pikv_megatron.selector.all_pages import AllPagesOptions
from pikv_megatron.transformer.context import PiKVInferenceContext
from pikv_megatron.types import KVShape


class PiKVPress(BasePress):
    """Fills the very cache that an engine of one rank fills with a prompt, and gives the model what
    is left in it: pages restored from what was stored, token buffers and windows as computed.

    Args:
        pikv: the cache's configuration. What acts while tokens are decoded is refused.

    Attributes:
        held_bytes: of the caches of the last prompt, all layers and sequences, metadata included;
            what the model is given takes more, as it is restored.
        dense_bytes: of its keys and values as computed.

    Raises:
        ValueError: a method cannot act in a press; names it.
    """

    def __init__(self, pikv: PiKVConfig):
        for options in (pikv, *pikv.layers):
            _refuse_decoding(options)
        self.pikv = pikv
        self.held_bytes = self.dense_bytes = 0

    def post_init_from_model(self, model):
        self.held_bytes = self.dense_bytes = 0

    @torch.no_grad()
    def compress(self, module, hidden_states, keys, values, attentions, kwargs):
        if keys.shape[2] != hidden_states.shape[1]:
            return keys, values  # a sliding window keeps its last tokens by itself
        query = _rotated_queries(module, hidden_states, kwargs["position_embeddings"])
        spec = self._spec(module, keys)
        left = [self._left(spec, *parts) for parts in zip(query, keys, values)]
        counts = {x.shape[1] for x, _ in left}
        if len(counts) > 1:
            raise ValueError(
                f"retention {spec.options.retention.name} keeps {sorted(counts)} tokens of the "
                "sequences of a batch, and a cache of `transformers` holds as many of each: "
                "compress them one by one"
            )
        return tuple(torch.stack(parts) for parts in zip(*left))

    def _spec(self, module: nn.Module, keys: Tensor) -> LayerSpec:
        config, width = module.config, keys.shape[3]
        kv = KVShape(keys.shape[1], width, width, keys.dtype, keys.device)
        scale = getattr(module, "scaling", None) or 1 / sqrt(width)
        shape = LayerShape(kv, config.num_attention_heads, scale)
        return self.pikv.resolve([shape] * config.num_hidden_layers)[module.layer_idx]

    def _left(
        self, spec: LayerSpec, query: Tensor, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Of one sequence, [np or ng, t, w] each: keys and values [ng, t', w] by position."""
        length = keys.shape[1]
        longest = self.pikv.max_sequence_length or length
        context = PiKVInferenceContext(1, longest, self.pikv, [spec])
        sequence, layer = context.start(0), context.layers[spec.number]
        context.reserve([(sequence, length)])
        tokens = (x.transpose(0, 1) for x in (query, keys, values))
        for chunk in zip(*(x.split(self.pikv.prefill_chunk_size) for x in tokens)):
            context.begin_step([[StepRow(sequence, len(chunk[0]))]], keys.device)
            layer.attend(*(x.contiguous() for x in chunk), context.plan)
            layer.settle(context.plan, None)
            context.finish_step()
        self.held_bytes += context.allocated_bytes()
        self.dense_bytes += length * spec.kv.token_bytes
        store = layer.store
        pages = store.table.pages_of(sequence.slot)
        restored = store.restore(pages, torch.zeros_like(pages))
        sealed = store.pool.position[pages].flatten().long()
        stored = store.positions(sequence.slot).long()
        is_open = torch.ones(length, dtype=torch.bool, device=keys.device)
        is_open[self.pikv.num_sinks : sequence.flushed] = False
        is_open[stored[len(sealed) :]] = True
        whole = torch.cat([sealed, is_open.nonzero().squeeze(1)])
        order = whole.argsort()
        return tuple(
            torch.cat([page.flatten(1, 2).to(x.dtype), x[:, is_open]], dim=1)[:, order]
            for page, x in zip(restored, (keys, values))
        )


@contextmanager
def cache_positions(model: nn.Module) -> Iterator[None]:
    """Tell attention layers the positions that kvpress 0.5 asks for: `transformers` 5.3 and newer
    no longer pass `cache_position` on. And give each a mask of its own where several tokens come
    behind a cache: `transformers` makes one for all, and layers may have kept unlike numbers."""
    language_model = getattr(model.model, "language_model", model.model)
    hooks = [
        layer.self_attn.register_forward_pre_hook(_describe_cache, with_kwargs=True)
        for layer in language_model.layers
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _describe_cache(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    cache, hidden = kwargs.get("past_key_values"), kwargs.get("hidden_states")
    if cache is None or hidden is None:
        return args, kwargs
    past, count = cache.get_seq_length(module.layer_idx), hidden.shape[1]
    if kwargs.get("cache_position") is None:
        kwargs["cache_position"] = torch.arange(past, past + count, device=hidden.device)
    mask = kwargs.get("attention_mask")
    if past and count > 1 and mask is not None and mask.shape[-1] != past + count:
        is_seen = torch.ones(count, past + count, dtype=torch.bool, device=hidden.device)
        is_seen = is_seen.tril(past).expand(*mask.shape[:2], -1, -1)
        if mask.dtype == torch.bool:
            kwargs["attention_mask"] = is_seen
        else:
            kwargs["attention_mask"] = torch.zeros_like(is_seen, dtype=mask.dtype).masked_fill(
                ~is_seen, torch.finfo(mask.dtype).min
            )
    return args, kwargs


def _rotated_queries(
    module: nn.Module, hidden_states: Tensor, embeddings: tuple[Tensor, Tensor]
) -> Tensor:
    """[b, np, t, w]."""
    query = get_prerope_query_states(module, hidden_states)
    cos, sin = (x.unsqueeze(1) for x in embeddings)
    return query * cos + rotate_half(query) * sin


def _refuse_decoding(options) -> None:
    """What chooses while tokens are decoded, and what a cache of `transformers` cannot hold."""
    for field, lossless in (("router", AllShardsOptions), ("selector", AllPagesOptions)):
        method = getattr(options, field)
        if method is not None and not isinstance(method, lossless):
            raise ValueError(
                f"{field} {method.name} chooses what a decoded token reads, and a press acts on "
                f"prompts only: leave {field} out"
            )
    codec, retention = options.codec, options.retention or KeepAllOptions()
    if codec is not None and codec.transform.name == "pyramidkv":
        raise ValueError(
            "codec.transform pyramidkv stores several tokens as one, which a cache of "
            "`transformers` cannot weigh: name another transform"
        )
    if codec is not None and codec.keys == "before_rope":
        raise ValueError(
            "codec.keys before_rope asks the model's layers of RoPE, and a press knows none: leave "
            "it out"
        )
    if retention.needs_scores:
        raise ValueError(f"retention {retention.name}: use the press itself")
