"""Write the shipped knowledge probes: `python benchmarks/make_probes.py`. Seeded: the same files each time.

Each topic is a question with a gap and pairs (what fills the gap, the answer). The three wrong choices of
an item are answers to other items of the same topic. `recipes/tasks/README.md` says how topics were chosen.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from probe_facts import TOPICS
from probe_words import WORDS
from probe_world import WORLD

Item = dict[str, Any]

SEED = 20240608
PROBES = Path(__file__).resolve().parent.parent / "recipes" / "probes"
LEFT_OUT = ("count", "dish", "element_number", "myth", "proverb")
"""Topics of the wide probe of which SmolLM2-135M-Instruct got less than half right."""


def make_items() -> Iterator[Item]:
    """Every item of every topic of the narrow probe, in the order of the facts."""
    draw = random.Random(SEED)
    for topic in TOPICS:
        yield from topic_items(topic, TOPICS, draw)


def candidates() -> Iterator[Item]:
    """Every item written for the wide probe; a topic has its own seed: leaving one out moves no other."""
    for topics in (WORDS, WORLD):
        for topic in topics:
            yield from topic_items(topic, topics, random.Random(f"{SEED} {topic}"))


def make_wide_items() -> Iterator[Item]:
    """The narrow probe's items, and those of the wide topics that are used."""
    yield from make_items()
    yield from (item for item in candidates() if item["topic"] not in LEFT_OUT)


def topic_items(topic: str, topics: Mapping[str, tuple[str, str]], draw: random.Random) -> Iterator[Item]:
    """A topic's items. Of "answer / also right / ..." the first is the answer, and none a wrong choice."""
    question, text = topics[topic]
    pairs = [tuple(part.strip() for part in pair.split(":")) for pair in " ".join(text.split()).split(",")]
    rights = {subject: [right.strip() for right in answer.split("/")] for subject, answer in pairs}
    answers = sorted({right[0] for right in rights.values()})
    for subject, right in rights.items():
        choices = draw.sample([other for other in answers if other not in right], 3)
        index = draw.randrange(4)
        choices.insert(index, right[0])
        yield {"question": question.format(subject), "choices": choices, "answer": index, "topic": topic}


def mixed(items: Iterator[Item]) -> str:
    """Rows of a file, topics mixed so that any first part of it is a fair sample."""
    rows = list(items)
    random.Random(SEED).shuffle(rows)
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=PROBES, help="folder to write to")
    folder: Path = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    for name, items in (("knowledge", make_items()), ("knowledge-wide", make_wide_items())):
        text = mixed(items)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
        print(f"{folder / name}.jsonl: {text.count(chr(10))} items")


if __name__ == "__main__":
    main()
