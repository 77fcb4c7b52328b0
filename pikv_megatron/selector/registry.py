"""The selectors that `PiKVConfig.selector` can name."""

from pikv_megatron.options import family
from pikv_megatron.selector.all_pages import AllPagesOptions
from pikv_megatron.selector.budget import BudgetOptions
from pikv_megatron.selector.mass import MassOptions

Selector = family(AllPagesOptions, BudgetOptions, MassOptions)
