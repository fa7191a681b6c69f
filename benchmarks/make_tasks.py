"""Write the shipped order-to-JSON task: `python benchmarks/make_tasks.py`. Seeded: the same files each time.

Each row is `{"prompt", "completion"}`: a free-text order, and one line of strict JSON with the keys customer,
item, quantity and day. The word lists are in `order_words.py`, the sentence patterns in `order_patterns.py`.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path

from order_patterns import PATTERNS, UNSEEN_PATTERNS
from order_words import (
    CITIES,
    ITEMS,
    MONTHS,
    NAMES,
    NUMBER_WORDS,
    PRICES,
    TIMES,
    UNSEEN_ITEMS,
    UNSEEN_NAMES,
    WEEKDAYS,
)

INSTRUCTION = "Turn the order into JSON."
TRAIN_ROWS = 2000
TEST_ROWS = 200
SEED = 20240607


def written_quantity(number: int, draw: random.Random) -> str:
    """`number` as a message may write it: a word up to twelve, else digits."""
    if number in NUMBER_WORDS and draw.random() < 0.5:
        return NUMBER_WORDS[number]
    return str(number)


def written_day(draw: random.Random) -> tuple[str, str]:
    """A day as a message may write it, and its one normal form (`Monday`, `12 May`, `tomorrow`)."""
    kind = draw.random()
    if kind < 0.60:
        day = draw.choice(WEEKDAYS)
        return draw.choice([day, day, day, day[:3], day.lower(), day[:3].lower()]), day
    if kind < 0.70:
        return ("tomorrow", "tomorrow") if draw.random() < 0.6 else ("today", "today")
    number, month = draw.randint(1, 28), draw.choice(MONTHS)
    return draw.choice([f"{number} {month}", f"{number} {month}", f"{month} {number}"]), f"{number} {month}"


def make_row(pattern: str, names: Sequence[str], items: Sequence[str], draw: random.Random) -> dict[str, str]:
    """One message made from `pattern`, with its answer."""
    name, item = draw.choice(names), draw.choice(items)
    quantity = draw.randint(2, 12) if draw.random() < 0.7 else draw.randint(13, 60)
    written, day = written_day(draw)
    if pattern.startswith("{day}") and written[0].islower():
        written = written[0].upper() + written[1:]
    fields = {"name": name, "item": item, "day": written, "city": draw.choice(CITIES)}
    fields |= {
        "n": written_quantity(quantity, draw),
        "time": draw.choice(TIMES),
        "price": draw.choice(PRICES),
    }
    if pattern.startswith("{n}"):
        fields["n"] = fields["n"].capitalize()
    if pattern.startswith("{item}"):
        fields["item"] = item = item[0].upper() + item[1:]
    message = pattern.format(**fields)
    if draw.random() < 0.1:  # some people never press shift; the answer keeps what they wrote
        message, name, item = message.lower(), name.lower(), item.lower()
    answer = {"customer": name, "item": item, "quantity": quantity, "day": day}
    return {"prompt": f"{INSTRUCTION}\n{message}", "completion": json.dumps(answer, ensure_ascii=False)}


def make_split(
    rows: int,
    sources: Sequence[tuple[Sequence[str], Sequence[str], Sequence[str]]],
    taken: set[str],
    seed: int,
) -> list[dict[str, str]]:
    """`rows` different rows, taken in turn from the (patterns, names, items) of `sources`, shuffled.

    Every pattern of a source is used equally often. No prompt in `taken` is used; new ones are added to it.
    """
    draw = random.Random(seed)
    decks: list[list[str]] = [[] for _ in sources]
    made: list[dict[str, str]] = []
    while len(made) < rows:
        which = len(made) % len(sources)
        patterns, names, items = sources[which]
        if not decks[which]:
            decks[which] = draw.sample(list(patterns), len(patterns))
        row = make_row(decks[which].pop(), names, items, draw)
        if row["prompt"] not in taken:
            taken.add(row["prompt"])
            made.append(row)
    draw.shuffle(made)
    return made


def make_task() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """The training rows and the held-out rows.

    The held-out rows are, a quarter each: seen or unseen sentence patterns, seen or unseen names and items.
    """
    taken: set[str] = set()
    seen, unseen = (NAMES, ITEMS), (UNSEEN_NAMES, UNSEEN_ITEMS)
    train = make_split(TRAIN_ROWS, [(PATTERNS, *seen)], taken, SEED)
    quarters = [(patterns, *words) for patterns in (PATTERNS, UNSEEN_PATTERNS) for words in (seen, unseen)]
    test = make_split(TEST_ROWS, quarters, taken, SEED + 1)
    return train, test


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Path(__file__).resolve().parent.parent / "recipes" / "tasks"
    parser.add_argument("--out", type=Path, default=default, help="folder for the two JSONL files")
    folder: Path = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in zip(("orders-train", "orders-test"), make_task(), strict=True):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
        print(f"{folder / name}.jsonl: {len(rows)} rows")


if __name__ == "__main__":
    main()
