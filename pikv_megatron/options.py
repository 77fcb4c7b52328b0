"""How a method is chosen and given its parameters in a configuration.

A method's parameters are a pydantic model in the method's own file, which builds the method. The
models of a family are a union told apart by `name`; where a method needs no parameters, its bare
name will do: `selector: mass` is `selector: {name: mass}`.
"""

import os
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, Union, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo


class Options(BaseModel):
    """Parameters of a method. Unknown keys are refused.

    Attributes:
        needs_sketch: the method reads sketches of pages.
        needs_bounds: the method reads what pages can have at most and at least.
        needs_mass: the method reads the share of the attention that pages had.
        needs_scores: the method scores the tokens of prompts as they come.
        needs_calibration: the method was fitted by `launch/calibrate.py`, and reads its file.
        extra: optional extra of this package that the method takes; None: it needs none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    needs_sketch: ClassVar[bool] = False
    needs_bounds: ClassVar[bool] = False
    needs_mass: ClassVar[bool] = False
    needs_scores: ClassVar[bool] = False
    needs_calibration: ClassVar[bool] = False
    extra: ClassVar[str | None] = None

    def at_share(self, share: float, num_shards: int) -> Self | None:
        """The same method, spending a share of what there is: of the shards that a query visits,
        of the pages that it reads, of those that stay; None: it spends no share.

        Args:
            share: above 0, at most 1.
            num_shards: of a sequence.

        Raises:
            ValueError: that share cannot be had; says what can.
        """
        return None


def family(*members: type[Options]) -> Any:
    """The type of a field that holds one of `members`, or the bare name of one."""
    union = Annotated[Union[members], Field(discriminator="name")]
    return Annotated[union, BeforeValidator(_from_name)]


def members(family_type: Any) -> dict[str, type[Options]]:
    """The models of a family by name."""
    union = get_args(get_args(family_type)[0])
    return {member.model_fields["name"].default: member for member in union}


def _beside_file(value: Any, info: ValidationInfo) -> Any:
    folder = (info.context or {}).get("folder")
    if folder is None or not isinstance(value, str):
        return value
    return Path(os.path.abspath(folder / value))


# A path that begins at the folder of the file which names it: the `folder` of the context in which
# options are validated.
PathBeside = Annotated[Path, BeforeValidator(_beside_file)]


def _from_name(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value
