"""Scores through lm-eval: the right numbers, quietly, offline, and nothing left behind or changed."""

from __future__ import annotations

import json
import logging
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluation_toys import byte_tokenizer, toy_model
from lm_eval.models.huggingface import HFLM
from peft import LoraConfig, get_peft_model
from task_toys import CHOICE, GENERATION, write_rows, write_task

from secura_ds.data import render_prompt
from secura_ds.errors import UserError
from secura_ds.evaluation.choice import likelihoods
from secura_ds.evaluation.metrics import METRICS, bootstrap_stderr
from secura_ds.evaluation.task import generate
from secura_ds.tasks import load_tasks, score_tasks

TOKENIZER = byte_tokenizer()
METRIC_LIST = "".join(
    f"  - metric: {name}\n" for name in ("bleu", "json_exact_match", "rouge1", "rougeL", "chrf")
)


def test_choices_are_scored_by_the_models_likelihoods(tmp_path: Path) -> None:
    (task,) = load_tasks([str(write_task(tmp_path, CHOICE, test=9))], [])
    model = toy_model()
    found = score_tasks(model, TOKENIZER, [task], batch_size=4, progress=False)["toy"]
    choices = ["a b", "cc", "d"]
    tokens = [TOKENIZER(choice)["input_ids"] for choice in choices]
    asked = [render_prompt(f"test {i}?\nAnswer:", TOKENIZER) for i in range(9)]
    with torch.no_grad():
        values = likelihoods(model, TOKENIZER, asked, [tokens] * 9)
    right = np.array([float(v.argmax() == i % 3) for i, v in enumerate(values)])
    by_length = [float((v / [3, 2, 1]).argmax() == i % 3) for i, v in enumerate(values)]
    assert found["items"] == right.tolist()
    assert 0 < right.sum() < 9
    assert (found["metric"], found["score"], found["n"]) == ("acc", pytest.approx(right.mean()), 9)
    assert found["stderr"] == pytest.approx(right.std(ddof=1) / 3)
    assert found["metrics"]["acc_norm"]["score"] == pytest.approx(np.mean(by_length))
    assert (found["chance"], found["maximum"]) == (pytest.approx(1 / 3), 1.0)


def test_answers_are_greedy_and_end_as_the_model_ends_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = GENERATION.replace("max_gen_toks: 6", "max_gen_toks: 24")
    (task,) = load_tasks([str(write_task(tmp_path, text))], [])
    answers: list[str] = []
    plain = HFLM.generate_until

    def watched(self: HFLM, requests: Any, disable_tqdm: bool = False) -> list[str]:
        answers.extend(plain(self, requests, disable_tqdm))
        return answers

    monkeypatch.setattr(HFLM, "generate_until", watched)
    model = toy_model()
    model.generation_config.repetition_penalty = 3.0  # what a model's own settings add is left out
    score_tasks(model, TOKENIZER, [task], batch_size=2, progress=False)
    asked = [render_prompt(f"test {i}?", TOKENIZER) for i in range(5)]
    expected = generate(toy_model(), TOKENIZER, asked, 24, 5, progress=False)
    assert [answer.strip() for answer in answers] == [text.split("\n")[0].strip() for text in expected]
    assert len(set(answers)) > 1


