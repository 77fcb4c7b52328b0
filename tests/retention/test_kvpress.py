"""Scorers of NVIDIA kvpress as retention policies of the sharded cache."""

import pytest
import torch
from parity_models import VOCAB, build, draw_weights
from ranks import run_ranks
from tiny_directory import save_tiny_mixtral
from transformers import AutoModelForCausalLM, DynamicCache

from pikv_megatron import PiKVConfig, PiKVForCausalLM, pikv_layer_spec, process_groups
from pikv_megatron.checkpoint.huggingface import load_huggingface
from pikv_megatron.retention.kvpress import KVPressOptions, KVPressPolicy
from pikv_megatron.types import PageStats

kvpress = pytest.importorskip("kvpress", reason="the extra `kvpress` is not installed")

PROMPTS = [[(7 * i) % VOCAB for i in range(150)], [(3 * i + 1) % VOCAB for i in range(131)]]
NUM_NEW = 6
WINDOW = {"window_size": 16}
PRESSES = {
    "SnapKVPress": WINDOW, "TOVAPress": {}, "KnormPress": {}, "KeyDiffPress": {}, "CURPress": {},
    "ExpectedAttentionPress": {"n_future_positions": 64}, "LeverageScorePress": {},
    "StreamingLLMPress": {"compression_ratio": 0.5}, "NonCausalAttnPress": {}, "CapPress": {},
    "LagKVPress": {"lag_size": 16}, "CompactorPress": {"compression_ratio": 0.5},
}
ALIKE = "SnapKVPress", "ExpectedAttentionPress", "NonCausalAttnPress", "CapPress", "KnormPress"


def pikv(press: str, parameters: dict, **fields) -> PiKVConfig:
    sizes = dict(page_size=4, window=6, num_sinks=2, flush_interval=3, token_shards=4)
    retention = {"name": "kvpress", "press": press, "parameters": parameters}
    return PiKVConfig(shard_after=0, **sizes, retention=retention, **fields)


def run_presses(num_ranks: int, names: tuple[str, ...]) -> dict:
    """By press, the tokens, and by layer the first sequence's kept positions."""
    found = {}
    with process_groups(expert_parallel_size=num_ranks, timeout_seconds=60) as pg:
        for name in names:
            torch.manual_seed(0)  # some draw a sketch
            config = pikv(name, PRESSES[name])
            model = build(pg, config)
            draw_weights(model, pg.ep.rank())
            lm = PiKVForCausalLM(model, config, vocab_size=VOCAB)
            tokens = lm.generate(PROMPTS, max_new_tokens=NUM_NEW, keep_cache=True).token_ids
            stores = [layer.store for layer in lm.engine.context.layers.values()]
            sealed = [store.pool.position[store.table.pages_of(0)].flatten() for store in stores]
            found[name] = tokens, [positions.tolist() for positions in sealed]
            lm.engine.context.check_integrity()
    return found


@pytest.fixture(scope="module")
def found_alone() -> dict:
    return run_ranks(run_presses, 1, 1, tuple(PRESSES), timeout=280)[0]


def test_every_scorer_keeps_as_many_pages_as_the_budget_says(found_alone):
    sealed = (150 + NUM_NEW - 1 - 2 - 6) // 4
    for name, (tokens, layers) in found_alone.items():
        assert all(len(new) == NUM_NEW for new in tokens), name
        for positions in layers:
            # A quarter, rounded up in each of the 4 shards.
            assert sealed / 4 <= len(positions) / 4 <= sealed / 4 + 4, name
    kept = {name: tuple(layers[0]) for name, (_, layers) in found_alone.items()}
    assert len(set(kept.values())) > 6  # they differ


def test_ranks_keep_the_same_pages(found_alone):
    by_rank = run_ranks(run_presses, 2, 2, ALIKE, timeout=280)
    for name in ALIKE:
        tokens, layers = found_alone[name]
        assert all(found[name][0] == tokens for found in by_rank), name
        for layer, positions in enumerate(layers):
            together = [p for found in by_rank for p in found[name][1][layer]]
            assert sorted(together) == sorted(positions), name


@torch.no_grad()
def test_scores_are_those_that_a_press_gives_a_model_of_transformers(
    one_rank, tmp_path, monkeypatch
):
    """The adapter stands for the attention module that a press expects."""
    save_tiny_mixtral(tmp_path)
    ids = torch.tensor(PROMPTS[:1])
    theirs = {}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    for name in ALIKE:
        press = getattr(kvpress, name)(**PRESSES[name])

        def keep(module, args, kwargs, output):
            layer = kwargs["past_key_values"].layers[module.layer_idx]
            scores = press.score(
                module, kwargs["hidden_states"], layer.keys, layer.values, None, kwargs
            )
            theirs.setdefault(name, []).append(scores[0].mean(dim=0))

        attentions = [layer.self_attn for layer in loaded.model.layers]
        for attention in attentions:
            attention.rotary_emb = loaded.model.rotary_emb
        hooks = [x.register_forward_hook(keep, with_kwargs=True) for x in attentions]
        loaded(ids, past_key_values=DynamicCache())
        for hook in hooks:
            hook.remove()
    ours: list[torch.Tensor] = []
    score = KVPressPolicy.score
    monkeypatch.setattr(
        KVPressPolicy, "score", lambda self, prompt: ours.append(score(self, prompt)) or ours[-1]
    )
    for name in ALIKE:
        config = pikv(name, PRESSES[name])
        model = load_huggingface(
            tmp_path, one_rank, torch.float32,
            spec_transform=lambda spec: pikv_layer_spec(spec, config),
        )
        PiKVForCausalLM(model, config).generate(PROMPTS[:1], max_new_tokens=1)
        for mine, other in zip(ours, theirs[name], strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4, msg=name)
        ours.clear()


def test_a_page_without_scores_stays():
    policy = KVPressOptions().build()
    is_page, newest = torch.ones(1, 3, dtype=torch.bool), torch.tensor([[3, 7, 11]])
    score = torch.tensor([[[0.2], [torch.inf], [0.1]]])
    stats = PageStats(is_page, newest, 0 * newest, score=score)
    assert policy.drop(stats, torch.tensor([[2]])).tolist() == [[False, False, True]]


@pytest.mark.parametrize("press, parameters, message", [
    ("Nothing", {}, "kvpress has no ScorerPress"), ("ThinKPress", {}, "kvpress has no ScorerPress"),
    ("ScorerPress", {}, "scores nothing"),
    ("ObservedAttentionPress", {}, "needs all attention weights"),
    ("PyramidKVPress", {}, "drops tokens in a way of its own"),
    ("QFilterPress", {}, "is fitted to a model of `transformers`"),
    ("SnapKVPress", {"windows": 3}, "retention.parameters of SnapKVPress"),
])
def test_what_cannot_be_given_is_refused_by_name(press, parameters, message):
    with pytest.raises(ValueError, match=message):
        KVPressOptions(press=press, parameters=parameters).build()
