"""The newest pages stay (StreamingLLM, arXiv 2309.17453; paper, Table 3, S_SL)."""

from typing import Literal

from pikv_megatron.retention.base import RetentionOptions, RetentionPolicy


class StreamingOptions(RetentionOptions):
    """The newest pages stay; the first tokens always do, in the stream window."""

    name: Literal["streaming"] = "streaming"

    def build(self, fitted=None):
        return StreamingPolicy()


class StreamingPolicy(RetentionPolicy):
    """A page is worth its age, turned round."""

    def utility(self, stats):
        return stats.newest.float()
