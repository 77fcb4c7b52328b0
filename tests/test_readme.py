"""What the README says runs, and names what is there."""

import re
from pathlib import Path

import torch
from pydantic import TypeAdapter
from ranks import run_ranks
from tiny_directory import save_tiny_mixtral

from pikv_megatron.checkpoint.families.registry import FAMILIES
from pikv_megatron.codec.registry import CodecOptions
from pikv_megatron.config import PiKVConfig
from pikv_megatron.methods import methods_table
from pikv_megatron.options import Options, family
from pikv_megatron.planner.__main__ import main as planner
from pikv_megatron.retention.keep_all import KeepAllOptions
from pikv_megatron.types import PageStats

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def run_program(program: str) -> dict:
    printed = []
    exec(compile(program, "README.md", "exec"), {"print": lambda *args: printed.append(args)})
    return {"printed": printed}


def test_the_program_runs_on_two_ranks(tmp_path):
    save_tiny_mixtral(tmp_path)
    program = python_blocks()[0]
    program = program.replace("models/demo", str(tmp_path)).replace('"configs', f'"{ROOT}/configs')
    first, second = run_ranks(run_program, 2, program)
    assert first == second and len(first["printed"]) == 1 and first["printed"][0][0]


def test_files_that_it_names_are_there():
    named = set(re.findall(r"`([\w./-]+/[\w.-]+\.(?:py|yaml|json|md|safetensors))`", README))
    named -= {"pikv_megatron/retention/random_pages.py"}  # the reader's
    folders = ROOT, ROOT / "pikv_megatron"
    lost = [name for name in named if not any((folder / name).exists() for folder in folders)]
    assert len(named) > 30 and not lost


def test_the_table_is_the_configuration():
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^`|]\S*) \|", README, re.MULTILINE))
    defaults = {name: shown(field.default) for name, field in PiKVConfig.model_fields.items()}
    assert rows == defaults


def shown(default) -> str:
    """A default as a configuration file would name it."""
    if default == () or default == CodecOptions():
        return "none"
    return default.name if isinstance(default, Options) else str(default).lower()


def test_the_models_are_those_that_load():
    header, *rows = re.findall(r"^\| [^`|]+ \| `(\w+)` \|", README, re.MULTILINE)
    assert header == "model_type" and rows == list(FAMILIES)


def test_the_methods_are_those_that_there_are():
    assert methods_table() in README


def test_the_method_of_the_example_works():
    program = python_blocks()[1]
    assert len(program.splitlines()) < 40
    made: dict = {}
    exec(compile(program, "README.md", "exec"), made)
    kind = family(made["RandomPagesOptions"], KeepAllOptions)
    chosen = TypeAdapter(kind).validate_python("random")
    newest = torch.arange(20).unsqueeze(0)
    drop = chosen.build().drop(PageStats(newest >= 0, newest, 0 * newest), torch.tensor([[6]]))
    assert int((~drop).sum()) == 6 and not torch.equal(drop, drop.sort().values)


def test_the_planner_says_what_it_is_said_to_say(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    (command,) = re.findall(r"^    python -m pikv_megatron.planner (.*)$", README, re.MULTILINE)
    assert planner(command.split()) == 0
    assert f"\n\n    {capsys.readouterr().out.splitlines()[-1]}\n\n" in README


def python_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_tree_is_there():
    (tree,) = re.findall(r"## The tree\n\n(.*?)\n\n##", README, re.DOTALL)
    folder = ROOT
    for line in tree.splitlines():
        indent, name = len(line) - len(line.lstrip()), line.split()[0]
        folder = ROOT / "pikv_megatron" if indent > 4 else ROOT
        assert (folder / name).exists(), name
