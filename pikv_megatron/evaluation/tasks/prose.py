"""Made-up sentences, the same on every machine: what facts are hidden in."""

import random

ADJECTIVES = (
    "old quiet narrow green heavy early broken gentle distant yellow careful empty famous wooden "
    "silver rainy curious modern patient crowded simple northern hollow bright"
).split()
NOUNS = (
    "river market teacher bridge garden letter engine village doctor window forest captain "
    "kitchen painter mountain station farmer harbour library sister meadow singer tower island "
    "winter baker journey lantern soldier museum valley orchestra carpenter festival blanket road"
).split()
VERBS = (
    "crossed painted followed remembered visited repaired watched described left carried found "
    "admired measured borrowed opened guarded counted ignored studied passed"
).split()
TIMES = (
    "in the morning|before the storm|after a long walk|every summer|without a word|on Sunday|"
    "near the sea|for many years|at the end of the day|during the war|with great care|by accident"
).split("|")
# What keys, kinds and codes are called: none of them occurs in the sentences.
NAMES = (
    "apple tiger copper violin pepper rocket marble candle falcon walnut anchor basket cactus "
    "dragon emerald feather ginger hammer insect jacket kettle lemon magnet needle orange pencil "
    "quartz ribbon saddle tomato umbrella velvet wagon yogurt zebra acorn button camel diamond "
    "eagle"
).split()


def sentence(rng: random.Random) -> str:
    """One of some millions."""
    first, second = rng.sample(NOUNS, 2)
    return (
        f"The {rng.choice(ADJECTIVES)} {first} {rng.choice(VERBS)} the {rng.choice(ADJECTIVES)} "
        f"{second} {rng.choice(TIMES)}."
    )


def names(rng: random.Random, count: int) -> list[str]:
    """Different ones, of one word as long as they last and then of two."""
    if count <= len(NAMES):
        return rng.sample(NAMES, count)
    pairs = [f"{first} {second}" for first in NAMES for second in NAMES if first != second]
    return rng.sample(pairs, count)


def number(rng: random.Random, digits: int = 5) -> str:
    """Without a zero in front."""
    return str(rng.randrange(10 ** (digits - 1), 10**digits))
