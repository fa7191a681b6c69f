"""Tasks on time: dates some days on, and clocks in other time zones."""

from __future__ import annotations

import random
from datetime import date, timedelta

from rows import Row, Split, listed, split_rows, written

MONTHS = listed("January February March April May June July August September October November December")
ZONES = {
    "Lima": -5, "Halifax": -4, "Recife": -3, "London": 0, "Oslo": 1, "Cairo": 2, "Nairobi": 3, "Baku": 4,
    "Lahore": 5, "Dhaka": 6, "Hanoi": 7, "Perth": 8, "Tokyo": 9,
}  # fmt: skip
"""Standard time, without summer time."""


def _written_date(day: date) -> str:
    return f"{day.day} {MONTHS[day.month - 1]}"


def later_date(draw: random.Random) -> Row:
    """A date and a number of days to go on, in a year without a leap day."""
    day = date(2023, 1, 1) + timedelta(days=draw.randrange(340))
    days = draw.randint(2, 20)
    return written(f"{_written_date(day)} plus {days} days", _written_date(day + timedelta(days=days)))


def zone_time(draw: random.Random) -> Row:
    """The time in one city, wanted in another; the day does not change."""
    while True:
        here, there = draw.sample(list(ZONES), 2)
        hour, minute = draw.randrange(24), draw.choice((0, 15, 30, 45))
        shifted = hour + ZONES[there] - ZONES[here]
        if 0 <= shifted < 24:
            break
    prompt = f"{hour:02}:{minute:02} in {here} (UTC{ZONES[here]:+}), in {there} (UTC{ZONES[there]:+})?"
    return written(prompt, f"{shifted:02}:{minute:02}")


def tasks() -> dict[str, Split]:
    """Every task of this file."""
    makers = {"later_dates": later_date, "time_zones": zone_time}
    return {name: split_rows(name, maker) for name, maker in makers.items()}
