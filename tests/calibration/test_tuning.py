"""What layers cost alone, and what is chosen for them."""

import pytest

from pikv_megatron import PiKVConfig
from pikv_megatron.calibration.tuning import Cost, Tuning, choose, one_by_one, tuned
from pikv_megatron.evaluation.evaluator import lossless

LAYERS = [
    [Cost("lossless", 0.0, 0.0), Cost("near", 1.0, 0.4), Cost("int4", 0.1, 0.3)],
    [Cost("lossless", 0.0, 0.0), Cost("near", 0.2, 0.4), Cost("int4", 0.3, 0.3)],
]
NEAR = PiKVConfig(page_size=8, retention="streaming")
INT4 = PiKVConfig(page_size=8, codec={"format": "int4"})
CACHES = {"lossless": lossless(NEAR), "near": NEAR, "int4": INT4}


@pytest.mark.parametrize("share, names, divergence, held", [
    (1.0, ["lossless", "lossless"], 0.0, 1.0),
    (0.65, ["lossless", "near"], 0.2, 0.6),
    (0.7, ["int4", "lossless"], 0.1, 0.7),
    (0.3, ["int4", "near"], 0.3, 0.3),
    (0.2, ["near", "near"], 1.2, 0.2),
])
def test_the_least_divergence_within_the_bytes(share, names, divergence, held):
    tuning = choose(LAYERS, 1.0, share)
    assert tuning.caches == names
    assert tuning[1:] == (pytest.approx(divergence), pytest.approx(held))


def test_too_few_bytes_are_refused():
    with pytest.raises(ValueError, match="--share 0.1: .* the smallest of these caches hold 0.200"):
        choose(LAYERS, 1.0, 0.1)


def test_each_cache_is_given_to_each_layer_alone():
    found = one_by_one(CACHES, 2)
    assert list(found) == [
        "lossless", "near, layer 0", "near, layer 1", "int4, layer 0", "int4, layer 1",
    ]
    (other,) = found["int4, layer 1"].layers
    assert other.match == "1" and other.methods() == {"codec": INT4.codec}
    assert lossless(found["int4, layer 1"]) == CACHES["lossless"]


def test_layers_of_one_cache_are_named_together():
    pikv = tuned(CACHES, Tuning(["near", "lossless", "int4", "near"], 0.0, 0.0))
    assert {part.match: part.methods() for part in pikv.layers} == {
        "0,3": {"retention": NEAR.retention}, "2": {"codec": INT4.codec},
    }


@pytest.mark.parametrize("other, message", [
    (PiKVConfig(page_size=16), "--pikv other: its sizes or its calibration are not those"),
    (PiKVConfig(page_size=8, layers=[{"match": "0", "retention": "h2o"}]),
     "--pikv other: its layers are to be chosen"),
])
def test_caches_that_differ_otherwise_are_refused(other, message):
    with pytest.raises(ValueError, match=message):
        one_by_one({**CACHES, "other": other}, 2)
