"""What a machine has left: containers count, files that the kernel can drop do not."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from secura_ds.plan.machine import free_main_memory, here

GIB = 2**30


@pytest.fixture(autouse=True)
def plenty(monkeypatch: pytest.MonkeyPatch) -> None:
    class Memory:
        available = 64 * GIB

    monkeypatch.setattr(psutil, "virtual_memory", Memory)


def write(folder: Path, **files: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n")
    return folder


def test_without_a_container_it_is_what_is_available(tmp_path: Path) -> None:
    assert free_main_memory(tmp_path) == 64 * GIB


def test_a_container_leaves_its_limit_less_what_it_cannot_drop(tmp_path: Path) -> None:
    write(
        tmp_path,
        memory__max=10 * GIB,
        memory__current=6 * GIB,
        memory__stat=f"anon 1\ninactive_file {2 * GIB}\nactive_file 7",
    )
    assert free_main_memory(tmp_path) == 10 * GIB - (6 - 2) * GIB


def test_a_container_without_a_limit(tmp_path: Path) -> None:
    assert free_main_memory(write(tmp_path, memory__max="max", memory__current=5)) == 64 * GIB


def test_the_first_version_of_containers(tmp_path: Path) -> None:
    folder = tmp_path / "memory"
    write(folder, memory__limit_in_bytes=8 * GIB, memory__usage_in_bytes=3 * GIB)
    assert free_main_memory(tmp_path) == 5 * GIB
    write(folder, memory__limit_in_bytes=2**63 - 4096)
    assert free_main_memory(tmp_path) == 64 * GIB


def test_processes_of_a_node_share_its_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("secura_ds.plan.machine.free_main_memory", lambda: 64 * GIB)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    devices = here(per_node=4, nodes=2)
    assert (devices.kind, devices.ranks, devices.memory, devices.host_memory) == (
        "cpu",
        8,
        16 * GIB,
        64 * GIB,
    )
