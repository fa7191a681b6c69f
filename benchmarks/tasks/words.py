"""Tasks on words: sorting them, counting them, turning them round, and sets of them."""

from __future__ import annotations

import random

from rows import Row, Split, listed, split_rows, written

WORDS = listed(
    "apple bread chair door engine field glass house iron jacket kettle ladder mirror needle orange "
    "pencil quilt river spoon table umbrella violin window yard zipper anchor basket candle drum eagle "
    "feather garden hammer island jewel kite lemon marble nest oven paper queen rope saddle tower uncle "
    "valley wagon acorn bucket carpet dinner elbow forest guitar helmet insect jungle kitten lantern "
    "meadow notebook ocean parrot rabbit sailor tunnel vessel whistle badge castle dragon fiddle "
    "giraffe honey ivory jelly knuckle lobster magnet nickel otter pepper rocket silver turtle velvet "
    "walnut blanket copper desert ember flute gravel"
)
ANIMALS = listed("cat dog cow hen pig fox owl bee ant rat")
COLOURS = listed("red blue green black white pink brown grey gold violet orange silver")


def sorted_words(draw: random.Random) -> Row:
    """Four words, to be put into alphabetical order."""
    words = draw.sample(WORDS, 4)
    return written(f"Sort from A to Z: {', '.join(words)}", ", ".join(sorted(words)))


def counted_words(draw: random.Random) -> Row:
    """A list of animals in which one is to be counted."""
    wanted, *others = draw.sample(ANIMALS, 3)
    number = draw.randint(1, 6)
    animals = [wanted] * number + [draw.choice(others) for _ in range(draw.randint(2, 9 - number))]
    draw.shuffle(animals)
    return written(f"How often does {wanted} occur? {' '.join(animals)}", str(number))


def turned_words(draw: random.Random) -> Row:
    """Words to be said from the last to the first, the new first one in capitals."""
    words = draw.sample(WORDS, draw.randint(3, 5))
    turned = words[::-1]
    return written(f"Turn round: {' '.join(words)}", " ".join([turned[0].upper(), *turned[1:]]))


def set_words(draw: random.Random) -> Row:
    """Two lists of colours: those in both, or those only in the first, in its order."""
    first, second = draw.sample(COLOURS, 4), draw.sample(COLOURS, 4)
    both = draw.random() < 0.5
    found = [colour for colour in first if (colour in second) == both]
    question = "in both lists" if both else "only in the first list"
    prompt = f"First: {', '.join(first)}\nSecond: {', '.join(second)}\nWhich are {question}?"
    return written(prompt, ", ".join(found) or "none")


def tasks() -> dict[str, Split]:
    """Every task of this file."""
    makers = {
        "sort_words": sorted_words,
        "count_words": counted_words,
        "turn_words": turned_words,
        "list_sets": set_words,
    }
    return {name: split_rows(name, maker) for name, maker in makers.items()}
