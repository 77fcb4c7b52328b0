"""PiKV for Megatron-Core: an expert-sharded KV cache for Mixture-of-Experts inference."""

from pikv_megatron.config import PiKVConfig
from pikv_megatron.inference.engine import Engine
from pikv_megatron.inference.generation import GenerationOutput, PiKVForCausalLM
from pikv_megatron.inference.request import Request
from pikv_megatron.inference.sampling import SamplingParams
from pikv_megatron.runtime.process_groups import (
    destroy_process_groups,
    init_process_groups,
    process_groups,
)
from pikv_megatron.transformer.context import PiKVInferenceContext
from pikv_megatron.transformer.layer_specs import pikv_layer_spec

__all__ = [
    "Engine",
    "GenerationOutput",
    "PiKVConfig",
    "PiKVForCausalLM",
    "PiKVInferenceContext",
    "Request",
    "SamplingParams",
    "destroy_process_groups",
    "init_process_groups",
    "pikv_layer_spec",
    "process_groups",
]
