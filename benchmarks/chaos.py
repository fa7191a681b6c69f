"""Kill a run at random moments, damage its checkpoints, and see whether anything is lost.

One run of a small model is killed by SIGKILL again and again: in training steps, while it saves, while it
folds, while it writes the merged checkpoint; so are another on two ranks under ZeRO-3, and offline merges.
Each time it goes on with --resume. Then copies of a run's checkpoints are damaged and resumed.

What counts: every checkpoint that a run said it had saved can be read after the kill; adapter, merged
weights, last checkpoint and all losses equal those of a run that nobody touched, bit for bit; every damage
is noticed; nothing ends in a traceback or hangs.

    python benchmarks/chaos.py            336 kills, 1,000 damaged checkpoints
    python benchmarks/chaos.py --quick    84 and 200, in under ten minutes on two cores

Processes are forked from one that has imported everything, so that they start in a second.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from forked import HUNG, ended, ends, fork, free_port, rank_environments
from safetensors.torch import load_file
from small_run import write_inputs
from tqdm import tqdm

from secura_ds.errors import run_command
from secura_ds.files import atomic_write_json
from secura_ds.report.table import format_table
from secura_ds.training import callbacks, run
from secura_ds.training import checkpoint as files
from secura_ds.training.trainer import Trainer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launch import merge as merge_command  # noqa: E402
from launch import train as train_command  # noqa: E402

PHASES = ("training", "saving", "folding", "merging")
PATIENCE = 120.0  # seconds after which a process counts as hanging
WAYS = ("cut off", "flipped", "removed", "emptied", "grown", "exchanged")
# Of the main rank of whatever runs, in memory that forked processes share.
phase = multiprocessing.Value(ctypes.c_int, -1)  # an index of PHASES; -1 before training begins
steps = multiprocessing.Value(ctypes.c_int, 0)  # made by this process


@dataclass
class Tally:
    """What was counted."""

    kills: Counter[str] = field(default_factory=Counter)
    damaged: Counter[str] = field(default_factory=Counter)
    bytes_agreed: int = 0
    bytes_lost: int = 0
    unnoticed: int = 0
    wrong_resumes: int = 0
    tracebacks: int = 0
    hangs: int = 0
    different_endings: list[str] = field(default_factory=list)

    def document(self) -> dict[str, Any]:
        """All counts, and whether nothing was lost."""
        losses = (self.bytes_lost, self.unnoticed, self.wrong_resumes, self.tracebacks, self.hangs)
        return {
            **vars(self),
            "kills_in_all": self.kills.total(),
            "damaged_in_all": self.damaged.total(),
            "good": not any(losses) and not self.different_endings,
        }


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; the status is 0 if nothing was lost."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer kills and damages")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/chaos.json"))
    options = parser.parse_args(arguments)
    random.seed(options.seed)
    torch.set_num_threads(1)  # a pool of threads would not survive a fork
    kills, damages = (60, 200) if options.quick else (240, 1000)
    out, began, tally = options.out.absolute(), time.monotonic(), Tally()
    with tempfile.TemporaryDirectory() as name, working_in(Path(name)):
        write_inputs(Path())
        mark_phases()
        alone = Story("alone", 1, kills * 12, ["training.save_merged=true"])
        pair = Story("pair", 2, kills // 5 * 12, ["training.deepspeed=zero3.json"])
        for story, count, phases in ((alone, kills, PHASES), (pair, kills // 5, PHASES[:3])):
            story.untouched()
            story.killed(count, phases, tally)
        kill_merges(alone, kills // 5, tally)
        damage_checkpoints(damages, tally)
    document = tally.document() | {"seed": options.seed, "seconds": round(time.monotonic() - began, 1)}
    atomic_write_json(out, document)
    print(report(document))
    return 0 if document["good"] else 1


def report(document: dict[str, Any]) -> str:
    """The counts as a table."""
    kills = ", ".join(f"{count} in {what}" for what, count in document["kills"].items())
    damages = ", ".join(f"{count} {what}" for what, count in document["damaged"].items())
    rows = [
        ["processes killed", f"{document['kills_in_all']} ({kills})"],
        ["bytes of saved state checked after kills", f"{document['bytes_agreed']:,}"],
        ["of these lost", str(document["bytes_lost"])],
        ["damaged checkpoints", f"{document['damaged_in_all']} ({damages})"],
        ["of these unnoticed", str(document["unnoticed"])],
        ["resumed to another result", str(document["wrong_resumes"])],
        ["tracebacks, hangs", f"{document['tracebacks']}, {document['hangs']}"],
        ["runs that ended otherwise than untouched", ", ".join(document["different_endings"]) or "none"],
    ]
    verdict = "nothing was lost" if document["good"] else "NOT as it should be"
    return f"{format_table(['', ''], rows)}\n{verdict}; {document['seconds']:.0f} s, seed {document['seed']}"


@dataclass
class Story:
    """One training run, once untouched and once killed."""

    name: str
    ranks: int
    num_steps: int
    options: list[str]

    @property
    def reference(self) -> Path:
        """The folder of the untouched run."""
        return Path(f"{self.name}-untouched")

    def start(self, folder: Path) -> list[int]:
        """Start the run in `folder`, or go on with it; returns the process of every rank."""
        values = [*self.options, f"training.output_dir={folder}", f"training.max_steps={self.num_steps}"]
        arguments = ["recipe.json", "--resume", *(word for value in values for word in ("--set", value))]
        phase.value, steps.value = -1, 0
        port = str(free_port())
        return [
            fork(lambda: run_command(train_command.main, arguments), log_of(folder), environment)
            for environment in rank_environments(self.ranks, port)
        ]

    def untouched(self) -> None:
        """Make the run that nothing happens to."""
        assert all(status == 0 for status in ends(self.start(self.reference))), log_of(
            self.reference
        ).read_text()

    def killed(self, count: int, phases: Sequence[str], tally: Tally) -> None:
        """Kill the run `count` times, then let it end, and compare it with the untouched one."""
        folder = Path(self.name)
        # What comes at the end of a run is killed last.
        targets = sorted(random.choices(phases, k=count), key=lambda name: name == "merging")
        for target in tqdm(targets, desc=f"kills, {self.ranks} rank{'s' * (self.ranks > 1)}", unit="kill"):
            for _ in range(20):
                processes = self.start(folder)
                if kill_in(PHASES.index(target), processes, tally):
                    break
            check_agreed(folder, tally)
        if any(ends(self.start(folder))):
            tally.different_endings.append(f"{self.name}: {log_of(folder).read_text()[-500:]}")
            return
        check_agreed(folder, tally)
        tally.different_endings += [f"{self.name}: {what}" for what in differences(folder, self.reference)]


def kill_in(target: int, processes: list[int], tally: Tally) -> bool:
    """Kill a run at a random moment of its phase `target`; False if it ended before."""
    after, pause = random.randint(1, 11), random.random() * (0.4 if target == 3 else 0.012)
    until = time.monotonic() + PATIENCE
    while phase.value != target or (target != 3 and steps.value < after):
        if time.monotonic() > until:
            tally.hangs += 1
            break
        if ended(processes[0]):
            ends(processes[1:])
            return False
    time.sleep(pause)
    found = phase.value
    if found < 0 or ended(processes[0]):
        ends(processes[1:])
        return False
    # Of several ranks sometimes one alone, whose end the others must notice.
    victims = [random.choice(processes)] if random.random() < 0.3 else processes
    for process in victims:
        os.kill(process, signal.SIGKILL)
    statuses = ends(processes, PATIENCE)
    tally.hangs += statuses.count(HUNG)
    tally.kills[PHASES[found]] += 1
    return any(statuses)


def check_agreed(folder: Path, tally: Tally) -> None:
    """Every checkpoint that the run said it had saved is there, unless a newer one took its place."""
    text = log_of(folder).read_text()
    tally.tracebacks += text.count("Traceback (most recent call last)")
    agreed = [int(step) for step in re.findall(r"saved \S+/checkpoints/step-(\d+): ", text)]
    if not agreed:
        return
    newest = files.latest(folder / "checkpoints")
    if newest is not None and files.step_of(newest) >= max(agreed):
        tally.bytes_agreed += sum(path.stat().st_size for path in newest.iterdir())
    else:
        kept = files.folder_of(folder / "checkpoints", max(agreed))
        tally.bytes_lost += max(1, sum(path.stat().st_size for path in kept.glob("*")))


def differences(folder: Path, reference: Path) -> list[str]:
    """What a run left otherwise than the untouched one: tensors bit for bit, losses as numbers."""
    found = []
    older = sorted((reference / "checkpoints").glob("step-*"))[:-1]
    for path in sorted(reference.rglob("*.safetensors")):
        if path.parent in older:
            continue
        name = path.relative_to(reference)
        if not (folder / name).is_file():
            found.append(f"{name} is missing")
            continue
        here, there = load_file(folder / name), load_file(path)
        if here.keys() != there.keys() or not all(torch.equal(here[key], there[key]) for key in there):
            found.append(f"{name} differs")
    if losses(folder) != losses(reference):
        found.append("the losses differ")
    found += [f"{path.name} was left" for path in folder.rglob(".*") if path.suffix in (".partial", ".old")]
    return found


def losses(folder: Path) -> list[tuple[int, float]]:
    """Step and loss of every line of the log."""
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(row["step"], row["loss"]) for row in rows]


def kill_merges(story: Story, count: int, tally: Tally) -> None:
    """Kill offline merges at random moments; the same command must then make what an untouched one makes."""

    def start(out: Path) -> int:
        places = ["--base", "backbone", "--adapter", str(story.reference / "adapter"), "--out", str(out)]
        return fork(lambda: run_command(merge_command.main, [*places, "--quiet"]), log_of(out), {})

    reference, out = Path("merge-untouched"), Path("merge")
    began = time.monotonic()
    assert ends([start(reference)]) == [0], log_of(reference).read_text()
    longest = time.monotonic() - began
    with tqdm(total=count, desc="kills of merges", unit="kill") as bar:
        while bar.n < count:
            if out.is_dir():
                shutil.rmtree(out)
            process = start(out)
            time.sleep(random.random() * longest)
            if not ended(process):
                os.kill(process, signal.SIGKILL)
                tally.hangs += ends([process], PATIENCE).count(HUNG)
                tally.kills["merging on disk"] += 1
                bar.update()
    if not out.is_dir() and ends([start(out)], PATIENCE) != [0]:
        tally.different_endings.append(f"merge: {log_of(out).read_text()[-500:]}")
    text = log_of(out).read_text()
    tally.tracebacks += text.count("Traceback (most recent call last)")
    for path in reference.glob("*.safetensors"):
        if path.read_bytes() != (out / path.name).read_bytes():
            tally.different_endings.append(f"merge: {path.name} differs")


# Damage.


def damage_checkpoints(count: int, tally: Tally) -> None:
    """Damage the newest checkpoint of a short run, or the run's factors, and go on with it."""
    story = Story("short", 1, 15, ["training.save_total_limit=3"])
    story.untouched()
    for _ in tqdm(range(count), desc="damaged checkpoints", unit="run"):
        folder = Path("damaged")
        shutil.rmtree(folder, ignore_errors=True)
        log_of(folder).unlink(missing_ok=True)
        shutil.copytree(story.reference, folder)
        shutil.rmtree(folder / "adapter")
        newest, before, _ = sorted((folder / "checkpoints").glob("step-*"), reverse=True)
        victim = random.choice([*newest.iterdir(), folder / "checkpoints" / files.FACTORS])
        way = random.choice(WAYS)
        damage(victim, way, before / victim.name)
        if random.random() < 0.2:  # the one before it, too
            damage(random.choice(list(before.iterdir())), random.choice(WAYS[:4]), newest)
        tally.damaged[way] += 1
        statuses = ends(story.start(folder), PATIENCE)
        tally.hangs += statuses.count(HUNG)
        text = log_of(folder).read_text()
        tally.tracebacks += text.count("Traceback (most recent call last)")
        tally.unnoticed += "damaged" not in text
        wrong = differences(folder, story.reference) if statuses == [0] else [text[-500:]]
        tally.wrong_resumes += bool(wrong)
        tally.different_endings += [f"after {victim.name} was {way}: {what}" for what in wrong]


