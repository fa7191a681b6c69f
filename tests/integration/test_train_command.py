"""The training command in one process: what it leaves, how it stops, how it goes on, what it refuses."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from training_toys import adapter, lines, losses, write_toy
from transformers import AutoModelForCausalLM, AutoTokenizer

from launch.train import main
from secura_ds.errors import run_command
from secura_ds.stopping import REQUEUE
from secura_ds.training import callbacks
from secura_ds.training import checkpoint as files

Run = Callable[..., int]


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture
def run(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the command in `tmp_path`: run("name", "a.b=c", ..., "--resume")."""
    monkeypatch.chdir(tmp_path)

    def call(output: str, *options: str) -> int:
        settings = [f"--set={option}" for option in options if not option.startswith("--")]
        flags = [option for option in options if option.startswith("--")]
        return run_command(main, [str(toy), f"--set=training.output_dir={output}", *settings, *flags])

    return call


def signal_at(
    step: int, number: int, monkeypatch: pytest.MonkeyPatch, *, method: str = "on_step_end"
) -> None:
    """Send this process a signal at the end of one step, or at the first batch of an evaluation after it."""
    original = getattr(callbacks.Agreement, method)

    def send(self: Any, args: Any, state: Any, control: Any, **more: Any) -> None:
        if state.global_step == step and self.signals.received is None:
            os.kill(os.getpid(), number)
        original(self, args, state, control, **more)

    monkeypatch.setattr(callbacks.Agreement, method, send)


def test_what_a_run_leaves(run: Run, toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["data.validation_fraction=0.2", "training.eval_steps=3", 'training.report_to=["tensorboard"]']
    assert run("run", *options) == 0
    assert "finished: 7 steps" in capsys.readouterr().out
    folder = Path("run")
    assert json.loads((folder / "run.json").read_text())["status"] == "finished"
    summary = json.loads((folder / "run.json").read_text())
    assert summary["steps"] == 7
    assert summary["trainable_parameters"] == 4 * 2 * 7 * 9
    assert summary["peak_memory_bytes"] > 10**8
    rows = lines(folder / "metrics.jsonl")
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 8))
    keys = {
        "step",
        "epoch",
        "loss",
        "learning_rate",
        "grad_norm",
        "tokens_per_second",
        "memory_bytes",
        "seconds",
    }
    assert set(steps[0]) == keys
    assert [row["step"] for row in rows if "eval_loss" in row] == [3, 6, 7]
    assert summary["tokens"] > 7 * 4 * 10
    statistics = lines(folder / "statistics.jsonl")
    assert [row["step"] for row in statistics] == list(range(1, 8))
    assert set(statistics[0]["layers"]["model.layers.1.self_attn.v_proj"]) == {
        "ratio_max",
        "limiter_mean",
        "relative_change",
    }
    assert any((folder / "logs").iterdir())
    assert json.loads((folder / "recipe.resolved.json").read_text())["training"]["max_steps"] == 7
    assert json.loads((folder / "environment.json").read_text())["seed"] == 0
    assert not list(folder.glob("**/*.partial"))
    base = AutoModelForCausalLM.from_pretrained(toy.parent / "backbone")
    loaded = PeftModel.from_pretrained(base, folder / "adapter")
    assert any(U.any() for name, U in loaded.named_buffers() if "secura_U" in name)
    assert AutoTokenizer.from_pretrained(folder / "adapter").pad_token == "<pad>"


