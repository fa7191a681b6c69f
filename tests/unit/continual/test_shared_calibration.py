"""What sequences share: the calibration's text, and the factors of a task."""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path

import pytest
import torch
from continual_toys import CONTRAST, load, results, write_sequence_toy
from safetensors.torch import load_file
from training_toys import adapter, losses

from secura_ds.continual import run_sequences
from secura_ds.recipe import load_recipe
from secura_ds.training import method, train

CORDA = {"method": "corda", "rank": 3, "target_modules": ["q_proj"], "calibration": {"num_tokens": 320}}


def test_calibration_is_done_once_for_all_rates_and_orders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what shares it learns what it would have learnt without."""
    written: list[int] = []
    chosen: list[str] = []
    for name in ("secura_ds.calibration.factors", "secura_ds.calibration.corda"):
        real = importlib.import_module(name).generate
        monkeypatch.setattr(f"{name}.generate", lambda *a, real=real: written.append(1) or real(*a))
    for name in ("calibrate", "corda_starts"):
        real = getattr(method, name)
        monkeypatch.setattr(method, name, lambda *a, n=name, r=real, **k: chosen.append(n) or r(*a, **k))
    entries = [
        {"name": "contrast", "adapter": CONTRAST, "learning_rates": [0.01, 0.02]},
        {"name": "corda", "adapter": CORDA, "learning_rates": [0.01, 0.02]},
    ]
    write_sequence_toy(tmp_path, entries=entries, orders=[["sums", "names"], ["names", "sums"]])
    assert run_sequences(load(tmp_path)).finished == 8
    assert written == [1]
    # Of two tasks each; CorDA's belong to the first task of an order.
    assert chosen == ["calibrate", "calibrate", "corda_starts", "corda_starts"]
    for sequence in results(tmp_path)["sequences"]:
        (stage,) = (tmp_path / "results" / sequence["folder"]).glob("stages/01-*")
        train(load_recipe(stage / "recipe.resolved.json", [f"training.output_dir={tmp_path / 'alone'}"]))
        alone, expected = adapter(tmp_path / "alone"), adapter(stage)
        assert all(torch.equal(value, expected[name]) for name, value in alone.items())
        assert losses(tmp_path / "alone") == losses(stage)
        shutil.rmtree(tmp_path / "alone")


def test_damaged_factors_are_chosen_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    entry = {"name": "contrast", "adapter": CONTRAST, "learning_rates": [0.01]}
    write_sequence_toy(tmp_path, entries=[entry], orders=[["sums"]])
    assert run_sequences(load(tmp_path)).finished == 1
    factors = tmp_path / "results/calibration/contrast/sums-seed0.safetensors"
    whole = load_file(factors)
    factors.unlink()  # what was loaded is mapped from it
    factors.write_bytes(b"cut off")
    shutil.rmtree(tmp_path / "results/sequences")
    assert run_sequences(load(tmp_path), resume=True).finished == 1
    assert f"{factors} is damaged" in caplog.text
    assert all(torch.equal(value, whole[name]) for name, value in load_file(factors).items())