def damage(path: Path, way: str, other: Path) -> None:
    """Do one thing to a file; `exchanged` puts another checkpoint's file in its place."""
    content = path.read_bytes()
    if way == "cut off":
        path.write_bytes(content[: random.randrange(len(content))])
    elif way == "flipped":
        place = random.randrange(len(content))
        flipped = content[place] ^ (1 << random.randrange(8))
        path.write_bytes(content[:place] + bytes([flipped]) + content[place + 1 :])
    elif way == "removed":
        path.unlink()
    elif way == "emptied":
        path.write_bytes(b"")
    elif way == "exchanged" and other.is_file():
        path.write_bytes(other.read_bytes())
    else:
        path.write_bytes(content + random.randbytes(random.randint(1, 100)))


# What a process says of itself.


def log_of(folder: Path) -> Path:
    """What the processes of a run say."""
    return Path(f"{folder}.log")


def mark_phases() -> None:
    """Have forked processes say in shared memory what they are doing; rank 0 does."""

    def marked(owner: Any, name: str, index: int) -> None:
        original = getattr(owner, name)

        def replacement(*args: Any, **more: Any) -> Any:
            if os.environ.get("RANK", "0") != "0":
                return original(*args, **more)
            before, phase.value = phase.value, index
            try:
                return original(*args, **more)
            finally:
                phase.value = before

        setattr(owner, name, replacement)

    marked(Trainer, "train", PHASES.index("training"))
    marked(Trainer, "_save_checkpoint", PHASES.index("saving"))
    marked(callbacks, "fold", PHASES.index("folding"))
    marked(run, "export", PHASES.index("merging"))
    step = callbacks.Agreement.on_step_end

    def counted(*args: Any, **more: Any) -> None:
        step(*args, **more)
        if os.environ.get("RANK", "0") == "0":
            steps.value += 1

    callbacks.Agreement.on_step_end = counted  # type: ignore[method-assign]


@contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """Inside the block `folder` is the current one."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


if __name__ == "__main__":
    sys.exit(run_command(main))
