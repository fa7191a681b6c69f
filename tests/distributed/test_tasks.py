"""Scores of tasks on two ranks under ZeRO-3 are those of one process, on both ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from evaluation_toys import byte_tokenizer, toy_model
from task_toys import CHOICE, GENERATION, write_rows, write_task
from training_toys import free_port

from secura_ds.data import render_prompt
from secura_ds.evaluation.task import generate
from secura_ds.tasks import load_tasks, score_tasks

pytestmark = pytest.mark.long

WORKER = Path(__file__).parent / "tasks_worker.py"


def answered_rows() -> list[dict[str, str]]:
    """Prompts, of which every second one expects what the toy model answers."""
    prompts = [f"test {i}?" for i in range(6)]
    asked = [render_prompt(prompt, byte_tokenizer()) for prompt in prompts]
    answers = generate(toy_model(), byte_tokenizer(), asked, 6, 6, progress=False)
    lines = [answer.split("\n")[0].strip() or "none" for answer in answers]
    return [
        {"prompt": prompt, "completion": line if i % 2 else "no"}
        for i, (prompt, line) in enumerate(zip(prompts, lines, strict=True))
    ]


def test_two_ranks_agree_with_one_process(tmp_path: Path) -> None:
    toy_model().save_pretrained(tmp_path / "backbone")
    byte_tokenizer().save_pretrained(tmp_path / "backbone")
    write_task(tmp_path / "a", GENERATION, name="written")
    write_rows(tmp_path / "a" / "test.jsonl", answered_rows())
    write_task(tmp_path / "b", CHOICE, name="chosen", test=7)
    launcher = Path(sys.executable).parent / "deepspeed"
    command = [sys.executable, str(launcher), "--num_accelerators", "2", "--master_port", str(free_port())]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(WORKER.parents[2])
    done = subprocess.run(
        [*command, str(WORKER), str(tmp_path)], env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    found = [json.loads((tmp_path / f"found-{rank}.json").read_text()) for rank in (0, 1)]
    tasks = load_tasks(["written", "chosen"], [tmp_path])
    # A fresh adapter adds nothing, so the plain model has its scores.
    expected = score_tasks(toy_model(), byte_tokenizer(), tasks, batch_size=2, progress=False)
    assert found[0] == found[1] == json.loads(json.dumps(expected))
    assert 0 < expected["chosen"]["score"] < 1
    assert expected["written"]["score"] == 0.5
    assert "lm_eval" not in done.stdout + done.stderr
