"""The arrays of a step's plan: runs of positions, and the one copy that brings them to a device."""

from typing import NamedTuple

import numpy as np
import torch

from pikv_megatron.cache.step import one_copy
from pikv_megatron.cache.step.step_rows import Spans


class Numbers(NamedTuple):
    first: np.ndarray
    second: np.ndarray


def test_spans_list_every_number_of_every_run():
    run, number = Spans.of(np.array([3, 7, 0, 5]), np.array([5, 7, 1, 2]))
    assert run.tolist() == [0, 0, 2] and number.tolist() == [3, 4, 0]
    assert [len(x) for x in Spans.of(np.empty(0, np.int64), np.empty(0, np.int64))] == [0, 0]


def test_one_buffer_carries_arrays_of_all_types_and_shapes():
    parts = [
        Numbers(np.arange(5)[::2], np.array([[True], [False], [True]])),
        Numbers(np.empty((0, 3), np.int32), np.array([[7]], np.int32)),
    ]
    arrays = [np.ascontiguousarray(array) for part in parts for array in part]
    near = one_copy.to_device(parts, torch.device("cpu"))
    far = list(one_copy.moved(arrays, torch.device("cpu")))
    for own, other, array in zip((x for part in near for x in part), far, arrays):
        assert own.dtype == other.dtype and own.shape == other.shape
        assert own.tolist() == other.tolist() == array.tolist()
    memory = {tensor.untyped_storage().data_ptr() for tensor in far}
    assert len(memory) == 1 and all(tensor.data_ptr() % 8 == 0 for tensor in far)
