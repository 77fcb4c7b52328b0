"""What visits to shards give, for `router: reinforced`: its reward, learned offline.

Pages of the windows are dealt out to shards as by position, and every shard is visited, so nothing
has to be tried out.

Legend: q queries, np query heads, P pages, N shards, F features.
"""

import torch
import torch.nn.functional as F

from pikv_megatron.calibration.fits.base import LayerFit
from pikv_megatron.calibration.window import NEAR, SINKS
from pikv_megatron.router.visits import sums_of, visit_features

PAGE, SHARDS = 16, 8
STRIDE = 8  # of the queries that are asked


class VisitsFit(LayerFit):
    """Sums over queries that see a page of every shard, from the exact shares of pages."""

    def of(self, window):
        first = SINKS + NEAR + SHARDS * PAGE
        place = window.place
        at = place[first::STRIDE]
        if not len(at):
            return {}
        weights = window.weights(at).flatten(0, 1)
        num_pages = (len(place) - SINKS) // PAGE
        by_page = weights[..., SINKS : SINKS + num_pages * PAGE].unflatten(2, (num_pages, PAGE))
        last = SINKS + PAGE * (1 + torch.arange(num_pages, device=place.device)) - 1
        is_far = last <= at.unsqueeze(1) - NEAR
        by_page = by_page.sum(dim=3) * is_far
        shard = torch.arange(num_pages, device=place.device) % SHARDS
        by_shard = by_page @ F.one_hot(shard, SHARDS).float()
        promise = by_shard / by_shard.sum(dim=2, keepdim=True).clamp(min=1e-30)
        newest = (is_far.sum(dim=1) - 1) % SHARDS
        features = visit_features(promise.mean(dim=0), newest).double().flatten(0, 1)
        squares, products = sums_of(features, by_shard.mean(dim=0).double().flatten())
        return {"squares": squares, "products": products}

    def finish(self, sums):
        return {f"visits.relevance.{name}": part for name, part in sums.items()}
