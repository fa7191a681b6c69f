"""The shipped recipes under ZeRO-3 on two ranks, at toy width: trained, folded, resumed, merged, reloaded.

The toys are the published configurations shrunk (`family_toys`), so biases, soft caps, sliding windows, tied
heads and scaled rotary positions are those of the real families. Whole and 4-bit weights, M2 and M1.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from family_toys import BACKBONES, RECIPES, ROWS, logits_of, save_backbone, tokens_of
from peft import PeftModel
from safetensors.torch import load_file
from training_toys import adapter, losses, quiet_environment
from transformers import AutoModelForCausalLM, AutoTokenizer

from secura_ds.backbones import load_model
from secura_ds.merge import merge
from secura_ds.recipe import load_recipe
from secura_ds.training import train
from secura_ds.training.trainer import Trainer

pytestmark = pytest.mark.long

HERE = Path(__file__).resolve().parent
NAMES = ["qwen2-1.5b", "gemma2-2b", "llama3-8b", "llama3.1-8b"]
INPUTS = [
    'adapter.calibration.mode="null"',
    "adapter.init=block",
    'adapter.smagnorm={"apply": "forward", "eps_relative": 1.0}',
]
"""Factors of inputs alone and S-MagNorm in the forward pass, at a rate that shows in five steps."""
CASES: dict[str, tuple[str, list[str]]] = {
    # In bfloat16 gradients near 0 differ in sign, which Adam makes whole steps of.
    "shipped": ("{}.json", ["training.learning_rate=0.005", "backbone.dtype=float32"]),
    "bf16": ("{}.json", INPUTS),
    "M1": ("{}.json", [*INPUTS, "adapter.strategy=M1"]),
    "nf4": ("qlora/{}.json", INPUTS),
}
RUNS = [f"{name}-{case}" for name in NAMES for case in CASES]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all runs, with toys, data and the shipped ZeRO-3 settings, fit for small weights."""
    folder = tmp_path_factory.mktemp("families")
    for name in NAMES:
        save_backbone(name, folder / "backbones" / name)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:24]))
    (folder / "text.jsonl").write_text(
        "".join(json.dumps({"text": f"{row['prompt']}\n{row['completion']}"}) + "\n" for row in ROWS[24:40])
    )
    settings = json.loads((RECIPES / "deepspeed" / "zero3.json").read_text())
    # Weight matrices are cut, biases and norms stay whole.
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 1000
    (folder / "zero3.json").write_text(json.dumps(settings))
    return folder


def settings_of(place: Path, run: str) -> tuple[str, list[str]]:
    """A shipped recipe and what makes it small."""
    name, case = run.rsplit("-", 1)
    recipe, more = CASES[case]
    return str(RECIPES / recipe.format(name)), [
        f"backbone.model={place / 'backbones' / name}",
        "adapter.cur_rank=7",
        "adapter.inner_rank=9",
        "adapter.fold_every=2",
        f"adapter.calibration.text={place / 'text.jsonl'}",
        "adapter.calibration.num_tokens=640",
        f'data.sources=[{{"path":"{place / "rows.jsonl"}"}}]',
        "training.learning_rate=0.03",
        "training.epochs=null",
        "training.max_steps=5",
        "training.save_steps=3",
        "training.logging_steps=1",
        "training.micro_batch_size=2",
        "training.report_to=[]",
        *more,
    ]


