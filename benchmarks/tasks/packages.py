"""Write the tasks made of Debian's package descriptions; needs `apt-get` of Debian and its mirror.

python benchmarks/tasks/packages.py

The short lines of descriptions in English and German, matched by their checksum as Debian does, and the
section of the archive a package is in. A line is in one task and one split only. Debian's lists change with
its point releases: `packages-source.json` keeps the checksums of those that the shipped rows came from.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from make import TASKS, checksums, write_split
from rows import TEST_ROWS, TRAIN_ROWS, Row, Split, draw_for

from secura_ds.errors import UserError, run_command
from secura_ds.files import atomic_write_json, atomic_write_text

SOURCES = {
    "packages": "_dists_*_main_binary-*_Packages",
    "english": "_dists_*_main_i18n_Translation-en",
    "german": "_dists_*_main_i18n_Translation-de",
}
SECTIONS = ("admin", "games", "graphics", "mail", "math", "science", "sound", "web")
"""Sections with enough packages of their own kind."""
SHORTEST, LONGEST = 20, 70
ROWS = TRAIN_ROWS + TEST_ROWS
_PLAIN = re.compile(r"[A-Za-zÄÖÜäöüß][A-Za-zÄÖÜäöüß ,'/+-]*[A-Za-zäöüß]")


def fetch(folder: Path) -> dict[str, Path]:
    """Debian's lists, fetched by apt into `folder` and checked by it; the files of the main archive.

    Raises:
        UserError: apt is missing or cannot fetch them.
    """
    (folder / "partial").mkdir(parents=True)
    options = [f"Dir::State::Lists={folder}", f"Dir::Cache={folder}/cache", "Acquire::Languages=en,de"]
    try:
        subprocess.run(
            ["apt-get", *(part for option in options for part in ("-o", option)), "update"],
            check=True,
            capture_output=True,
            text=True,
        )
    except (OSError, subprocess.CalledProcessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[0]
        raise UserError(
            f"apt-get cannot fetch Debian's lists ({reason}): this needs Debian and its mirror"
        ) from error
    found = {}
    for name, pattern in SOURCES.items():
        files = [path for path in folder.glob(f"*debian{pattern}*") if "-updates_" not in path.name]
        if not files:
            raise UserError(f"Debian's mirror gave no list like {pattern}: this needs Debian's main archive")
        found[name] = files[0]
    return found


def unpacked(path: Path) -> bytes:
    """The content of one of Debian's lists, however apt keeps it."""
    command = ["/usr/lib/apt/apt-helper", "cat-file", str(path)]
    return subprocess.run(command, check=True, capture_output=True).stdout


def paragraphs(path: Path) -> Iterator[dict[str, str]]:
    """The entries of one of Debian's lists: fields and their values, which may have several lines."""
    for block in unpacked(path).decode().split("\n\n"):
        fields: dict[str, str] = {}
        key = ""
        for line in block.splitlines():
            if line.startswith(" "):
                fields[key] += f"\n{line[1:]}"
            elif ": " in line or line.endswith(":"):
                key, _, value = line.partition(":")
                fields[key] = value.strip()
        if fields:
            yield fields


def short_lines(path: Path, language: str) -> dict[str, str]:
    """The plain short lines of four or more words, by the checksum of the English description."""
    found = {}
    for entry in paragraphs(path):
        line = entry.get(f"Description-{language}", "").split("\n")[0]
        if SHORTEST <= len(line) <= LONGEST and line.count(" ") >= 3 and _PLAIN.fullmatch(line):
            found[entry["Description-md5"]] = line
    return found


def candidates(files: dict[str, Path]) -> list[dict[str, str]]:
    """One entry for each short line, in a seeded order: package, section, English and maybe German.

    Of lines that begin with the same three words only one is taken, so that no held-out one is nearly known.
    """
    english, german = short_lines(files["english"], "en"), short_lines(files["german"], "de")
    entries = {}
    for entry in paragraphs(files["packages"]):
        mark = entry.get("Description-md5", "")
        if mark in english:
            kind = entry.get("Section", "").split("/")[-1]
            entries[mark] = {"package": entry["Package"], "section": kind, "english": english[mark]}
            if german.get(mark, english[mark]) != english[mark]:
                entries[mark]["german"] = german[mark]
    mixed = [entries[mark] for mark in sorted(entries)]
    draw_for("packages").shuffle(mixed)
    mixed.sort(key=lambda entry: "german" not in entry)  # of alike ones, take one that has both
    seen: set[str] = set()
    chosen = []
    for entry in mixed:
        keys = {" ".join(entry[name].lower().split()[:3]) for name in ("english", "german") if name in entry}
        if not keys & seen:
            seen |= keys
            chosen.append(entry)
    return chosen


def make_tasks(files: dict[str, Path]) -> dict[str, Split]:
    """The rows of the three tasks.

    Raises:
        UserError: Debian's lists have too few fitting lines.
    """
    entries = candidates(files)
    both = [entry for entry in entries if "german" in entry]
    there, back = both[:ROWS], both[ROWS : 2 * ROWS]
    rest = [entry for entry in entries if "german" not in entry] + both[2 * ROWS :]
    share = -(-ROWS // len(SECTIONS))
    sorted_in: list[Row] = []
    for section in SECTIONS:
        inside = [entry for entry in rest if entry["section"] == section][:share]
        sorted_in += [
            {"prompt": entry["english"], "section": section, "package": entry["package"]} for entry in inside
        ]
    draw_for("package_sections").shuffle(sorted_in)
    tasks = {
        "package_en_de": [_translation(entry, "English", "German") for entry in there],
        "package_de_en": [_translation(entry, "German", "English") for entry in back],
        "package_sections": sorted_in[:ROWS],
    }
    for name, rows in tasks.items():
        if len(rows) < ROWS:
            raise UserError(f"{name}: Debian's lists have {len(rows)} fitting lines, {ROWS} are needed")
    return {name: (rows[:TRAIN_ROWS], rows[TRAIN_ROWS:]) for name, rows in tasks.items()}


def _translation(entry: dict[str, str], source: str, target: str) -> Row:
    return {
        "prompt": f"Translate to {target}: {entry[source.lower()]}",
        "completion": entry[target.lower()],
        "package": entry["package"],
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=TASKS, help="folder of the tasks")
    folder: Path = parser.parse_args(argv).out
    with tempfile.TemporaryDirectory() as temporary:
        files = fetch(Path(temporary) / "lists")
        for name, split in make_tasks(files).items():
            write_split(folder / name, split)
            print(f"{name}: {len(split[0])} rows to train on, {len(split[1])} held out")
        sums = {path.stem: hashlib.sha256(unpacked(path)).hexdigest() for path in files.values()}
    atomic_write_json(folder / "packages-source.json", sums)
    atomic_write_text(folder / "SHA256SUMS", checksums(folder))
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
