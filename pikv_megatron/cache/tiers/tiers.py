"""What is known of the pages of a rank that leave the device, in all layers."""

from collections.abc import Sequence

from pikv_megatron.cache.owner.shard_store import ShardStore
from pikv_megatron.cache.tiers.disk_tier import Loss
from pikv_megatron.types import Recalled, TierPlan


class Tiers:
    """For whoever drives a cache's steps.

    Args:
        stores: of the rank, by layer.
        plans: of the same layers; None for one whose pages stay.

    Attributes:
        is_driven: the driver asks for `take_losses` after every step, and ends those sequences.
    """

    def __init__(self, stores: Sequence[ShardStore], plans: Sequence[TierPlan | None]):
        self._stores = stores
        self._plans = [plan for plan in plans if plan is not None]
        self.is_driven = False

    def __bool__(self) -> bool:
        """Whether pages of any layer leave the device."""
        return bool(self._plans)

    @property
    def needs_file(self) -> bool:
        """Whether memory may have no room for some pages."""
        return any(plan.needs_file for plan in self._plans)

    @property
    def num_bytes(self) -> tuple[int, int]:
        """What pages take in the host's memory and in files."""
        return tuple(map(sum, zip((0, 0), *(store.pool.lower_bytes for store in self._stores))))

    def hold_space(self) -> OSError | None:
        """Take the space of all pages that lie in files; why there is too little, if there is."""
        try:
            for store in self._stores:
                store.pool.hold_space()
        except OSError as error:
            return error
        return None

    def take_losses(self, slots: Sequence[int]) -> list[int]:
        """Of sequences, `Loss` of a page that this rank was to read in the last step, 0 where it
        had all; none where no page can be lost. They are forgotten."""
        if not self:
            return []
        found: dict[int, int] = {}
        for store in self._stores:
            found |= store.losses
            store.losses = {}
        return [found.get(slot, 0) for slot in slots]

    def take_recalled(self) -> Recalled:
        """Pages that came back to the device since it was last asked."""
        return sum((store.pool.take_recalled() for store in self._stores), Recalled())

    def check_losses(self) -> None:
        """After a step of a driver that knows nothing of them.

        Raises:
            ValueError: a page that was to be read is lost.
        """
        lost = [loss for store in self._stores for loss in store.losses.values()]
        if lost and not self.is_driven:
            raise ValueError(f"a page of a sequence could not be read: {Loss(lost[0]).said}")
