"""A Slurm of two nodes on this machine: munge, a controller and two daemons, all started and stopped here."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from training_toys import free_port

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch")
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
MailProg=/bin/true
GresTypes=gpu
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={port_1} CPUs=16 Gres=gpu:2 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={port_2} CPUs=16 Gres=gpu:2 State=UNKNOWN
PartitionName=main Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP
"""
# Slurm counts devices that exist; nothing here opens them.
DEVICES = "NodeName=n[1-2] Name=gpu File=/dev/null\nNodeName=n[1-2] Name=gpu File=/dev/zero\n"


def why_not() -> str | None:
    """Why no Slurm can run here; None if one can."""
    missing = [name for name in NEEDED if _path(name) is None]
    if missing:
        return f"{', '.join(missing)} not installed (Debian: slurm-wlm and munge)"
    if os.geteuid() != 0:
        return "a Slurm of one's own needs root"
    return None


class Cluster:
    """Daemons that run from `start` to `stop`, and commands that talk to them."""

    def __init__(self) -> None:
        # Short, as a socket's path must be; munge wants no folder that others may write.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
        self.environment = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}
        for variable in [name for name in self.environment if name.startswith(("SLURM_", "SBATCH_"))]:
            if variable != "SLURM_CONF":
                del self.environment[variable]
        self._daemons: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Write the configuration and wait until both nodes are idle."""
        configuration = CONFIGURATION.format(
            folder=self.folder,
            host=socket.gethostname().split(".")[0],
            controller_port=free_port(),
            port_1=free_port(),
            port_2=free_port(),
        )
        (self.folder / "slurm.conf").write_text(configuration)
        (self.folder / "gres.conf").write_text(DEVICES)
        (self.folder / "state").mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        places = [f"--{what}-file={self.folder}/munge.{what}" for what in ("key", "pid", "log", "seed")]
        self._daemon("munged", "--foreground", "--force", f"--socket={self.folder}/munge.socket", *places)
        self._wait(lambda: (self.folder / "munge.socket").exists(), "munged did not start")
        self._daemon("slurmctld", "-D")
        for node in ("n1", "n2"):
            self._daemon("slurmd", "-D", "-N", node)
        self._wait(lambda: self.run("sinfo", "-h", "-o", "%T %D") == "idle 2", "the nodes are not idle")

    def stop(self) -> None:
        """End the jobs and the daemons, and remove their folder."""
        self.run("scancel", "--user=root", check=False)
        self._wait(lambda: not self.run("squeue", "-h", check=False), "jobs do not end", patience=40)
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            daemon.wait(timeout=30)
        shutil.rmtree(self.folder)

    def run(self, *command: str, check: bool = True, **more: object) -> str:
        """The output of one of Slurm's commands."""
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=60, check=False, **more
        )  # type: ignore[call-overload]
        assert done.returncode == 0 or not check, (command, done.stdout, done.stderr)
        output: str = done.stdout.strip()
        return output

    def state(self, job: str) -> str:
        """PENDING, RUNNING, COMPLETED, ...; of an array all of its tasks, as far as they differ."""
        found = {
            word.split("=")[1]
            for word in self.run("scontrol", "show", "job", job, "-o").split()
            if word.startswith("JobState=")
        }
        return " ".join(sorted(found))

    def wait_for(self, job: str, *states: str, patience: float = 120) -> str:
        """Wait until a job is in one of `states`."""
        self._wait(lambda: self.state(job) in states, f"job {job} is not {states}", patience)
        return self.state(job)

    def wait_for_end(self, job: str) -> None:
        """Wait until nothing of a job runs any more."""
        self._wait(lambda: not self.run("squeue", "-h", "--jobs", job, check=False), f"job {job} goes on")

    def wait_for_requeue(self, job: str) -> None:
        """Wait until a job is back in the queue, and have it start in seconds instead of Slurm's two minutes.

        At once would be too early: a node refuses a job that it has just ended.
        """
        self.wait_for(job, "PENDING")
        self.run("scontrol", "update", f"JobId={job}", "StartTime=now+4seconds")

    def _daemon(self, *command: str) -> None:
        path = _path(command[0])
        assert path is not None
        log = (self.folder / f"{command[0]}-{len(self._daemons)}.out").open("wb")
        self._daemons.append(
            subprocess.Popen([path, *command[1:]], env=self.environment, stdout=log, stderr=log)
        )

    def _wait(self, reached: object, what: str, patience: float = 60) -> None:
        until = time.monotonic() + patience
        while not reached():  # type: ignore[operator]
            assert time.monotonic() < until, f"{what}\n{self._last_words()}"
            time.sleep(0.2)

    def _last_words(self) -> str:
        return "\n".join(f"{p.name}: {p.read_text()[-2000:]}" for p in sorted(self.folder.glob("*.log")))


def tail(paths: Sequence[Path]) -> str:
    """The ends of some logs, for a failed assertion."""
    return "\n".join(f"--- {path}\n{path.read_text()[-3000:]}" for path in paths)


def _path(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")
