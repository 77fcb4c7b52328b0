"""Every page stays, over three tiers (FlexGen, arXiv 2303.06865; paper, Table 3, S_Flex: a plan of
placement over tiers).

The plan says how many pages lie on the device, in the host's memory and in a file; which ones, when
they were last read: those that a query was to read last lie on the device, and those beyond the
room of host memory that were read longest ago in the file. Nothing is dropped, so this is lossless,
and what is read is as much as without tiers. It pays where a selector reads less than lies on the
device: without one, every step brings every page.
"""

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from pikv_megatron.retention.base import RetentionOptions
from pikv_megatron.types import TierPlan


class FlexGenOptions(RetentionOptions):
    """Every page stays: those read last on the device, others in host memory or in a file."""

    name: Literal["flexgen"] = "flexgen"
    device: float = Field(
        0.25, gt=0, le=1, description="share of a rank's pages that lie on the device, rounded up"
    )
    host: float = Field(
        1.0, ge=0, le=1,
        description="share of them in host memory, at most; all others lie in a file",
    )
    directory: Path | None = Field(
        None, description="where each rank's files lie, one a layer; null: the system's directory "
        "for such files"
    )
    ahead: int = Field(
        4, ge=0, description="pages of a sequence that a step fetches for the next one, those that "
        "a selector liked best and did not choose"
    )

    takes_budget: ClassVar[bool] = False

    def build(self, fitted=None):
        return None

    @property
    def tiers(self):
        return TierPlan(self.device, self.host, self.directory, self.ahead)
