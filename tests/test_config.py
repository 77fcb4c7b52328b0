"""Methods are named and given parameters; what does not fit is refused by name."""

from operator import attrgetter
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from pikv_megatron import PiKVConfig
from pikv_megatron.layer_options import LayerOptions
from pikv_megatron.layer_spec import LayerShape
from pikv_megatron.options import members
from pikv_megatron.presets import preset_files
from pikv_megatron.retention.registry import Retention
from pikv_megatron.router.registry import Router
from pikv_megatron.selector.registry import Selector
from pikv_megatron.sketch.registry import Sketch
from pikv_megatron.types import KVShape

SHAPE = LayerShape(KVShape(2, 16, 16, torch.float32, torch.device("cpu")), 4, 0.25)
FAMILIES = {"router": Router, "selector": Selector, "sketch": Sketch, "retention": Retention}
BARE = [
    (field, name) for field, kind in FAMILIES.items() for name, options in members(kind).items()
    # tests/retention has the others.
    if options.extra is None and not options.needs_calibration
]


@pytest.mark.parametrize("field, name", BARE)
def test_a_bare_name_is_enough(field, name):
    (spec,) = PiKVConfig(**{field: name}).resolve([SHAPE])
    assert getattr(spec.options, field).name == name


@pytest.mark.parametrize("field, name", BARE)
def test_a_method_is_what_it_says_in_full(field, name):
    bare = PiKVConfig(**{field: name})
    assert PiKVConfig(**{field: getattr(bare, field).model_dump()}) == bare
    with pytest.raises(ValidationError, match="bogus"):
        PiKVConfig(**{field: {"name": name, "bogus": 1}})


def test_parameters_read_as_they_are_written():
    config = PiKVConfig(
        router={"name": "top_k", "k": 3}, selector={"name": "mass", "share": 0.7, "tail": "mean"},
        sketch={"name": "low_rank", "rank": 4, "bits": 4}, retention="h2o",
        budget={"name": "share", "keep": 0.5},
        codec={"transform": {"name": "svd", "rank": 8}, "format": "int4"},
    )
    assert (config.router.k, config.selector.share, config.sketch.rank) == (3, 0.7, 4)
    assert config.codec.format.name == "int4" and config.codec.transform.rank == 8
    assert PiKVConfig(codec="none") == PiKVConfig()


@pytest.mark.parametrize("fields, sketch", [
    ({}, "none"), ({"selector": "budget"}, "low_rank"), ({"router": "top_k"}, "low_rank"),
    ({"selector": "mass", "sketch": "mean_key"}, "mean_key"), ({"sketch": "none"}, "none"),
    ({"sketch": "bounding_box"}, "bounding_box"), ({"selector": "certified"}, "keys"),
])
def test_the_sketch_is_the_one_that_is_needed(fields, sketch):
    assert PiKVConfig(**fields).resolve([SHAPE])[0].options.sketch.name == sketch


@pytest.mark.parametrize("fields, message", [
    ({"selector": "budget", "sketch": "none"}, "budget needs a sketch, and sketch is none"),
    ({"router": "top_k", "sketch": "none"}, "router top_k needs a sketch"),
    ({"budget": "share"}, "budget share limits the pages that stay, and retention is all"),
    ({"selector": "nearest"}, "expected tags: 'all', 'budget', 'mass'"),
    ({"selector": {"name": "mass", "share": 1.5}}, "selector.mass.share"),
    ({"selector": "certified", "sketch": "mean_key"}, "sketch mean_key has none"),
    ({"selector": "certified", "router": "top_k"}, "router top_k skips token buffers"),
    ({"selector": "sampled", "retention": "h2o"}, "retention h2o counts what each had"),
    ({"replicas": 2}, "replicas 2 needs expert_shards"),
    ({"expert_shards": 3}, "expert_shards must be a power of two up to 32, got 3"),
    ({"preset": "fastest"}, "preset 'fastest' is unknown: the presets are .*lossless"),
    ({"layers": [{"match": "first", "codec": "none"}]}, "layers.0.match"),
])
def test_what_does_not_fit_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        PiKVConfig(**fields)


