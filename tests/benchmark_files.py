"""Small models and caches for tests of the model benchmark, and its command line."""

from pathlib import Path

import yaml

from pikv_megatron.benchmarks.model.options import BenchmarkOptions, parse_options

ROOT = Path(__file__).parents[1]
MODEL = dict(
    num_layers=2, hidden_size=32, num_attention_heads=4, num_query_groups=2, num_experts=4,
    moe_ffn_hidden_size=32, vocab_size=64, max_sequence_length=512,
)
PIKV_CONFIG = dict(
    shard_after=0, page_size=4, num_sinks=2, window=6, flush_interval=2, token_shards=2
)
LOSSY = {
    "boxes": dict(sketch="bounding_box", selector=dict(name="budget", share=0.125)),
    "heavy": dict(retention="h2o", budget=dict(name="share", keep=0.125)),
}


def write_cache(folder: Path, name: str, **changes) -> str:
    """A file for `--pikv`."""
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**PIKV_CONFIG, **changes}))
    return str(path)


def write_files(folder: Path) -> list[str]:
    """`--model` and `--pikv` with the files that they name, and a context that fits."""
    (folder / "model.yaml").write_text(yaml.safe_dump(MODEL))
    return ["--model", str(folder / "model.yaml"), "--pikv", write_cache(folder, "plain"),
            "--contexts", "40"]


def parse(*arguments: str) -> BenchmarkOptions:
    return parse_options([*arguments], ROOT / "configs")
