"""Two nodes without Slurm: torchrun and `deepspeed --hostfile` make the same run."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from training_toys import REPOSITORY, adapter, free_port, losses, quiet_environment, write_toy

pytestmark = pytest.mark.long

BIN = Path(sys.executable).parent
TRAIN = str(REPOSITORY / "launch" / "train.py")


def on_two_nodes(folder: Path, *commands: Sequence[str]) -> None:
    """Run one launcher for each node, both on this machine."""
    nodes = [
        subprocess.Popen(
            command, cwd=folder, env=quiet_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for command in commands
    ]
    for node in nodes:
        output, _ = node.communicate(timeout=120)
        assert node.returncode == 0, output.decode()[-3000:]


def test_torchrun_and_deepspeed_make_the_same_run(tmp_path: Path) -> None:
    write_toy(tmp_path)
    run = [TRAIN, "recipe.json", "--set", "training.deepspeed=zero3.json", "--set"]
    first, second = tmp_path / "torchrun", tmp_path / "deepspeed"
    port = str(free_port())
    address = ["--master-addr", "127.0.0.1", "--master-port", port, "--nproc-per-node", "1"]
    torchrun = [str(BIN / "torchrun"), "--nnodes", "2", *address]
    on_two_nodes(
        tmp_path,
        *([*torchrun, "--node-rank", str(n), *run, "training.output_dir=torchrun"] for n in range(2)),
    )
    (tmp_path / "hostfile").write_text("alpha slots=1\nbeta slots=1\n")
    deepspeed = [str(BIN / "deepspeed"), "--hostfile", "hostfile", "--no_ssh"]
    deepspeed += ["--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    on_two_nodes(
        tmp_path,
        *([*deepspeed, "--node_rank", str(n), *run, "training.output_dir=deepspeed"] for n in range(2)),
    )
    first, second = tmp_path / "torchrun", tmp_path / "deepspeed"
    assert losses(first) == losses(second) and len(losses(first)) == 7
    expected = adapter(first)
    assert all(torch.equal(value, expected[name]) for name, value in adapter(second).items())
