"""Training on two ranks under DeepSpeed: against one process, cut and resumed, on another number of ranks."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from training_toys import adapter, command, launch, lines, losses, quiet_environment, write_toy
from transformers import AutoModelForCausalLM

from secura_ds.recipe import load_recipe
from secura_ds.training import train

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from train_worker import CASES, CONFIGURATIONS  # noqa: E402

LORA = 'adapter={"method":"lora","rank":3,"target_modules":["q_proj"]}'


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def two_ranks(toy: Path) -> dict[str, object]:
    """All two-rank runs, in the toy's folder; their outcome by name."""
    result = toy.parent / "result.json"
    launcher = str(Path(sys.executable).parent / "deepspeed")
    port = str(20000 + os.getpid() % 20000)
    worker = [str(HERE / "train_worker.py"), str(toy), str(result)]
    done = subprocess.run(
        [launcher, "--num_accelerators", "2", "--master_port", port, *worker],
        cwd=toy.parent,
        env=quiet_environment(),
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert result.is_file(), done.stdout[-4000:] + done.stderr[-4000:]
    outcome: dict[str, object] = json.loads(result.read_text())
    return outcome


@pytest.fixture(scope="module")
def one_process(toy: Path) -> Path:
    """The folder with the same runs in one process without DeepSpeed."""
    folder = toy.parent / "one"
    for name, options in {
        "plain": [],
        "forward": ["adapter.smagnorm.apply=forward"],
        "M1": ["adapter.strategy=M1"],
        "lora": [LORA],
        "calibrated": ["adapter.selection=calibrated", "adapter.calibration.num_tokens=320"],
        "nf4": ["backbone.dtype=bfloat16", "backbone.quantization.kind=nf4"],
        "nf4-calibrated": CASES["nf4-calibrated"],
        "contrast": CASES["contrast"],
        "nf4-contrast": CASES["nf4-contrast"],
        "validated": ["data.validation_fraction=0.25", "training.eval_steps=3"],
    }.items():
        train(load_recipe(toy, [f"training.output_dir={folder / name}", "training.save_steps=4", *options]))
    return folder


@pytest.mark.parametrize(
    ("name", "alone"),
    [
        ("zero3", "plain"),
        ("zero2", "plain"),
        ("forward", "forward"),
        ("M1", "M1"),
        ("lora", "lora"),
        ("calibrated", "calibrated"),
        ("contrast", "contrast"),
        ("validated", "validated"),
        ("checkpointing", "plain"),
        ("checkpointing-forward", "forward"),
        ("reentrant", "plain"),
        *((f"shipped {path.stem}", "plain") for path in CONFIGURATIONS),
    ],
)
def test_two_ranks_train_as_one_process_does(
    toy: Path, two_ranks: dict[str, object], one_process: Path, name: str, alone: str
) -> None:
    assert two_ranks[name] == "finished"
    assert losses(toy.parent / name) == pytest.approx(losses(one_process / alone), rel=2e-5)
    together, single = adapter(toy.parent / name), adapter(one_process / alone)
    assert together.keys() == single.keys()
    for key, value in single.items():
        assert torch.allclose(together[key].float(), value.float(), rtol=1e-3, atol=1e-4), key


def test_validation_during_training_is_the_same_on_two_ranks(
    toy: Path, two_ranks: dict[str, object], one_process: Path
) -> None:
    """Of an odd number of batches one rank has more than the other: it must neither hang nor count twice."""
    together, alone = (
        {line["step"]: line["eval_loss"] for line in lines(folder / "metrics.jsonl") if "eval_loss" in line}
        for folder in (toy.parent / "validated", one_process / "validated")
    )
    assert list(together) == [3, 6, 7]
    assert together == pytest.approx(alone, rel=2e-5)


@pytest.mark.parametrize("name", ["nf4", "nf4-calibrated", "nf4-contrast"])
def test_two_ranks_train_on_4_bit_weights(
    toy: Path, two_ranks: dict[str, object], one_process: Path, name: str
) -> None:
    assert two_ranks[name] == "finished"
    # The trained parameters are bfloat16 there, fp32 here.
    assert losses(toy.parent / name) == pytest.approx(losses(one_process / name), rel=3e-2)


@pytest.mark.parametrize("name", ["zero3", "zero2", "M1", "bf16"])
def test_a_resumed_run_is_the_same_run(toy: Path, two_ranks: dict[str, object], name: str) -> None:
    assert two_ranks[f"{name}-cut"] == "finished"
    assert losses(toy.parent / f"{name}-cut") == losses(toy.parent / name)
    whole, cut = adapter(toy.parent / name), adapter(toy.parent / f"{name}-cut")
    assert all(torch.equal(whole[key], cut[key]) for key in whole)
    last = Path("checkpoints/step-000007")
    for file in ("trained.safetensors", "optimizer.safetensors"):
        assert (toy.parent / name / last / file).read_bytes() == (
            toy.parent / f"{name}-cut" / last / file
        ).read_bytes()


def moved(toy: Path, name: str, to: str) -> Path:
    """A copy of a finished run as it was after its step 4."""
    copy = toy.parent / to
    shutil.copytree(
        toy.parent / name, copy, ignore=shutil.ignore_patterns("adapter", "step-000007", "run.json")
    )
    return copy


def test_a_run_goes_on_in_one_process(toy: Path, two_ranks: dict[str, object], one_process: Path) -> None:
    """Two ranks of 2 examples until step 4, then one process that gathers 2 passes of 2."""
    run = moved(toy, "zero3", "moved")
    train(load_recipe(toy, [f"training.output_dir={run}"]), resume=True)
    assert losses(run) == pytest.approx(losses(one_process / "plain"), rel=2e-5)
    assert [line["step"] for line in lines(run / "metrics.jsonl")] == list(range(1, 8))


@pytest.mark.parametrize(
    ("ranks", "name", "options"),
    [
        (3, "M1-twelve", ["adapter.strategy=M1", "training.gradient_accumulation_steps=2"]),
        (4, "zero3", ["training.micro_batch_size=1", "training.gradient_accumulation_steps=1"]),
    ],
)
def test_a_run_goes_on_with_more_ranks(
    toy: Path, two_ranks: dict[str, object], ranks: int, name: str, options: list[str]
) -> None:
    """The steps take the same examples; weights that M1 had folded come from the checkpoint, too."""
    run = moved(toy, name, f"{name}-{ranks}")
    options = [f"training.output_dir={run}", "training.deepspeed=zero3.json", *options]
    done = launch(toy, *[f"--set={option}" for option in options], "--resume", ranks=ranks)
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(run) == pytest.approx(losses(toy.parent / name), rel=2e-5)
    expected = adapter(toy.parent / name)
    for key, value in adapter(run).items():
        assert torch.allclose(value.float(), expected[key].float(), rtol=1e-3, atol=1e-4), key


def test_folded_weights_have_files_of_their_own(toy: Path, two_ranks: dict[str, object]) -> None:
    checkpoint = toy.parent / "M1/checkpoints/step-000004"
    folded = load_file(checkpoint / "folded-00001.safetensors")
    assert len(folded) == 4 and all(name.endswith("_proj") for name in folded)
    assert not any("base_layer" in name for name in load_file(checkpoint / "trained.safetensors"))
    assert not list((toy.parent / "zero3/checkpoints/step-000004").glob("folded-*"))


def test_one_rank_that_is_told_to_stop_stops_both(toy: Path, two_ranks: dict[str, object]) -> None:
    assert two_ranks["signal"] == {"status": "interrupted", "steps": 3, "signal": signal.SIGTERM}
    assert (toy.parent / "signal/checkpoints/step-000003/manifest.json").is_file()


def test_a_model_loaded_whole_is_refused(two_ranks: dict[str, object]) -> None:
    assert "frozen weights are whole on every rank" in str(two_ranks["whole"])


def test_the_sharded_adapter_loads_in_a_plain_process(toy: Path, two_ranks: dict[str, object]) -> None:
    base = AutoModelForCausalLM.from_pretrained(toy.parent / "backbone", dtype=torch.bfloat16)
    loaded = PeftModel.from_pretrained(base, toy.parent / "bf16" / "adapter")
    B = dict(loaded.named_parameters())["base_model.model.model.layers.0.self_attn.q_proj.secura_B.default"]
    assert B.shape == (9, 7)
    assert B.any()


def test_masters_are_stored_in_full_precision(toy: Path, two_ranks: dict[str, object]) -> None:
    stored = load_file(toy.parent / "bf16/checkpoints/step-000007/trained.safetensors")
    A = next(value for name, value in stored.items() if "secura_A" in name)
    assert A.dtype == torch.float32
    assert not torch.equal(A, A.bfloat16().float())


def test_ctrl_c_under_the_launcher_leaves_a_checkpoint(toy: Path) -> None:
    options = ["training.deepspeed=zero3.json", "training.max_steps=100000", "training.output_dir=ctrl-c"]
    process = subprocess.Popen(
        command(toy, *[f"--set={option}" for option in options], ranks=2),
        cwd=toy.parent,
        env=quiet_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    metrics, deadline = toy.parent / "ctrl-c" / "metrics.jsonl", time.monotonic() + 200
    while not (metrics.is_file() and len(metrics.read_text().splitlines()) > 2):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.3)
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does
    output, _ = process.communicate(timeout=100)
    assert process.returncode != 0
    run = json.loads((toy.parent / "ctrl-c" / "run.json").read_text())
    assert (run["status"], run["signal"]) == ("interrupted", signal.SIGINT), output
    checkpoint = toy.parent / f"ctrl-c/checkpoints/step-{run['steps']:06d}"
    assert (checkpoint / "manifest.json").is_file()
