"""The methods that a configuration can name, as a table: python -m pikv_megatron.methods"""

from typing import Any, Iterator

from pydantic import ByteSize

from pikv_megatron.codec.registry import Format, Transform
from pikv_megatron.options import Options, members
from pikv_megatron.retention.budget import RetentionBudget
from pikv_megatron.retention.registry import Retention
from pikv_megatron.router.registry import Router
from pikv_megatron.selector.registry import Selector
from pikv_megatron.sketch.registry import Sketch

# By the key of the configuration.
FAMILIES = {
    "router": Router,
    "selector": Selector,
    "sketch": Sketch,
    "retention": Retention,
    "budget": RetentionBudget,
    "codec.transform": Transform,
    "codec.format": Format,
}


def methods_table() -> str:
    """Markdown: every method, what it does, its parameters with their defaults."""
    rows = ["| key | name | what it does | parameters |", "|---|---|---|---|"]
    for key, kind in FAMILIES.items():
        for name, options in members(kind).items():
            does = " ".join(options.__doc__.split("\n\n")[0].split())
            parameters = "; ".join(_parameters(options))
            rows.append(f"| `{key}` | `{name}` | {does} | {parameters} |")
    return "\n".join(rows)


def _parameters(options: type[Options]) -> Iterator[str]:
    for name, field in options.model_fields.items():
        if name != "name":
            yield f"`{name}` ({_shown(field.default)}): {field.description}"


def _shown(default: Any) -> str:
    if isinstance(default, ByteSize):
        return default.human_readable()
    return "null" if default in (None, ()) else str(getattr(default, "name", default))


if __name__ == "__main__":
    print(methods_table())
