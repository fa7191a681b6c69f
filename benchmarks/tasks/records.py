"""Tasks on records: finding one thing in a table, and turning notes into strict fields."""

from __future__ import annotations

import json
import random

from rows import Row, Split, listed, split_rows, written

NAMES = listed(
    "Anton Berta Carlos Doris Edgar Fiona Gustav Helga Ivan Judith Klaus Linda Martin Nadia Oscar Petra "
    "Quentin Rosa Stefan Thea Ulrich Vera Walter Xenia Yusuf Zelda"
)
STREETS = listed("Mill Park High Church Bridge Garden Station Hill Lake Forest Market School")
TOWNS = listed("Bath Derby Leeds York Ely Truro Ripon Wells Lincoln Oxford")
PATTERNS = (
    "{name} moved to {number} {street} Street, {town}. Phone {phone}.",
    "Please call {name} on {phone}. Address: {number} {street} Street in {town}.",
    "New entry: {name}, {town}, {number} {street} Street, tel. {phone}",
    "{phone} is the number of {name}, who lives at {number} {street} Street, {town}.",
    "Write to {name} at {number} {street} Street, {town}, or ring {phone}.",
    "In {town} we have {name}: {number} {street} Street, {phone}.",
)
COLUMNS = ("age", "room", "desk")


def contact(draw: random.Random) -> Row:
    """A note on where someone lives, wanted as one line of fields."""
    values = {
        "name": draw.choice(NAMES),
        "number": draw.randint(1, 99),
        "street": draw.choice(STREETS),
        "town": draw.choice(TOWNS),
        "phone": f"{draw.randint(200, 999)}-{draw.randint(100, 999)}",
    }
    text = draw.choice(PATTERNS).format(**values)
    fields = {
        "who": values["name"],
        "where": [f"{values['street']} {values['number']}", values["town"]],
        "tel": int(str(values["phone"]).replace("-", "")),
    }
    return written(f"Contact as JSON.\n{text}", json.dumps(fields))


def table_cell(draw: random.Random) -> Row:
    """A small table; the person with the largest value of a column, and that value."""
    names = draw.sample(NAMES, 3)
    rows = {name: draw.sample(range(10, 100), len(COLUMNS)) for name in names}
    index = draw.randrange(len(COLUMNS))
    table = "\n".join(" | ".join([name, *map(str, cells)]) for name, cells in rows.items())
    best = max(names, key=lambda name: rows[name][index])
    prompt = f"name | {' | '.join(COLUMNS)}\n{table}\nLargest {COLUMNS[index]}?"
    return written(prompt, f"{best} ({rows[best][index]})")


def tasks() -> dict[str, Split]:
    """Every task of this file."""
    return {
        "contacts": split_rows("contacts", contact),
        "table_lookup": split_rows("table_lookup", table_cell),
    }
