"""Which home rank runs a new sequence."""

from collections import Counter


def deal_homes(
    count: int, held: Counter[int], num_ranks: int, max_batch_size: int
) -> list[int]:
    """Give each of `count` new sequences the rank that holds the fewest, the lowest such rank, so
    that a batch is dealt round-robin.

    Args:
        count: new sequences.
        held: sequences of each rank.
        num_ranks: of the expert-parallel group.
        max_batch_size: most sequences of a rank.

    Raises:
        ValueError: not all of them have a place.
    """
    free = num_ranks * max_batch_size - held.total()
    if count > free:
        raise ValueError(
            f"max_batch_size {max_batch_size}: {count} sequences came, and {num_ranks} ranks have "
            f"{free} places free; wait until a sequence ends, release one that was kept, or raise "
            "max_batch_size"
        )
    held, homes = held.copy(), []
    for _ in range(count):
        homes.append(min(range(num_ranks), key=lambda rank: held[rank]))
        held[homes[-1]] += 1
    return homes