def test_written_answers_are_scored_by_every_metric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = GENERATION.replace("  - metric: exact_match\n", METRIC_LIST)
    expected = ['{"n": 1}', "the cat sat on the mat", "a dog barked at the moon last night", '{"a": [2]}']
    answers = ['{"n":1}', "the cat sat on a mat", " a dog barked at the moon tonight ", '{"a": [3]}']
    path = write_task(tmp_path, text)
    write_rows(
        tmp_path / "test.jsonl", [{"prompt": f"{i}", "completion": text} for i, text in enumerate(expected)]
    )
    monkeypatch.setattr(HFLM, "generate_until", lambda self, requests, disable_tqdm=False: answers)
    (task,) = load_tasks([str(path)], [])
    found = json.loads(json.dumps(score_tasks(toy_model(), TOKENIZER, [task], progress=False)))["toy"]
    stripped = [answer.strip() for answer in answers]
    for name in ("bleu", "json_exact_match", "rougeL"):
        score, stderr, _ = METRICS[name](stripped, expected)
        assert found["metrics"][name]["score"] == pytest.approx(score), name
        if name == "bleu":
            assert found["stderr"] == pytest.approx(stderr)
            assert found["score"] == pytest.approx(score)
            assert 0 < stderr < 50
    assert found["metrics"]["json_exact_match"] == {"score": 0.25, "stderr": pytest.approx(0.25)}
    assert 0 < found["metrics"]["rouge1"]["score"] < 1
    assert found["metrics"]["chrf"]["stderr"] is None
    assert (found["metric"], found["maximum"], found["items"]) == ("bleu", 100.0, None)


def test_other_corpus_scores_are_resampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_task(tmp_path, GENERATION.replace("exact_match", "chrf"))
    answers = [f"yes {i}" if i % 2 else "no" for i in range(5)]
    monkeypatch.setattr(HFLM, "generate_until", lambda self, requests, disable_tqdm=False: answers)
    monkeypatch.setattr("secura_ds.evaluation.metrics.RESAMPLES", 20)
    (task,) = load_tasks([str(path)], [])
    found = score_tasks(toy_model(), TOKENIZER, [task], progress=False)["toy"]
    assert 20 < found["score"] < 80
    assert 5 < found["stderr"] < 40
    assert bootstrap_stderr(np.zeros(5)) == 0.0


def test_it_is_quiet_offline_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], caplog: Any
) -> None:
    write_task(tmp_path / "a", GENERATION, name="written")
    write_task(tmp_path / "b", CHOICE, name="chosen")
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("connected"))
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: pytest.fail("asked for a data set"))
    before = sorted(path for path in tmp_path.rglob("*"))
    model, state = toy_model().train(), torch.get_rng_state()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    level = logging.getLogger("lm_eval").level
    with caplog.at_level(logging.DEBUG, logger="root"):
        found = score_tasks(model, TOKENIZER, load_tasks(["written", "chosen"], [tmp_path]), progress=False)
    assert set(found) == {"written", "chosen"}
    assert tuple(capfd.readouterr()) == ("", "")
    assert [record for record in caplog.records if record.name.startswith("lm_eval")] == []
    assert logging.getLogger("lm_eval").level == level
    assert sorted(path for path in tmp_path.rglob("*")) == before
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert "tie_weights" not in vars(model)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_an_adapter_is_scored_as_it_is(tmp_path: Path) -> None:
    (task,) = load_tasks([str(write_task(tmp_path, CHOICE, test=40))], [])
    torch.manual_seed(0)
    config = LoraConfig(target_modules="all-linear", lora_alpha=128, init_lora_weights=False)
    adapted = get_peft_model(toy_model(), config)
    found = score_tasks(adapted, TOKENIZER, [task], progress=False)
    assert found == score_tasks(adapted.merge_and_unload(), TOKENIZER, [task], progress=False)
    assert found != score_tasks(toy_model(), TOKENIZER, [task], progress=False)


def test_the_first_items_are_scored_whatever_the_batch(tmp_path: Path) -> None:
    tasks = load_tasks([str(write_task(tmp_path, CHOICE, test=9))], [])
    whole = score_tasks(toy_model(), TOKENIZER, tasks, batch_size=5, progress=False)["toy"]
    part = score_tasks(toy_model(), TOKENIZER, tasks, max_items=4, batch_size=1, progress=False)["toy"]
    assert (part["n"], part["items"]) == (4, whole["items"][:4])
    with pytest.raises(UserError, match="max_items is 0; score at least 1"):
        score_tasks(toy_model(), TOKENIZER, tasks, max_items=0, progress=False)
