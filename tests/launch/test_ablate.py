"""launch/ablate.py says what each layer costs that streams."""

import re
from pathlib import Path

from launcher import run_alone
from tiny_directory import save_tiny_mixtral

PROGRAM = Path(__file__).parents[2] / "launch/ablate.py"
SIZES = "shard_after: 0\npage_size: 4\nnum_sinks: 2\nwindow: 8\nflush_interval: 3\n"


def test_every_layer_has_a_row(tmp_path):
    save_tiny_mixtral(tmp_path / "model")
    (tmp_path / "cache.yaml").write_text(SIZES)
    done = run_alone(
        PROGRAM, "--model", str(tmp_path / "model"), "--pikv", str(tmp_path / "cache.yaml"),
        "--tasks", "text", "--length", "64", "--samples", "2",
    )
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^ (\d) +([\d.]+) +([\d.]+) +([\d.]+) *$", done.stdout, re.MULTILINE)
    assert [layer for layer, *_ in rows] == ["0", "1"]
    for _, divergence, accuracy, mass in rows:
        assert 0 < float(divergence) < 1 and 0 <= float(accuracy) <= 100 and 10 < float(mass) < 100
