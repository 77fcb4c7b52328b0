"""Every page stays, over three tiers (FlexGen, arXiv 2303.06865; paper, Table 3, S_Flex: a plan of
placement over tiers).

The budget says how many pages of a rank lie on the device, those of all sequences together, and
the policy how many of the others in the host's memory: what has no room there lies in a file. Which
ones, when they were last read: those that a query was to read last lie on the device, and what was
read longest ago in the file. Nothing is dropped, so this is lossless, and what is read is as much
as without tiers. It pays where a selector reads less than lies on the device: without one, every
step brings every page.
"""

from typing import Literal

from pydantic import Field

from pikv_megatron.options import PathBeside
from pikv_megatron.retention.base import RetentionOptions
from pikv_megatron.types import TierPlan


class FlexGenOptions(RetentionOptions):
    """Every page stays: those read last on the device, others in host memory or in a file."""

    name: Literal["flexgen"] = "flexgen"
    host: float = Field(
        1.0, ge=0, le=1,
        description="share of a rank's pages in host memory, at most; what is neither there nor on "
        "the device, where the budget has it, lies in a file",
    )
    directory: PathBeside | None = Field(
        None, description="where each rank's files lie, one a layer; null: the system's directory "
        "for such files"
    )
    ahead: int = Field(
        4, ge=0, description="pages of a sequence that a step fetches for the next one, those that "
        "a selector liked best and did not choose"
    )

    def build(self, fitted=None):
        return None

    @property
    def tiers(self):
        return TierPlan(self.host, self.directory, self.ahead)
