"""Selectors by the name they have in `PiKVConfig.selector`."""

from pikv_megatron.selector.all_pages import AllPagesSelector

SELECTORS = {"all": AllPagesSelector}
