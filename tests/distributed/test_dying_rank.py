"""A rank that dies or fails ends the others within a minute, and the first words are which rank and why."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from training_toys import command, quiet_environment, write_toy

from secura_ds.training import checkpoint

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from dying_worker import SHORT_PATIENCE  # noqa: E402

ENDLESS = ["training.deepspeed=zero3.json", "training.max_steps=100000", "training.save_steps=2"]

pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy(tmp_path_factory.mktemp("toy"))


def start(toy: Path, run: str, *script: str) -> subprocess.Popen[str]:
    """Two ranks of `launch/train.py`, or of `script`, that would train for days."""
    options = [f"--set={option}" for option in [*ENDLESS, f"training.output_dir={run}"]]
    line = command(toy, *options, ranks=2)
    if script:
        at = line.index(next(part for part in line if part.endswith("train.py")))
        line[at : at + 1] = [str(HERE / "dying_worker.py"), *script]
    return subprocess.Popen(
        line,
        cwd=toy.parent,
        env=quiet_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def rank_process(launcher: subprocess.Popen[str], rank: int) -> psutil.Process:
    family = psutil.Process(launcher.pid).children(recursive=True)
    return next(p for p in family if f"--local_rank={rank}" in p.cmdline())


def wait_for_steps(toy: Path, run: str, process: subprocess.Popen[str], steps: int = 3) -> None:
    metrics, deadline = toy.parent / run / "metrics.jsonl", time.monotonic() + 200
    while not (metrics.is_file() and len(metrics.read_text().splitlines()) >= steps):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.1)


def end(process: subprocess.Popen[str]) -> tuple[str, float]:
    """What was printed, and the seconds until the launcher and all of its ranks were gone."""
    began = time.monotonic()
    family = psutil.Process(process.pid).children(recursive=True)
    output, _ = process.communicate(timeout=120)
    psutil.wait_procs(family, timeout=60)
    assert not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in family)
    assert process.returncode != 0
    return output, time.monotonic() - began


def errors(output: str) -> list[str]:
    return [line for line in output.replace("\r", "\n").splitlines() if line.startswith("error:")]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_is_named_by_the_other(toy: Path, rank: int) -> None:
    run = f"killed-{rank}"
    process = start(toy, run)
    wait_for_steps(toy, run, process)
    victim = rank_process(process, rank)
    os.kill(victim.pid, signal.SIGKILL)
    output, seconds = end(process)
    assert seconds < 60
    assert len(errors(output)) == 1, output
    assert f"rank {rank} (process {victim.pid} on " in output and "memory runs out" in output
    assert "Traceback" not in output
    assert checkpoint.latest(toy.parent / run / "checkpoints") is not None


@pytest.mark.parametrize(
    ("how", "rank", "reason"),
    [
        ("raise", 1, "error: rank 1 failed: RuntimeError: boom"),
        ("raise", 0, "error: rank 0 failed: RuntimeError: boom"),
        ("refuse", 1, "error: data/row.jsonl:7 is not to this rank's taste: mend it"),
    ],
)
def test_the_reason_of_a_rank_that_fails_alone_comes_first(
    toy: Path, how: str, rank: int, reason: str
) -> None:
    run = f"{how}-{rank}"
    process = start(toy, run, how, str(rank))
    wait_for_steps(toy, run, process, steps=2)
    output, seconds = end(process)
    assert seconds < 60
    assert set(errors(output)) == {reason}
    assert output.count("Traceback") == (how == "raise")  # that of the failing rank, below its reason
    if how == "raise":
        assert output.index(reason) < output.index("Traceback")


def test_a_rank_that_hangs_does_not_hold_the_others(toy: Path) -> None:
    process = start(toy, "stopped", "live", "-1")
    wait_for_steps(toy, "stopped", process)
    survivor, stopped = (rank_process(process, rank) for rank in (0, 1))
    began = time.monotonic()
    os.kill(stopped.pid, signal.SIGSTOP)  # as a machine that no longer answers
    psutil.wait_procs([survivor], timeout=60)
    assert not survivor.is_running() or survivor.status() == psutil.STATUS_ZOMBIE
    assert time.monotonic() - began > SHORT_PATIENCE
    os.kill(stopped.pid, signal.SIGKILL)
    output, _ = end(process)
    assert len(errors(output)) == 1, output
    assert f"rank 1 (process {stopped.pid} on " in output
    assert f"has not answered for {SHORT_PATIENCE:.0f} s" in output
