"""Write the shipped knowledge probe: `python benchmarks/make_probes.py`. Seeded: the same file each time.

Each topic is a question with a gap and pairs (what fills the gap, the answer). The three wrong choices of
an item are answers to other items of the same topic. `recipes/tasks/README.md` says how topics were chosen.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from probe_facts import TOPICS

SEED = 20240608


def make_items() -> Iterator[dict[str, Any]]:
    """Every item of every topic, in the order of the facts."""
    draw = random.Random(SEED)
    for topic, (question, text) in TOPICS.items():
        pairs = [
            tuple(part.strip() for part in pair.split(":")) for pair in " ".join(text.split()).split(",")
        ]
        answers = sorted({answer for _, answer in pairs})
        for subject, answer in pairs:
            choices = draw.sample([other for other in answers if other != answer], 3)
            index = draw.randrange(4)
            choices.insert(index, answer)
            yield {
                "question": question.format(subject),
                "choices": choices,
                "answer": index,
                "topic": topic,
            }


def main() -> None:
    """Write the file, topics mixed so that any first part of it is a fair sample."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    default = Path(__file__).resolve().parent.parent / "recipes" / "probes" / "knowledge.jsonl"
    parser.add_argument("--out", type=Path, default=default, help="file to write")
    path: Path = parser.parse_args().out
    items = list(make_items())
    random.Random(SEED).shuffle(items)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items), encoding="utf-8")
    print(f"{path}: {len(items)} items")


if __name__ == "__main__":
    main()
