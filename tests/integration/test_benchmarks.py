"""Benchmarks that need what this machine may lack say so and succeed."""

from __future__ import annotations

import subprocess
import sys

from training_toys import REPOSITORY, quiet_environment


def test_the_gpu_benchmark_is_skipped_without_a_gpu() -> None:
    script = str(REPOSITORY / "benchmarks" / "gpu.py")
    environment = quiet_environment(CUDA_VISIBLE_DEVICES="")
    done = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("skipped: no CUDA GPU here")
