"""Jobs in a real Slurm: preempted, requeued, cancelled, on nodes that answer or do not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from continual_toys import SECURA, strategies, write_sequence_toy
from slurm_cluster import Cluster, tail, why_not
from training_toys import (
    REPOSITORY,
    adapter,
    command,
    launch,
    lines,
    losses,
    quiet_environment,
    write_toy,
)

pytestmark = pytest.mark.timeout(400)

STEPS = 240


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    reason = why_not()
    if reason is not None:
        # CI installs Slurm, and must not pass without these tests.
        assert "REQUIRE_SLURM" not in os.environ, reason
        pytest.skip(reason)
    found = Cluster()
    found.environment |= quiet_environment(PYTHON=sys.executable)
    found.start()
    yield found
    found.stop()


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe of a toy, in a folder from which jobs can be submitted as from the repository."""
    folder = tmp_path_factory.mktemp("toy")
    (folder / "launch").symlink_to(REPOSITORY / "launch")
    return write_toy(folder)


def settings(output: str, *more: str) -> list[str]:
    """Options of launch/train.py for a run long enough to be interrupted."""
    values = [f"training.output_dir={output}", f"training.max_steps={STEPS}", "training.save_steps=50", *more]
    return [word for value in values for word in ("--set", value)]


def submit(cluster: Cluster, toy: Path, script: str, *arguments: str, options: Sequence[str] = ()) -> str:
    """Submit one of the job scripts; returns the job's number."""
    command = ["sbatch", "--parsable", *options, f"launch/slurm/{script}", *arguments]
    return cluster.run(*command, cwd=toy.parent)


def logs(toy: Path, job: str) -> list[Path]:
    """The job's own log and that of each node."""
    return [*toy.parent.glob(f"*-{job}.log"), *sorted((toy.parent / "logs").glob(f"*-{job}-node*.log"))]


def steps_of(run: Path) -> int:
    path = run / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.is_file() else 0


def wait_until(reached: Callable[[], bool], toy: Path, job: str, patience: float = 90) -> None:
    until = time.monotonic() + patience
    while not reached():
        own = "".join(path.read_text() for path in toy.parent.glob(f"secura-*-{job}.log"))
        ended = "ended with status" in (own.splitlines() or [""])[-1]
        assert time.monotonic() < until and not ended, tail(logs(toy, job))
        time.sleep(0.05)


