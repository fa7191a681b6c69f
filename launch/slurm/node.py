"""Start the ranks of one node of a Slurm job, wait for them, and exit as they did. One runs on every node:

    srun --ntasks-per-node=1 python launch/slurm/node.py launch/train.py recipes/llama3-8b.json

Slurm's signals reach the ranks themselves, which save and exit; this process only lives on until they have.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

REQUEUE = 75  # secura_ds.stopping.REQUEUE; this process starts without that import, which takes seconds
FIRST_PORT, NUM_PORTS = 10000, 20000  # below those that systems give away by themselves
OWN_END = 90.0  # seconds in which ranks end by themselves, and name the culprit, once one of them has failed
LAST_WORDS = 20.0  # seconds between SIGTERM and SIGKILL for those that do not


def main() -> int:
    """Start the command once for each rank of this node; return the status they ended with."""
    if len(sys.argv) < 2 or "SLURM_JOB_ID" not in os.environ:
        print("error: node.py is started by srun in a job: sbatch launch/slurm/train.sbatch", file=sys.stderr)
        return 2
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    command = [sys.executable, "-u", *sys.argv[1:]]
    environments = rank_environments(os.environ)
    return wait([subprocess.Popen(command, env={**os.environ, **own}) for own in environments])


def rank_environments(job: Mapping[str, str]) -> list[dict[str, str]]:
    """What each rank of this node is told, from the variables Slurm sets in a task.

    Raises:
        SystemExit: RANKS_PER_NODE is no number.
    """
    nodes, node = int(job["SLURM_NNODES"]), int(job["SLURM_NODEID"])
    given = job.get("RANKS_PER_NODE") or job.get("SLURM_GPUS_ON_NODE") or "1"
    if not given.isdigit() or given == "0":
        raise SystemExit(f"error: RANKS_PER_NODE is {given!r}: a whole number, at least 1")
    ranks = int(given)
    shared = {
        "MASTER_ADDR": job.get("MASTER_ADDR") or _address(job),
        # Several jobs may share a node.
        "MASTER_PORT": job.get("MASTER_PORT") or str(FIRST_PORT + int(job["SLURM_JOB_ID"]) % NUM_PORTS),
        "WORLD_SIZE": str(nodes * ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
    }
    return [{**shared, "RANK": str(node * ranks + local), "LOCAL_RANK": str(local)} for local in range(ranks)]


def _address(job: Mapping[str, str]) -> str:
    """The first node's name; where no server knows it, the address of the machine that ran srun, the same."""
    first = (job.get("SECURA_NODES") or job["SLURMD_NODENAME"]).split()[0]
    try:
        socket.getaddrinfo(first, None)
    except OSError:
        return job.get("SLURM_LAUNCH_NODE_IPADDR", first)
    return first


def wait(ranks: Sequence[subprocess.Popen[bytes]]) -> int:
    """Wait until all ranks have ended; if one fails, see to it that the others do.

    Returns:
        The status of the first that failed; REQUEUE if all others ended well; 0 if all did.
    """
    failed: int | None = None
    patience = [(OWN_END, signal.SIGTERM), (OWN_END + LAST_WORDS, signal.SIGKILL)]
    since = 0.0
    while any(rank.poll() is None for rank in ranks):
        time.sleep(0.1)
        statuses = [rank.returncode for rank in ranks]
        if failed is None:
            failed = next((status for status in statuses if status not in (None, 0, REQUEUE)), None)
            since = time.monotonic()
        elif patience and time.monotonic() - since > patience[0][0]:
            _, number = patience.pop(0)
            for rank in ranks:
                rank.send_signal(number)
    statuses = [rank.returncode for rank in ranks]
    if failed is None:
        failed = next((status for status in statuses if status not in (0, REQUEUE)), max(statuses))
    return failed if failed >= 0 else 128 - failed


if __name__ == "__main__":
    sys.exit(main())
