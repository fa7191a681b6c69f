"""Write the shipped tasks' rows: `python benchmarks/tasks/make.py`. Seeded: the same files each time.

python benchmarks/tasks/make.py            # write all generated rows, and the checksums of all shipped rows
python benchmarks/tasks/make.py --check    # write nothing: do the files have their checksums?

The package descriptions are fetched by `packages.py`, the orders written by `benchmarks/make_tasks.py`.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence
from pathlib import Path

import invented
import moments
import quantities
import records
import words
from rows import Split, to_jsonl

from secura_ds.errors import UserError, run_command
from secura_ds.files import atomic_write_text

TASKS = Path(__file__).resolve().parents[2] / "recipes" / "tasks"
CHECKSUMS = "SHA256SUMS"


def generated() -> dict[str, Split]:
    """Every generated task: its rows to train on and its held-out rows."""
    found: dict[str, Split] = {}
    for module in (words, quantities, moments, records, invented):
        found |= module.tasks()
    return found


def write_split(folder: Path, split: Split) -> None:
    """`train.jsonl` and `test.jsonl` of a task."""
    for name, rows in zip(("train", "test"), split, strict=True):
        atomic_write_text(folder / f"{name}.jsonl", to_jsonl(rows))


def checksums(folder: Path) -> str:
    """SHA-256 of every file of rows, a line each, as `sha256sum` writes them."""
    files = sorted(folder.rglob("*.jsonl"))
    sums = {file: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    return "".join(f"{found}  {file.relative_to(folder).as_posix()}\n" for file, found in sums.items())


def check(folder: Path) -> None:
    """Compare the files of rows with the shipped checksums.

    Raises:
        UserError: a file differs, is missing or is not in the list; names each.
    """
    shipped = set((folder / CHECKSUMS).read_text(encoding="utf-8").splitlines())
    found = set(checksums(folder).splitlines())
    if wrong := sorted({line.split("  ")[1] for line in shipped ^ found}):
        raise UserError(
            f"{folder}: not as in {CHECKSUMS}: {', '.join(wrong)}; write them again with "
            "`python benchmarks/tasks/make.py`, or take them from the repository"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=TASKS, help="folder of the tasks")
    parser.add_argument("--check", action="store_true", help="only compare with the checksums")
    arguments = parser.parse_args(argv)
    if arguments.check:
        check(arguments.out)
        print(f"{arguments.out}: every file is as in {CHECKSUMS}")
        return 0
    for name, split in generated().items():
        write_split(arguments.out / name, split)
        print(f"{name}: {len(split[0])} rows to train on, {len(split[1])} held out")
    atomic_write_text(arguments.out / CHECKSUMS, checksums(arguments.out))
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