def test_checkpoints_are_small(run: Run) -> None:
    assert run("run", "training.save_steps=2") == 0
    checkpoints = Path("run/checkpoints")
    assert sorted(p.name for p in checkpoints.iterdir()) == [
        "factors.safetensors",
        "step-000006",
        "step-000007",
    ]
    trained = 4 * 2 * 7 * 9 * 4
    tensors = sum(p.stat().st_size for p in (checkpoints / "step-000007").glob("*.safetensors"))
    assert tensors < 4 * trained + 8192  # the constant: names of the tensors
    assert not any(
        "secura_C" in key for key in load_file(checkpoints / "step-000007" / "trained.safetensors")
    )


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(["adapter.fold_every=2"], id="M2"),
        pytest.param(["adapter.strategy=M1", "adapter.fold_every=2"], id="M1"),
        pytest.param(
            [
                "backbone.dtype=bfloat16",
                "backbone.quantization.kind=nf4",
                "training.gradient_checkpointing=true",
            ],
            id="nf4",
        ),
        pytest.param(["adapter.smagnorm.apply=forward"], id="forward"),
        pytest.param(
            ['adapter={"method":"lora","rank":4,"dropout":0.3,"target_modules":["q_proj"]}'], id="lora"
        ),
        pytest.param(
            [
                "training.optimizer=adamw_8bit",
                'adapter.target_modules=["q_proj"]',
                "adapter.init=orthogonal",
                "adapter.cur_rank=60",
                "adapter.inner_rank=80",  # above 4096 elements the state is kept in 8 bits
            ],
            id="8-bit optimizer",
        ),
    ],
)
def test_a_resumed_run_is_the_same_run(run: Run, options: list[str]) -> None:
    # 10 steps an epoch: the run is cut in its second one, in the middle of a stretch of the log.
    settings = [*options, "training.max_steps=14", "training.save_steps=6", "training.logging_steps=5"]
    assert run("whole", *settings) == 0
    shutil.copytree("whole", "cut")
    shutil.rmtree("cut/checkpoints/step-000014")
    shutil.rmtree("cut/adapter")
    Path("cut/run.json").unlink()
    assert run("cut", *settings, "--resume") == 0
    assert losses(Path("cut")) == losses(Path("whole"))
    whole, cut = adapter(Path("whole")), adapter(Path("cut"))
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[key], cut[key]) for key in whole)
    resumed, before = Path("cut/checkpoints/step-000014"), Path("whole/checkpoints/step-000014")
    for name in ("trained.safetensors", "optimizer.safetensors"):
        assert (resumed / name).read_bytes() == (before / name).read_bytes()


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, REQUEUE), (signal.SIGUSR1, REQUEUE)]
)
def test_a_signal_ends_with_a_checkpoint(
    run: Run, monkeypatch: pytest.MonkeyPatch, number: int, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        signal_at(4, number, patch)
        assert run("run") == code
    assert "--resume goes on from run/checkpoints" in capsys.readouterr().out
    assert json.loads(Path("run/run.json").read_text())["status"] == "interrupted"
    assert Path("run/checkpoints/step-000004").is_dir()
    assert not Path("run/adapter").exists()
    assert run("run", "--resume") == 0
    assert [row["step"] for row in lines(Path("run/metrics.jsonl"))] == list(range(1, 8))


def test_a_signal_is_heard_inside_an_evaluation(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    signal_at(3, signal.SIGTERM, monkeypatch, method="on_prediction_step")
    assert run("run", "data.validation_fraction=0.2", "training.eval_steps=3") == REQUEUE
    assert Path("run/checkpoints/step-000003").is_dir()


def test_a_finished_run_is_not_lost(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("run", "training.max_steps=2") == 0
    before = adapter(Path("run"))
    assert run("run", "training.max_steps=2") == 2
    assert "already holds a run (status finished)" in capsys.readouterr().err
    assert run("run", "training.max_steps=2", "--resume") == 0
    assert json.loads(Path("run/run.json").read_text())["steps"] == 2
    again = adapter(Path("run"))
    assert all(torch.equal(before[key], again[key]) for key in before)
    assert run("run", "training.max_steps=2", "adapter.cur_rank=5", "--resume") == 2
    assert "adapter.cur_rank is 5" in capsys.readouterr().err
    assert run("run", "training.max_steps=2", "adapter.cur_rank=5", "--overwrite") == 0
    assert adapter(Path("run"))["base_model.model.model.layers.0.self_attn.q_proj.secura_A"].shape == (5, 9)


def test_a_run_on_other_examples_is_not_resumed(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"{i}+1=", "completion": str(i + 1)} for i in range(16)]
    data, sources = tmp_path / "sums.jsonl", 'data.sources=[{"path": "sums.jsonl"}]'
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run("run", sources, "training.max_steps=2") == 0
    assert json.loads(Path("run/data.json").read_text())["sources"][0]["read"] == 16
    data.write_text("".join(json.dumps(row | {"id": 1}) + "\n" for row in rows))
    assert run("run", sources, "training.max_steps=2", "--resume") == 0
    data.write_text("".join(json.dumps(row) + "\n" for row in rows[1:] + rows[:1]))
    capsys.readouterr()
    assert run("run", sources, "training.max_steps=2", "--resume") == 2
    assert f"--resume: the examples of {data} are not those" in capsys.readouterr().err
    assert run("run", sources, "training.max_steps=2", "--overwrite") == 0


def test_another_batch_is_not_resumed(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("run", "training.max_steps=2") == 0
    assert run("run", "training.max_steps=4", "training.micro_batch_size=1", "--resume") == 2
    error = capsys.readouterr().err
    assert "a step now takes 2 examples" in error
    assert "set training.gradient_accumulation_steps=4" in error
    options = ["training.micro_batch_size=1", "training.gradient_accumulation_steps=4"]
    assert run("run", "training.max_steps=4", *options, "--resume") == 0


def test_a_loss_that_is_not_finite_stops_the_run(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = callbacks.Trainer.training_step

    def broken(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = original(self, *args, **kwargs)
        if self.state.global_step >= 3:
            self.step_loss = float("nan")
        return loss

    monkeypatch.setattr(callbacks.Trainer, "training_step", broken)
    assert run("run", "training.save_steps=2") == 2
    error = capsys.readouterr().err
    assert error.count("error:") == 1
    assert "not finite for 3 steps, up to step 6: try a lower training.learning_rate (it is 0.01)" in error
    assert "step-000002" in error
    assert sorted(p.name for p in Path("run/checkpoints").glob("step*")) == ["step-000002"]
    assert json.loads(Path("run/run.json").read_text())["status"] == "stopped"


CALIBRATED = ["adapter.selection=calibrated", "adapter.calibration.num_tokens=320"]


@pytest.mark.parametrize(
    "chosen", [["adapter.selection=least"], CALIBRATED, [*CALIBRATED, "adapter.calibration.mode=contrast"]]
)
def test_damaged_factors_are_chosen_anew_and_must_be_the_same(
    run: Run, chosen: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    options = ["training.save_steps=4", *chosen]
    assert run("whole", *options) == 0
    shutil.copytree("whole", "cut")
    shutil.rmtree("cut/checkpoints/step-000007")
    factors = Path("cut/checkpoints/factors.safetensors")
    content = factors.read_bytes()
    factors.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert run("cut", *options, "--resume") == 0
    assert "factors.safetensors is missing or damaged: choosing its contents anew" in caplog.text
    assert factors.read_bytes() == content
    assert losses(Path("cut")) == losses(Path("whole"))


def test_a_full_disk_keeps_the_earlier_checkpoint(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from secura_ds import files as writing

    save = writing.save_file

    def full(tensors: Any, path: str, **more: Any) -> None:
        if "step-000004" in path:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(tensors, path, **more)

    monkeypatch.setattr(writing, "save_file", full)
    assert run("run", "training.save_steps=2") == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("error: the disk holding")
    assert [p.name for p in Path("run/checkpoints").glob("*step*")] == ["step-000002"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of a quarter megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a disk of one's own needs root, and the right to mount")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)  # tensors read from it are still mapped


def test_a_disk_that_fills_up_costs_nothing_that_was_saved(
    run: Run, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["training.save_steps=1", "training.save_total_limit=50", "training.max_steps=30"]
    assert run("whole", *options) == 0
    capsys.readouterr()
    assert run(str(small_disk / "run"), *options) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(error) == 1 and "is full: free some space and run again" in error[0]
    kept = files.latest(small_disk / "run" / "checkpoints")
    assert kept is not None and 1 < files.step_of(kept) < 30
    assert not list(small_disk.rglob("*.partial"))
    subprocess.run(["mount", "-o", "remount,size=50m", str(small_disk)], check=True)
    assert run(str(small_disk / "run"), *options, "--resume") == 0
    assert losses(small_disk / "run") == losses(Path("whole"))
    whole, cut = adapter(Path("whole")), adapter(small_disk / "run")
    assert all(torch.equal(whole[key], cut[key]) for key in whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["training.lerning_rate=1"], "did you mean learning_rate?"),
        (["adapter.cur_rank=65"], "cur_rank is 65, but model.layers.0.self_attn.q_proj is (64, 64)"),
        (['adapter.target_modules=["no_such"]'], "no_such"),
        (["data.max_length=4"], "max_length"),
    ],
)
def test_what_is_refused_in_one_line(
    run: Run, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("run", *options) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(error) == 1
    assert message in error[0]
    assert not Path("run/adapter").exists()


def test_examples_are_shown(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("run", "--show-examples=2") == 0
    out = capsys.readouterr().out
    assert out.count("learnt  ") == 2
    assert run("run", "--show-examples=0") == 0
    assert "40 read" in capsys.readouterr().out
    for wrong in ("-3", "two"):
        with pytest.raises(SystemExit, match="2"):
            run("run", f"--show-examples={wrong}")
        assert f"--show-examples: '{wrong}' is no number from 0 on" in capsys.readouterr().err
    assert not Path("run").exists()


def test_the_text_of_a_calibration_is_kept_and_used_again(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["training.max_steps=1", "adapter.selection=calibrated", "adapter.calibration.num_tokens=320"]
    text = "adapter.calibration.text=first/calibration.jsonl"
    assert run("first", *options) == 0
    kept = Path("first/calibration.jsonl").read_bytes()
    assert [len(row["token_ids"]) for row in lines(Path("first/calibration.jsonl"))] == [160, 160]
    assert run("second", *options, "adapter.calibration.seed=1", text) == 0
    assert Path("second/calibration.jsonl").read_bytes() == kept
    first, second = adapter(Path("first")), adapter(Path("second"))
    factors = [name for name in first if name.endswith("secura_R")]
    assert len(factors) == 4 and all(torch.equal(first[name], second[name]) for name in factors)
    capsys.readouterr()
    assert run("first", *options, text, "--overwrite") == 2
    assert "calibration.jsonl, which --overwrite would delete" in capsys.readouterr().err
    assert Path("first/calibration.jsonl").read_bytes() == kept and Path("first/adapter").is_dir()


def test_packing_changes_no_loss(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """Packed examples must not see each other: with all of them in one step, the first loss is the same."""
    options = ["training.max_steps=1", "data.max_length=128", "training.gradient_accumulation_steps=1"]
    assert run("plain", *options, "training.micro_batch_size=40") == 0
    assert run("packed", *options, "training.micro_batch_size=40", "data.packing=true") == 2
    count = int(re.search(r"there are (\d+) rows", capsys.readouterr().err)[1])
    assert 1 < count < 40
    assert run("packed", *options, f"training.micro_batch_size={count}", "data.packing=true") == 0
    assert losses(Path("packed")) == pytest.approx(losses(Path("plain")), rel=1e-5)
