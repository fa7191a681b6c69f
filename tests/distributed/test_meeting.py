"""The ranks meet before anything is loaded; one that does not come, or goes away, is named."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from training_toys import free_port, quiet_environment

pytestmark = pytest.mark.long

WORKER = Path(__file__).resolve().parent / "meeting_worker.py"
PATIENCE = 3.0


# What each rank does; the ranks of a case meet, or not, at a port of their own.
CASES = {
    "late": ["late", "meet"],
    "no rank 1": ["meet", None],
    "no rank 0": [None, "meet"],
    "frozen": ["meet", "freeze", "meet"],
    "no sum": ["meet", "wait"],
    "port taken": ["meet", None],
}


@pytest.fixture(scope="module")
def outcomes() -> Iterator[dict[str, list[subprocess.CompletedProcess[str] | None]]]:
    """How every process ended; all run at once, as most of their time goes into importing."""
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        started = {
            name: start(ranks, taken.getsockname()[1] if name == "port taken" else free_port())
            for name, ranks in CASES.items()
        }
        done = {}
        for name, processes in started.items():
            others = [p for p, behaviour in zip(processes, CASES[name], strict=True) if behaviour != "freeze"]
            wait(others)
            done[name] = [ended(process) for process in processes]
        yield done


def start(ranks: list[str | None], port: int) -> list[subprocess.Popen[str] | None]:
    return [
        subprocess.Popen(
            [sys.executable, str(WORKER), behaviour, str(PATIENCE)],
            env=quiet_environment(
                RANK=str(rank), WORLD_SIZE=str(len(ranks)), LOCAL_RANK="0", LOCAL_WORLD_SIZE="1",
                MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), SECURA_NODES="alpha beta gamma",
            ),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        ) if behaviour else None
        for rank, behaviour in enumerate(ranks)
    ]  # fmt: skip


def wait(processes: list[subprocess.Popen[str] | None]) -> None:
    for process in processes:
        if process is not None:
            process.wait(timeout=120)


def ended(process: subprocess.Popen[str] | None) -> subprocess.CompletedProcess[str] | None:
    if process is None:
        return None
    process.kill()  # the frozen one; the others have ended
    output, errors = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


Outcomes = dict[str, list[subprocess.CompletedProcess[str]]]


def errors(done: subprocess.CompletedProcess[str]) -> list[str]:
    assert "Traceback" not in done.stderr
    return [line for line in done.stderr.splitlines() if "error:" in line]


def test_ranks_meet_also_when_one_comes_later(outcomes: Outcomes) -> None:
    for done in outcomes["late"]:
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("met after ")


@pytest.mark.parametrize(("case", "present", "absent"), [
    ("no rank 1", 0, "beta (rank 1)"),
    ("no rank 0", 1, "alpha (rank 0)"),
    ("frozen", 0, "beta (rank 1)"),
])  # fmt: skip
def test_a_node_that_does_not_answer_is_named(
    outcomes: Outcomes, case: str, present: int, absent: str
) -> None:
    done = outcomes[case][present]
    assert done.returncode == 2
    (line,) = errors(done)
    assert line.startswith(f"error: {absent} did not answer ") and f"within {PATIENCE:.0f} s" in line


def test_only_one_rank_speaks(outcomes: Outcomes) -> None:
    assert outcomes["frozen"][2].returncode == 2 and not errors(outcomes["frozen"][2])
    assert [errors(done) for done in outcomes["no sum"]][1:] == [[]]


def test_ranks_that_answer_but_do_not_reach_each_other(outcomes: Outcomes) -> None:
    assert [done.returncode for done in outcomes["no sum"]] == [2, 2]
    (line,) = errors(outcomes["no sum"][0])
    assert "all 2 ranks arrived, but a sum over them took more than" in line and "GLOO_SOCKET_IFNAME" in line


def test_a_port_that_is_taken_is_one_line(outcomes: Outcomes) -> None:
    done = outcomes["port taken"][0]
    assert done.returncode == 2
    (line,) = errors(done)
    assert f"is taken on {socket.gethostname()}, perhaps by another run: choose another" in line
