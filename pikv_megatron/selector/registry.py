"""The selectors that `PiKVConfig.selector` can name."""

from pikv_megatron.options import family
from pikv_megatron.selector.all_pages import AllPagesOptions
from pikv_megatron.selector.budget import BudgetOptions
from pikv_megatron.selector.certified import CertifiedOptions
from pikv_megatron.selector.mass import MassOptions
from pikv_megatron.selector.sampled import SampledOptions

Selector = family(
    AllPagesOptions, BudgetOptions, MassOptions, CertifiedOptions, SampledOptions
)
