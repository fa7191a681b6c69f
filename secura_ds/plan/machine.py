"""How much memory this machine has left for a run: GPUs, main memory and the limit of a container."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

from secura_ds.plan.settings import Devices

CGROUP = Path("/sys/fs/cgroup")
UNLIMITED = 2**60  # the first version's files hold a huge number where there is no limit


def here(*, per_node: int, nodes: int) -> Devices:
    """The devices that this process sees, with what is free on its own now; the rest is taken to be alike."""
    host = free_main_memory()
    if not torch.cuda.is_available():
        return Devices("cpu", per_node, nodes, host // per_node, host)
    free, _ = torch.cuda.mem_get_info()
    return Devices("cuda", per_node, nodes, free, host)


def free_main_memory(cgroup: Path = CGROUP) -> int:
    """Bytes of main memory that can still be had, within the container's limit if there is one."""
    available = int(psutil.virtual_memory().available)
    limits = [left for left in (_left_v2(cgroup), _left_v1(cgroup / "memory")) if left is not None]
    return min([available, *limits])


def _left_v2(folder: Path) -> int | None:
    limit, used = _number(folder / "memory.max"), _number(folder / "memory.current")
    return _left(limit, used, folder / "memory.stat", "inactive_file")


def _left_v1(folder: Path) -> int | None:
    limit = _number(folder / "memory.limit_in_bytes")
    used = _number(folder / "memory.usage_in_bytes")
    return _left(limit, used, folder / "memory.stat", "total_inactive_file")


def _left(limit: int | None, used: int | None, statistics: Path, reclaimable: str) -> int | None:
    """What a limit leaves; pages of files that the kernel can drop at any time do not count as used."""
    if limit is None or used is None or limit >= UNLIMITED:
        return None
    dropped = 0
    try:
        for line in statistics.read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(" ")
            if name == reclaimable:
                dropped = int(value)
    except (OSError, ValueError):
        pass
    return max(0, limit - max(0, used - dropped))


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not there, or "max"
        return None
