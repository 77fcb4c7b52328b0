"""What is shipped, what imports what, and that every configuration file explains itself."""

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from pikv_megatron.checkpoint.architecture import Architecture
from pikv_megatron.config import PiKVConfig
from pikv_megatron.demo.settings import TrainingSettings

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "pikv_megatron"
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


def load_tuned(path: Path) -> PiKVConfig:
    """A calibration that is to be made beside the repository is stood in for by the demo model's:
    no layer is asked of it."""
    values = yaml.safe_load(path.read_text())
    beside = (path.parent / values["calibration"]).resolve()
    if beside.is_relative_to(ROOT):
        return PiKVConfig.from_file(path)
    assert beside.parent == ROOT.resolve().parent
    return PiKVConfig(**values | {"calibration": ROOT / "models/demo/calibration.safetensors"})


LOADERS = {
    "pikv": PiKVConfig.from_file,
    "presets": PiKVConfig.from_file,
    "routing": PiKVConfig.from_file,
    "selection": PiKVConfig.from_file,
    "retention": PiKVConfig.from_file,
    "codecs": PiKVConfig.from_file,
    "choices": PiKVConfig.from_file,
    "calibrated": PiKVConfig.from_file,
    "variants": PiKVConfig.from_file,
    "tuned": load_tuned,
    "model": Architecture.from_yaml,
    "demo": TrainingSettings.from_yaml,
}

# A room imports from the rows above its own only. Rooms that are not named may import all of them.
LAYERS = [
    {"types", "options"},
    {"ops"},
    {"relevance", "calibrated"},
    {"router", "selector", "retention", "codec", "sketch"},
    {"layer_options"},
    {"layer_spec"},
    {"config"},
    {"parallel"},
    {"cache"},
    {"runtime"},
    {"transformer"},
    {"checkpoint"},
    {"inference"},
]
# Where Megatron-Core and DeepSpeed may be imported; dispatchers may use DeepSpeed's collectives.
INTEGRATION = {
    "runtime", "transformer", "inference", "checkpoint", "demo", "benchmarks",
    "evaluation", "calibration",
}


def python_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def room_of(path: Path) -> str:
    """`cache` for `pikv_megatron/cache/shard.py`; a file that LAYERS names is its own room."""
    relative = path.relative_to(PACKAGE).as_posix()
    named = any(relative in layer for layer in LAYERS)
    return relative if named else relative.split("/")[0].removesuffix(".py")


def imported_names(path: Path) -> set[str]:
    """Dotted names of all that `path` imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: import by the full name"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def imported_file(name: str) -> Path | None:
    """The file of this package that a dotted name was imported from."""
    parts = name.split(".")
    if parts[0] != "pikv_megatron":
        return None
    for end in range(len(parts), 0, -1):
        path = ROOT.joinpath(*parts[:end])
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.is_file():
                return file
    return None


def layer_of(room: str) -> int:
    found = [i for i, layer in enumerate(LAYERS) if room in layer]
    return found[0] if found else len(LAYERS)


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory) -> set[str]:
    """Names in a wheel built from a copy: building in place would leave its folders behind."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("pikv_megatron", "kernels", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--no-deps",
         "--no-index", "--no-build-isolation", "--quiet", "--wheel-dir", str(target), str(source)],
        check=True, timeout=120,
    )
    (wheel,) = target.glob("*.whl")
    return set(zipfile.ZipFile(wheel).namelist())


def test_wheel_holds_every_module(wheel_names):
    expected = {f"pikv_megatron/{p.relative_to(PACKAGE)}" for p in python_files(PACKAGE)}
    kernels = ROOT / "kernels"
    expected |= {f"pikv_kernels/{p.relative_to(kernels)}" for p in python_files(kernels)}
    sources = {path.name for kind in ("*.cpp", "*.h") for path in (kernels / "cpu").glob(kind)}
    assert sources and {f"pikv_kernels/cpu/{name}" for name in sources} <= wheel_names
    presets = ROOT / "configs/pikv"
    expected.add("pikv_megatron/presets/__init__.py")
    assert expected == {name for name in wheel_names if name.endswith(".py")}
    files = {path.relative_to(presets) for path in presets.rglob("*.yaml")}
    shipped = {f"pikv_megatron/presets/{file}" for file in files}
    assert shipped == {name for name in wheel_names if name.endswith(".yaml")}
    assert any(name.endswith("/LICENSE") for name in wheel_names)


def test_imports_without_triton():
    program = "import sys; sys.modules['triton'] = None; import pikv_megatron"
    subprocess.run(
        [sys.executable, "-c", program], check=True, timeout=120, cwd="/",
        env={**os.environ, "DS_ACCELERATOR": "cpu"},
    )


@pytest.mark.parametrize(
    "path", python_files(PACKAGE), ids=lambda path: path.relative_to(PACKAGE).as_posix()
)
def test_imports_run_one_way(path):
    if path == PACKAGE / "__init__.py":
        return
    room = room_of(path)
    for name in imported_names(path):
        file = imported_file(name)
        if file is None or file == PACKAGE / "__init__.py":
            continue
        other = room_of(file)
        is_above = layer_of(other) < layer_of(room)
        is_program = layer_of(room) == len(LAYERS)
        assert other == room or is_above or is_program, f"{room} must not import {name}"


@pytest.mark.parametrize(
    "path", python_files(PACKAGE), ids=lambda path: path.relative_to(PACKAGE).as_posix()
)
def test_megatron_and_deepspeed_stay_in_their_rooms(path):
    room = room_of(path)
    for name in imported_names(path):
        if name.split(".")[0] not in ("megatron", "deepspeed") or room in INTEGRATION:
            continue
        assert room == "parallel" and name.startswith("deepspeed.comm"), f"{room}: {name}"


def test_kernels_know_torch_and_triton_only():
    for path in python_files(ROOT / "kernels"):
        for name in imported_names(path):
            top = name.split(".")[0]
            is_allowed = top in {"torch", "triton", "pikv_kernels"} | sys.stdlib_module_names
            assert is_allowed, f"{path}: {name}"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_config_loads(path):
    LOADERS[path.parent.name](path)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_config_key_has_a_comment(path):
    lines = path.read_text().splitlines()
    for key in block_keys(yaml.compose(path.read_text())):
        above = lines[key.start_mark.line - 1].strip()
        assert above.startswith("#"), f"{path.name}: {key.value} has no comment above it"


def block_keys(node: yaml.Node) -> list[yaml.Node]:
    """Keys of all mappings that are written one key a line."""
    if isinstance(node, yaml.SequenceNode):
        return [key for child in node.value for key in block_keys(child)]
    if not isinstance(node, yaml.MappingNode) or node.flow_style:
        return []
    return [key for pair in node.value for key in [pair[0], *block_keys(pair[1])]]


def test_there_are_configs():
    assert {path.parent.name for path in CONFIGS} >= {"model", "pikv"}
