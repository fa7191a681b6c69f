"""Task sequences on two ranks: every strategy does what it does on one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from continual_toys import strategies, write_sequence_toy
from safetensors.torch import load_file
from training_toys import PAPER, free_port, quiet_environment

from secura_ds.continual import run_sequences
from secura_ds.recipe import load_sequence_recipe

pytestmark = pytest.mark.long

WORKER = Path(__file__).with_name("continual_worker.py")
SECURA = PAPER | {"cur_rank": 7, "inner_rank": 9, "smagnorm": {"apply": "forward"}}
ENTRIES = [
    *({"name": k, "adapter": SECURA, "strategy": strategies()[k]} for k in ("ewc", "i-lora")),
    {"name": "folded", "adapter": SECURA | {"strategy": "M1", "fold_every": 2}, "strategy": {"kind": "seq"}},
    {
        "name": "contrast",
        "adapter": SECURA | {
            "strategy": "M1", "selection": "calibrated", "init": "orthonormal",
            "calibration": {"mode": "contrast", "num_tokens": 320},
        },
        "strategy": {"kind": "protect", "buffer_size": 4},
        "learning_rates": [0.002, 0.004],
    },
]  # fmt: skip
SEQUENCES = 5
"""One an entry, but for the last: its second rate finds the factors that the first has chosen."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One rank's results in `one`, those of two ranks beside them, and the worker's account."""
    folder = tmp_path_factory.mktemp("sequences")
    entries = [{"learning_rates": [0.01]} | entry for entry in ENTRIES]
    path = write_sequence_toy(folder, entries=entries, tasks=["sums", "sizes"])
    options = [f"output_dir={folder / 'one'}", "training.gradient_accumulation_steps=2"]
    assert run_sequences(load_sequence_recipe(path, options)).finished == SEQUENCES
    launcher = str(Path(sys.executable).parent / "deepspeed")
    command = [launcher, "--num_accelerators", "2", "--master_port", str(free_port()), str(WORKER)]
    done = subprocess.run(
        [*command, str(path), str(folder / "account.json")],
        cwd=folder, env=quiet_environment(), capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def account(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "account.json").read_text()))


def sequences(folder: Path, name: str) -> list[dict[str, Any]]:
    return list(json.loads((folder / name / "continual.json").read_text())["sequences"])


def numbers(value: Any) -> list[float]:
    """Losses and scores of a document, in their order."""
    if isinstance(value, dict):
        kept = [v for k, v in value.items() if k not in ("seconds", "peak_memory_bytes", "settings")]
        return [number for inner in kept for number in numbers(inner)]
    if isinstance(value, list):
        return [number for inner in value for number in numbers(inner)]
    return [value] if isinstance(value, int | float) else []


@pytest.mark.parametrize("name", ["zero3", "zero2"])
def test_two_ranks_measure_what_one_does(folder: Path, name: str) -> None:
    assert account(folder)[name] == SEQUENCES
    for one, two in zip(sequences(folder, "one"), sequences(folder, name), strict=True):
        assert one["label"] == two["label"]
        assert numbers(two["stages"]) == pytest.approx(numbers(one["stages"]), rel=2e-4, abs=2e-4)


@pytest.mark.parametrize("name", ["zero3", "zero2"])
def test_two_ranks_keep_the_adapters_of_one(folder: Path, name: str) -> None:
    files = sorted((folder / "one").glob("sequences/*/stages/*/adapter/adapter_model.safetensors"))
    assert len(files) == 2 * SEQUENCES
    for file in files:
        expected, found = load_file(file), load_file(folder / name / file.relative_to(folder / "one"))
        assert expected.keys() == found.keys()
        for key, value in expected.items():
            assert torch.allclose(found[key], value, atol=2e-4), (file, key)


def test_two_ranks_find_the_fisher_information_of_one(folder: Path) -> None:
    (one,) = (folder / "one").glob("sequences/ewc*/strategy/*.safetensors")
    expected = load_file(one)
    found = load_file(folder / "zero3" / one.relative_to(folder / "one"))
    assert expected.keys() == found.keys() and any(key.startswith("weights/") for key in found)
    for key, value in expected.items():
        assert float(value.abs().max()) > 0 or "secura_A" in key
        assert torch.allclose(found[key], value, rtol=5e-3, atol=1e-3 * float(value.abs().max())), key


def test_both_ranks_stop_together_and_go_on(folder: Path) -> None:
    assert account(folder)["signals"] == [15, 15, None]
    for one, two in zip(sequences(folder, "zero3"), sequences(folder, "signals"), strict=True):
        assert numbers(two["stages"]) == numbers(one["stages"])


def test_finished_runs_hold_no_tensors(folder: Path) -> None:
    """Ten runs of a model of 400 kB: what is left of them is less than a quarter of one."""
    first, second = account(folder)["tensors"]
    assert second - first < 100_000