@pytest.fixture(scope="module")
def two_ranks(place: Path) -> dict[str, str]:
    """The status of every two-rank run, by its folder in `place`."""
    runs, result = place / "runs.json", place / "result.json"
    sharded = [f"training.deepspeed={place / 'zero3.json'}", "training.gradient_accumulation_steps=1"]
    given = {run: settings_of(place, run) for run in RUNS}
    runs.write_text(
        json.dumps({run: (path, [*settings, *sharded]) for run, (path, settings) in given.items()})
    )
    launcher = str(Path(sys.executable).parent / "deepspeed")
    port = str(20000 + (os.getpid() + 7919) % 20000)
    done = subprocess.run(
        [launcher, "--num_accelerators", "2", "--master_port", port]
        + [str(HERE / "families_worker.py"), str(runs), str(result)],
        cwd=place,
        env=quiet_environment(),
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert result.is_file(), done.stdout[-4000:] + done.stderr[-4000:]
    found: dict[str, str] = json.loads(result.read_text())
    return found


@dataclass(frozen=True)
class Alone:
    """The same runs in one process without DeepSpeed: their folder, and each one's batches."""

    folder: Path
    batches: dict[str, list[dict[str, torch.Tensor]]]


@pytest.fixture(scope="module")
def one_process(place: Path) -> Alone:
    alone = Alone(place / "alone", {run: [] for run in RUNS})
    original = Trainer.compute_loss
    with pytest.MonkeyPatch.context() as patch:
        for run in RUNS:

            def recorded(self: Any, model: Any, inputs: Any, *args: Any, run: str = run, **more: Any) -> Any:
                alone.batches[run].append({key: value.clone() for key, value in inputs.items()})
                return original(self, model, inputs, *args, **more)

            patch.setattr(Trainer, "compute_loss", recorded)
            path, settings = settings_of(place, run)
            plain = ["training.deepspeed=null", "training.gradient_accumulation_steps=2"]
            train(load_recipe(path, [*settings, *plain, f"training.output_dir={alone.folder / run}"]))
    return alone


def learnt(place: Path, run: str, folder: Path) -> dict[str, torch.Tensor]:
    """What folds have added up, by layer: C U R under M2, the change of the base weight under M1.

    C and R may be eigenvectors, whose signs depend on rounding: U alone has rows and columns of either sign.
    """
    state = adapter(folder)
    if not run.endswith("M1"):
        U = {key.removesuffix("U"): value for key, value in state.items() if key.endswith("secura_U")}
        return {key: state[f"{key}C"].float() @ value @ state[f"{key}R"].float() for key, value in U.items()}
    base = load_file(place / "backbones" / run.rsplit("-", 1)[0] / "model.safetensors")
    weights = {key: value for key, value in state.items() if key.endswith("secura_W")}
    names = {key: key.removeprefix("base_model.model.").replace("secura_W", "weight") for key in weights}
    return {key: value.float() - base[names[key]].float() for key, value in weights.items()}


@pytest.mark.parametrize("run", RUNS)
def test_two_ranks_train_as_one_process_does(
    place: Path, two_ranks: dict[str, str], one_process: Alone, run: str
) -> None:
    assert two_ranks[run] == "finished"
    together, single = losses(place / run), losses(one_process.folder / run)
    assert len(single) == 5
    assert together == pytest.approx(single, rel=3e-3)  # bfloat16 has a step of 2**-8
    trained, expected = learnt(place, run, place / run), learnt(place, run, one_process.folder / run)
    assert len(expected) == 2 * 7 and trained.keys() == expected.keys()
    for key, change in expected.items():
        assert (trained[key] - change).norm() <= 0.25 * change.norm(), key


@pytest.mark.parametrize("run", RUNS)
def test_a_resumed_run_is_the_same_run(place: Path, two_ranks: dict[str, str], run: str) -> None:
    assert two_ranks[f"{run}-cut"] == "finished"
    assert losses(place / f"{run}-cut") == losses(place / run)
    whole, cut = adapter(place / run), adapter(place / f"{run}-cut")
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[key], cut[key]) for key in whole)
    for file in ("trained.safetensors", "optimizer.safetensors"):
        last = Path("checkpoints/step-000005") / file
        assert (place / run / last).read_bytes() == (place / f"{run}-cut" / last).read_bytes()


@pytest.mark.parametrize("run", RUNS)
def test_the_merged_model_is_the_adapter_model(
    place: Path, two_ranks: dict[str, str], run: str, tmp_path: Path
) -> None:
    name = run.rsplit("-", 1)[0]
    path, settings = settings_of(place, run)
    recipe = load_recipe(path, settings)
    base, trained, out = place / "backbones" / name, place / run / "adapter", tmp_path / "merged"

    merge(base, trained, out, check=False, progress=False)
    kernel = "eager" if name == "gemma2-2b" else "sdpa"
    merged = AutoModelForCausalLM.from_pretrained(out, attn_implementation=kernel)
    assert (merged.get_output_embeddings().weight is merged.get_input_embeddings().weight) == (
        name in ("qwen2-1.5b", "gemma2-2b")
    )
    tokens = tokens_of(AutoTokenizer.from_pretrained(trained))
    model = load_model(recipe.backbone)
    assert model.config._attn_implementation == kernel
    before = logits_of(model, tokens)
    expected = logits_of(PeftModel.from_pretrained(model, trained), tokens)
    change = (expected - before).abs().max()
    assert change > 0.1
    # The same weights; at most the order of sums differs.
    assert (expected - logits_of(merged, tokens)).abs().max() <= 0.1 * change


@pytest.mark.parametrize("run", RUNS)
def test_padding_is_never_learnt_and_the_end_of_a_turn_is(place: Path, one_process: Alone, run: str) -> None:
    name = run.rsplit("-", 1)[0]
    backbone = BACKBONES[name]
    tokenizer = AutoTokenizer.from_pretrained(place / "backbones" / name)
    pad, end = (tokenizer.convert_tokens_to_ids(token) for token in (backbone.pad, backbone.end_of_turn))
    assert pad not in (tokenizer.eos_token_id, end)
    batches = one_process.batches[run]
    assert len(batches) == 10
    for batch in batches:
        padding = batch["attention_mask"] == 0
        assert torch.equal(batch["input_ids"] == pad, padding)
        assert (batch["labels"][padding] == -100).all()
        for row, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            answer = labels[labels != -100]
            assert answer[-1] == end and (answer[:-1] != end).all()
            if backbone.bos is not None:
                assert (row == tokenizer.bos_token_id).sum() == 1 and row[0] == tokenizer.bos_token_id
    assert any((batch["attention_mask"] == 0).any() for batch in batches)
