"""An evaluation on two ranks under ZeRO-3 gives what one process gives, on both ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from evaluation_toys import byte_tokenizer, toy_model, write_jsonl
from training_toys import free_port

from secura_ds.evaluation import evaluate
from secura_ds.recipe import EvaluationRecipe

WORKER = Path(__file__).parent / "evaluate_worker.py"


def test_two_ranks_agree_with_one_process(tmp_path: Path) -> None:
    toy_model().save_pretrained(tmp_path / "backbone")
    byte_tokenizer().save_pretrained(tmp_path / "backbone")
    write_jsonl(tmp_path / "task.jsonl", [{"prompt": "x" * n, "completion": "y"} for n in range(1, 6)])
    question = {"question": "Which?", "choices": ["a", "bb", "cc"], "answer": 1}
    write_jsonl(tmp_path / "facts.jsonl", [question | {"answer": n % 3} for n in range(5)])
    (tmp_path / "text.txt").write_text("Some text. " * 60)
    probes = [("multiple_choice", "facts.jsonl"), ("text_loss", "text.txt")]
    recipe = {
        "task": {"path": str(tmp_path / "task.jsonl"), "max_new_tokens": 6},
        "probes": [{"kind": kind, "path": str(tmp_path / name)} for kind, name in probes],
        "batch_size": 2,
    }
    (tmp_path / "evaluation.json").write_text(json.dumps(recipe))
    launcher = Path(sys.executable).parent / "deepspeed"
    command = [sys.executable, str(launcher), "--num_accelerators", "2", "--master_port", str(free_port())]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(WORKER.parents[2])
    done = subprocess.run(
        [*command, str(WORKER), str(tmp_path)], env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    found = [json.loads((tmp_path / f"found-{rank}.json").read_text()) for rank in (0, 1)]
    expected = evaluate(
        toy_model(), byte_tokenizer(), EvaluationRecipe.model_validate(recipe), progress=False
    )
    assert found[0] == found[1]
    assert found[0]["task"] == expected["task"]
    assert found[0]["probes"]["facts"]["score"] == expected["probes"]["facts"]["score"]
    loss = expected["probes"]["text"]["mean_token_loss"]
    assert found[0]["probes"]["text"]["mean_token_loss"] == pytest.approx(loss, abs=1e-5)
