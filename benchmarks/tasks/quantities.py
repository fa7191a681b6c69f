"""Tasks on numbers: Roman numerals, units, and short sums told as stories."""

from __future__ import annotations

import random

from rows import Row, Split, listed, split_rows, written

ROMAN = (
    (1000, "M"), (900, "CM"), (500, "D"), (400, "CD"), (100, "C"), (90, "XC"),
    (50, "L"), (40, "XL"), (10, "X"), (9, "IX"), (5, "V"), (4, "IV"), (1, "I"),
)  # fmt: skip
UNITS = (
    ("km", "m", 1000), ("m", "cm", 100), ("cm", "mm", 10), ("kg", "g", 1000), ("t", "kg", 1000),
    ("l", "ml", 1000), ("l", "cl", 100), ("h", "min", 60), ("min", "s", 60), ("weeks", "days", 7),
    ("dozen", "pieces", 12), ("years", "months", 12),
)  # fmt: skip
NAMES = listed("Ada Ben Cleo Dan Eva Finn Gia Hugo Ida Jon Kim Leo Mia Noah Olga Paul")
THINGS = listed("apples books coins stamps cards shells nuts pens beads eggs")


def roman(number: int) -> str:
    """A number from 1 to 3999 in Roman numerals."""
    text = ""
    for value, letters in ROMAN:
        count, number = divmod(number, value)
        text += letters * count
    return text


def roman_numeral(draw: random.Random) -> Row:
    """A number to be written in Roman numerals."""
    number = draw.randint(1, 1200)
    return written(f"Roman numeral of {number}", roman(number))


def converted_unit(draw: random.Random) -> Row:
    """A quantity in a larger unit, wanted in a smaller one; some with a half."""
    large, small, factor = draw.choice(UNITS)
    number = draw.randint(2, 60)
    if factor % 2 == 0 and draw.random() < 0.25:
        return written(
            f"How many {small} are {number}.5 {large}?", f"{number * factor + factor // 2} {small}"
        )
    return written(f"How many {small} are {number} {large}?", f"{number * factor} {small}")


def story(draw: random.Random) -> Row:
    """A story of two steps; the answer is the sum and its result."""
    name, other = draw.sample(NAMES, 2)
    thing = draw.choice(THINGS)
    a, b, c = draw.randint(2, 9), draw.randint(2, 9), draw.randint(2, 9)
    stories = (
        (f"{name} has {a + b} {thing}, gives {b} to {other} and finds {c}.", f"{a + b}-{b}+{c}={a + c}"),
        (f"{name} has {a} {thing}, buys {b} and gets {c} from {other}.", f"{a}+{b}+{c}={a + b + c}"),
        (f"{name} has {a + b + c} {thing}, loses {b} and sells {c} to {other}.", f"{a + b + c}-{b}-{c}={a}"),
        (f"{name} has {a} bags of {b} {thing} and gets {c} from {other}.", f"{a}*{b}+{c}={a * b + c}"),
    )
    text, answer = draw.choice(stories)
    return written(f"{text} How many {thing} has {name}?", answer)


def tasks() -> dict[str, Split]:
    """Every task of this file."""
    makers = {"roman_numerals": roman_numeral, "unit_conversion": converted_unit, "word_problems": story}
    return {name: split_rows(name, maker) for name, maker in makers.items()}