@pytest.fixture(scope="module")
def unanswered(cluster: Cluster, toy: Path) -> str:
    """A job whose second node starts no rank; begun first, as it takes half a minute of waiting."""
    python = toy.parent / "python"
    python.write_text(f'#!/bin/sh\n[ "$SLURM_NODEID" = 1 ] && exec sleep 600\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    options = ["--nodes=2", "--gpus-per-node=1", f"--export=ALL,PYTHON={python}"]
    run = settings("unanswered", "training.deepspeed=zero3.json")
    return submit(cluster, toy, "train.sbatch", "recipe.json", *run, options=options)


@pytest.fixture(scope="module")
def preempted(cluster: Cluster, toy: Path, unanswered: str) -> tuple[str, Path]:
    """A job on two nodes that was told to end twice, in both of a cluster's ways, and its run's folder."""
    run = toy.parent / "preempted"
    options = ["--nodes=2", "--gpus-per-node=1"]
    more = ["training.deepspeed=zero3.json", "training.gradient_accumulation_steps=1"]
    arguments = ["recipe.json", *settings("preempted", *more), "--overwrite"]
    job = submit(cluster, toy, "train.sbatch", *arguments, options=options)
    wait_until(lambda: steps_of(run) > 20, toy, job)
    cluster.run("scancel", "--signal=USR1", job)  # what comes ahead of a time limit
    cluster.wait_for_requeue(job)
    first = steps_of(run)
    assert 20 < first < STEPS - 60
    cluster.wait_for(job, "RUNNING")
    wait_until(lambda: steps_of(run) > first + 20, toy, job)
    cluster.run("scontrol", "requeue", job)  # what preemption does, with SIGTERM
    cluster.wait_for_requeue(job)
    assert first + 20 < steps_of(run) < STEPS
    assert cluster.wait_for(job, "COMPLETED", "FAILED") == "COMPLETED", tail(logs(toy, job))
    return job, run


def test_a_job_preempted_twice_is_the_run_that_was_not(toy: Path, preempted: tuple[str, Path]) -> None:
    more = ["training.deepspeed=zero3.json", "training.gradient_accumulation_steps=1"]
    done = launch(toy, *settings("whole", *more), ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    run, whole = preempted[1], toy.parent / "whole"
    assert losses(run) == losses(whole)
    expected, found = adapter(whole), adapter(run)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    last = Path("checkpoints") / f"step-{STEPS:06d}"
    for file in ("trained.safetensors", "optimizer.safetensors"):
        assert (run / last / file).read_bytes() == (whole / last / file).read_bytes()


def test_the_preempted_job_went_on_by_itself(toy: Path, preempted: tuple[str, Path]) -> None:
    job, run = preempted
    own, first_node, second_node = (path.read_text() for path in logs(toy, job))
    starts = [line for line in own.splitlines() if f"job {job}, start " in line]
    assert [f"start {number}, on n1 n2: " in line for number, line in enumerate(starts, 1)] == [True] * 3
    assert starts[0].endswith("--overwrite") and not starts[0].endswith("--resume")
    assert all(line.endswith("--resume") and "--overwrite" not in line for line in starts[1:])
    assert own.count("ended with status 75") == 2 and own.count("ended with status 0") == 1
    assert own.count("back into the queue") == 1  # the other time Slurm itself saw to it
    assert [line["step"] for line in lines(run / "metrics.jsonl")] == list(range(1, STEPS + 1))
    assert first_node.count("going on from") == 2 and f"finished: {STEPS} steps" in first_node
    assert "SIGUSR1: stopping after this step" in first_node and "SIGTERM: stopping" in first_node
    assert "Traceback" not in first_node + second_node


def test_a_node_that_does_not_answer_is_named(cluster: Cluster, toy: Path, unanswered: str) -> None:
    def said() -> str:
        return "".join(path.read_text() for path in logs(toy, unanswered))

    wait_until(lambda: "error:" in said(), toy, unanswered)
    cluster.run("scancel", unanswered)
    assert "error: n2 (rank 1) did not answer within 30 s" in said()
    assert "Traceback" not in said()


def test_a_cancelled_job_saves_and_stays_away(cluster: Cluster, toy: Path) -> None:
    """Submitted by submit.py, from the repository, on a node without GPUs."""
    run = toy.parent / "cancelled"
    command = [
        sys.executable,
        str(REPOSITORY / "launch/slurm/submit.py"),
        "recipe.json",
        "--gpus-per-node",
        "0",
    ]
    command += ["--python", sys.executable, "--log-folder", str(toy.parent / "logs")]
    job = cluster.run(*command, "--", *settings(str(run)), cwd=toy.parent).split()[-1]
    own = REPOSITORY / f"secura-train-{job}.log"
    try:
        wait_until(lambda: steps_of(run) > 10, toy, job)
        cluster.run("scancel", job)
        cluster.wait_for_end(job)
        assert cluster.state(job) == "CANCELLED", own.read_text()
        assert "back into the queue" not in own.read_text()
    finally:
        own.unlink(missing_ok=True)
    summary = json.loads((run / "run.json").read_text())
    assert summary["status"] == "interrupted"
    assert (run / f"checkpoints/step-{summary['steps']:06d}/manifest.json").is_file()


def test_a_sweep_runs_side_by_side_and_starts_again_so_often_only(cluster: Cluster, toy: Path) -> None:
    """Two jobs of two ranks at once on one node; a signal then ends one of them for good."""
    more = ["training.deepspeed=zero2.json", "training.gradient_accumulation_steps=1"]
    arguments = [
        "recipe.json",
        "training.learning_rate",
        "0.01",
        "0.02",
        "--",
        *settings("unused", *more)[2:],
    ]
    options = ["--array=0-1", "--gpus-per-node=1", "--nodelist=n1"]
    options += ["--export=ALL,MAX_RESTARTS=0,RANKS_PER_NODE=2"]
    job = submit(cluster, toy, "sweep.sbatch", *arguments, options=options)
    runs = [toy.parent / "runs" / f"sweep-{job}" / index for index in "01"]
    wait_until(lambda: min(map(steps_of, runs)) > 5, toy, job)
    cluster.run("scancel", "--signal=USR1", f"{job}_1")
    assert cluster.wait_for(f"{job}_1", "FAILED", "COMPLETED") == "FAILED"
    assert cluster.wait_for(f"{job}_0", "FAILED", "COMPLETED") == "COMPLETED"
    settled = [json.loads((run / "recipe.resolved.json").read_text()) for run in runs]
    assert [recipe["training"]["learning_rate"] for recipe in settled] == [0.01, 0.02]
    assert json.loads((runs[1] / "run.json").read_text())["status"] == "interrupted"
    said = [path.read_text() for path in toy.parent.glob("secura-sweep-*.log")]
    assert sorted("as often as MAX_RESTARTS allows: submit it again" in text for text in said) == [
        False,
        True,
    ]


@pytest.mark.long
def test_preempted_task_sequences_are_those_that_were_not(
    cluster: Cluster, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Told to end within the second task, the job goes on there by itself, on two nodes."""
    folder = tmp_path_factory.mktemp("sequences")
    (folder / "launch").symlink_to(REPOSITORY / "launch")
    recipe = write_sequence_toy(
        folder,
        tasks=["sums", "sizes"],
        entries=[
            {
                "name": "secura",
                "adapter": SECURA,
                "strategy": strategies()["i-lora"],
                "learning_rates": [0.01],
            }
        ],
    )
    own = ["training.deepspeed=zero3.json", "training.max_steps=120", "evaluation.scores=false"]
    arguments = ["sequences.json", *(word for value in own for word in ("--set", value))]
    options = ["--nodes=2", "--gpus-per-node=1"]
    job = submit(cluster, recipe, "continual.sbatch", *arguments, options=options)
    second = folder / "results/sequences/secura-lr0.01-order1-seed0/stages/02-sizes"
    wait_until(lambda: steps_of(second) > 10, recipe, job)
    cluster.run("scancel", "--signal=USR1", job)
    cluster.wait_for_requeue(job)
    assert 10 < steps_of(second) < 120
    assert cluster.wait_for(job, "COMPLETED", "FAILED") == "COMPLETED", tail(logs(recipe, job))
    said = "".join(path.read_text() for path in logs(recipe, job))
    assert "ended with status 75" in said and "1 of 1 sequences finished" in said
    assert "Traceback" not in said
    whole = command(recipe, *arguments[1:], "--set", "output_dir=whole", ranks=2, script="continual.py")
    done = subprocess.run(
        whole, cwd=folder, env=quiet_environment(), capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    uninterrupted = folder / "whole" / second.relative_to(folder / "results")
    assert losses(second) == losses(uninterrupted)
    expected, found = adapter(uninterrupted), adapter(second)
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


def test_a_merge_is_a_job_too(cluster: Cluster, toy: Path, preempted: tuple[str, Path]) -> None:
    places = ["--base", "backbone", "--adapter", str(preempted[1] / "adapter"), "--out", "merged"]
    job = submit(cluster, toy, "merge.sbatch", *places)
    assert cluster.wait_for(job, "COMPLETED", "FAILED") == "COMPLETED", tail(logs(toy, job))
    assert json.loads((toy.parent / "merged" / "merge.json").read_text())["adapted_tensors"] == 4