def test_keys_override_those_of_the_preset(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("preset: lossless\nwindow: 32\nselector: mass\n")
    config = PiKVConfig.from_file(path)
    assert (config.window, config.selector.name, config.page_size) == (32, "mass", 64)


def test_a_calibration_is_looked_for_beside_its_configuration(tmp_path):
    path = tmp_path / "caches" / "own.yaml"
    path.parent.mkdir()
    path.write_text("calibration: ../fitted.safetensors\n")
    with pytest.raises(ValueError, match=r"own.yaml: calibration ../fitted.*: there is no file "):
        PiKVConfig.from_file(path)
    calibration = tmp_path / "fitted.safetensors"
    calibration.touch()
    assert PiKVConfig.from_file(path).calibration == calibration
    path.write_text(f"calibration: {calibration}\n")
    assert PiKVConfig.from_file(path).calibration == calibration


def test_every_path_begins_at_the_folder_of_its_file(tmp_path):
    path = tmp_path / "some/own.yaml"
    path.parent.mkdir()
    path.write_text("""
        learned: ../learned.safetensors
        router: reinforced
        sketch: low_rank
        retention: {name: flexgen, directory: tiers}
        layers: [{match: 0, retention: {name: flexgen, directory: /elsewhere}}]
    """)
    config = PiKVConfig.from_file(path)
    assert config.learned == tmp_path / "learned.safetensors"
    assert config.retention.directory == path.parent / "tiers"
    assert config.layers[0].retention.directory == Path("/elsewhere")
    config.to_file(tmp_path / "written.yaml")
    assert PiKVConfig.from_file(tmp_path / "written.yaml") == config


@pytest.mark.parametrize("path", preset_files().values(), ids=lambda path: path.stem)
def test_a_preset_is_the_file_of_its_name(path):
    assert PiKVConfig(preset=path.stem) == PiKVConfig.from_file(path)


def test_layers_can_have_methods_of_their_own():
    config = PiKVConfig(
        selector="budget", sketch="mean_key",
        layers=[
            {"match": "0-1", "selector": "all"},
            {"match": "1,3", "codec": {"format": "int8"}},
            {"match": 3, "selector": {"name": "budget", "pages": 5}},
        ],
    )
    options = [spec.options for spec in config.resolve([SHAPE] * 4)]
    assert [o.selector.name for o in options] == ["all", "all", "budget", "budget"]
    assert [o.codec.format.name for o in options] == ["plain", "int8", "plain", "int8"]
    assert options[3].selector.pages == 5 and options[0].sketch.name == "mean_key"


@pytest.mark.parametrize("fields, message", [
    ({"layers": [{"match": "1-4", "selector": "mass"}]}, "match '1-4' names layer 4"),
    ({"router": {"name": "top_k", "source": "moe"}}, "source moe visits the shards of experts"),
    ({"layers": [{"match": "0", "sketch": "none"}], "selector": "mass"}, "needs a sketch"),
    ({"sketch": {"name": "low_rank", "rank": 99}}, "sketch.rank 99 exceeds the width of a key"),
    ({"selector": "certified", "replicas": 2, "expert_shards": 2}, "with replicas 2 several hold"),
    ({"selector": "certified", "sketch": "bounding_box", "codec": {"transform": "pyramidkv"}},
     "transform pyramidkv pools tokens that sketch bounding_box bounds"),
    ({"codec": {"format": "int4"}, "page_size": 3}, "page_size 3 must be a multiple of 2"),
])
def test_what_does_not_fit_the_model_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        PiKVConfig(**fields).resolve([SHAPE] * 4)


def test_nothing_is_left_open():
    for spec in PiKVConfig().resolve([SHAPE] * 2):
        assert all(getattr(spec.options, name) is not None for name in LayerOptions.model_fields)


@pytest.mark.parametrize("fields, found", [
    ({"router": "hash"}, {"router.k": 4}),
    ({"router": {"name": "hierarchical", "groups": 8}},
     {"router.k": 4, "router.visited_groups": 2}),
    ({"selector": {"name": "budget", "pages": 3}},
     {"selector.share": 0.25, "selector.pages": None}),
    ({"retention": "h2o"}, {"budget.keep": 0.25}),
    ({"retention": "h2o", "budget": {"name": "pyramid", "steepness": 0.2}},
     {"budget.keep": 0.25, "budget.steepness": 0.2}),
    ({"retention": "token_eviction"}, {"retention.pages": 4, "budget": None}),
    ({"retention": "flexgen", "selector": "budget"}, {"budget.keep": 0.25, "selector.share": 0.25}),
])
def test_a_method_is_put_at_a_share(fields, found):
    put = PiKVConfig(**fields).at_share(0.25, 16)
    assert {name: attrgetter(name)(put) for name in found} == found


@pytest.mark.parametrize("fields", [
    {}, {"selector": "mass"}, {"selector": "certified"}, {"codec": {"format": "int4"}},
    {"retention": "h2o", "budget": {"name": "bytes", "bytes": 4096}},
])
def test_a_method_that_spends_no_share_stays_as_it_is(fields):
    assert PiKVConfig(**fields).at_share(0.25, 16) is None


@pytest.mark.parametrize("fields, share, message", [
    ({"router": "hash"}, 0.3,
     "router hash .* 0.3 of 16 is 24/5: set token_shards.* multiple of 10"),
    ({"retention": "token_eviction"}, 0.3, "retention token_eviction .* 0.3 is none of 1/2, 1/3"),
    ({"retention": "token_eviction"}, 1.0, "token_eviction makes one of 2 to 64 pages, and 1 is"),
    ({"retention": "h2o", "budget": "pyramid"}, 0.9, "steepness 0.5 give the first layer 1.35"),
])
def test_refuses_a_share_that_cannot_be_had(fields, share, message):
    with pytest.raises(ValueError, match=message):
        PiKVConfig(**fields).at_share(share, 16)
