"""Lets Megatron-Core run where there is no CUDA device.

Megatron-Core takes CUDA for granted in a handful of places (measured on 0.16.1 and 0.19.2). Each
replacement below names the place. Nothing is touched where CUDA is available, and nothing is
touched on import: `apply_cpu_fallback` is called by the functions that start a process
(`init_process_groups`) or build a layer (`pikv_layer_spec`).
"""

import contextlib
import time

import torch

_applied = False


class _Event:
    """Host-clock stand-in for `torch.cuda.Event` (milliseconds)."""

    def __init__(self, *args, **kwargs):
        self.seconds = 0.0

    def record(self, *args):
        self.seconds = time.perf_counter()

    def wait(self, *args):
        pass

    def synchronize(self):
        pass

    def elapsed_time(self, other: "_Event") -> float:
        return (other.seconds - self.seconds) * 1e3


class _Stream:
    """Stand-in for `torch.cuda.Stream`: a CPU runs everything in order."""

    def __init__(self, *args, **kwargs):
        pass

    def wait_stream(self, *args):
        pass

    def synchronize(self):
        pass

    def record_event(self, *args):
        return _Event()


def apply_cpu_fallback() -> None:
    """Replace Megatron-Core's CUDA assumptions; a no-op with CUDA, and when called again."""
    global _applied
    if _applied or torch.cuda.is_available():
        return
    _applied = True
    _replace_torch_cuda()
    _replace_megatron_helpers()


def _replace_torch_cuda() -> None:
    current = _Stream()
    torch.cuda.current_device = lambda: torch.device("cpu")  # buffers, RoPE tables, KV memory
    torch.cuda.synchronize = lambda *args, **kwargs: None  # dist_checkpointing.save
    torch.cuda.Event = _Event  # text generation controller, MoE all-to-all dispatcher
    torch.cuda.Stream = _Stream  # MoE all-to-all dispatcher
    torch.cuda.current_stream = lambda *args: current
    torch.cuda.stream = lambda stream: contextlib.nullcontext()
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # text generation controller


def _replace_megatron_helpers() -> None:
    from megatron.core.fusions import fused_softmax
    from megatron.core.tensor_parallel.random import initialize_rng_tracker
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    if not hasattr(moe_utils, "te_general_gemm"):  # 0.16 reads the name without TransformerEngine
        moe_utils.te_general_gemm = None
    # The CUDA tracker knows no 'model-parallel-rng' state; the inference tracker forks nothing.
    initialize_rng_tracker(inference_rng_tracker=True)
    fused_softmax.get_default_causal_mask = _causal_mask  # asks for device="cuda"
    fused_softmax.get_sliding_window_causal_mask = _sliding_mask  # likewise
    token_dispatcher.maybe_move_tensor_to_cpu = _split_sizes  # leaves CPU tensors as split sizes


def _causal_mask(seq_len: int) -> torch.Tensor:
    return torch.triu(torch.ones(seq_len, seq_len, dtype=torch.bool), diagonal=1)


def _sliding_mask(num_queries: int, num_keys: int, window: tuple[int, int]) -> torch.Tensor:
    """True where a query does not see a key; the last query is the last key's."""
    seen = torch.ones(num_queries, num_keys, dtype=torch.bool)
    offset = num_keys - num_queries
    return ~seen.triu(offset - window[0]).tril(offset + window[1])


def _split_sizes(tensor, as_numpy: bool = False, record_stream: bool = False):
    return tensor.numpy() if torch.is_tensor(tensor) and as_numpy else tensor
