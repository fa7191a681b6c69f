"""The only place that reads environment variables; also describes where a run happens."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

REPORTED_PACKAGES = (
    "secura_ds",
    "torch",
    "transformers",
    "deepspeed",
    "peft",
    "trl",
    "accelerate",
    "bitsandbytes",
    "datasets",
    "safetensors",
)


def cache_folder() -> Path:
    """Folder for converted models: `SECURA_CACHE`, or `~/.cache/secura_ds`."""
    return Path(os.environ.get("SECURA_CACHE") or Path.home() / ".cache" / "secura_ds")


def rank() -> int:
    """This process's rank among all processes of the run (0 without a launcher)."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """This process's rank on its node (0 without a launcher)."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """Number of processes of the run (1 without a launcher)."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """Number of processes of the run on this node (1 without a launcher)."""
    # The first is torchrun's name, the second that of the deepspeed launcher.
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1")


def threads_per_process() -> int | None:
    """CPU threads for this process, so that a node's processes share its cores; None if the user chose."""
    if os.environ.get("OMP_NUM_THREADS"):
        return None
    return max(1, len(os.sched_getaffinity(0)) // local_world_size())


def is_main_process() -> bool:
    """True on the one process that writes files and speaks."""
    return rank() == 0


def under_launcher() -> bool:
    """True when `deepspeed`, `torchrun` or `srun` wrappers set the process group's variables."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def rendezvous() -> tuple[str, int]:
    """Address and port of the store at which the ranks of a launched run meet."""
    return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])


def launcher_serves_store() -> bool:
    """True under torchrun, whose own process serves the store at that address."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def launcher_attempt() -> str:
    """Which start of the ranks this is, where a launcher starts them again at the same store."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


def node_names() -> list[str]:
    """The names of the nodes in the order of their ranks, where the launcher says them; else empty."""
    return os.environ.get("SECURA_NODES", "").split()


def _git_commit() -> str | None:
    folder = Path(__file__).resolve().parent
    try:
        result = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() or None


def package_version(package: str) -> str | None:
    """Version of an installed distribution, None if it is not there."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def describe_environment() -> dict[str, Any]:
    """Versions, commit and devices, for `environment.json`. Holds no environment variable and no secret."""
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version for name in REPORTED_PACKAGES if (version := package_version(name))},
        "git_commit": _git_commit(),
        "devices": devices or ["cpu"],
        "cpu_count": os.cpu_count(),
        "world_size": world_size(),
    }
