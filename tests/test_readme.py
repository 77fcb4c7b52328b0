"""What the README says runs, and names what is there."""

import re
from pathlib import Path

from ranks import run_ranks
from tiny_directory import save_tiny_mixtral

from pikv_megatron.config import PiKVConfig

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def run_program(program: str) -> dict:
    printed = []
    exec(compile(program, "README.md", "exec"), {"print": lambda *args: printed.append(args)})
    return {"printed": printed}


def test_the_program_runs_on_two_ranks(tmp_path):
    save_tiny_mixtral(tmp_path)
    (program,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    program = program.replace("models/demo", str(tmp_path)).replace('"configs', f'"{ROOT}/configs')
    first, second = run_ranks(run_program, 2, program)
    assert first == second and len(first["printed"]) == 1 and first["printed"][0][0]


def test_the_table_is_the_configuration():
    rows = dict(re.findall(r"^\| `(\w+)` \| (\S+) \|", README, re.MULTILINE))
    defaults = {name: field.default for name, field in PiKVConfig.model_fields.items()}
    assert rows == {name: str(value).lower() for name, value in defaults.items()}


def test_the_tree_is_there():
    (tree,) = re.findall(r"## The tree\n\n(.*?)\n\n##", README, re.DOTALL)
    folder = ROOT
    for line in tree.splitlines():
        indent, name = len(line) - len(line.lstrip()), line.split()[0]
        folder = ROOT / "pikv_megatron" if indent > 4 else ROOT
        assert (folder / name).exists(), name
