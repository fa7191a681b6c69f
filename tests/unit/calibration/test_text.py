from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from calibration_toys import toy_llama, toy_tokenizer

from secura_ds.calibration.text import Calibration, generate, openings, read_tokens, sample
from secura_ds.errors import UserError


@pytest.fixture
def _short_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secura_ds.calibration.text.SEQUENCE_LENGTH", 40)


def test_sampling_keeps_to_the_nucleus_and_its_proportions() -> None:
    probabilities = torch.tensor([0.02, 0.5, 0.03, 0.3, 0.15])
    logits = probabilities.log().expand(20000, 5)
    counts = torch.bincount(sample(logits, torch.Generator().manual_seed(0)), minlength=5) / 20000
    # 0.5 + 0.3 + 0.15 reach 0.95, so the two rarest tokens lie outside.
    torch.testing.assert_close(counts, torch.tensor([0, 0.5, 0, 0.3, 0.15]) / 0.95, rtol=0, atol=0.015)
    assert counts[0] == counts[2] == 0


def test_sampling_always_allows_the_likeliest_token() -> None:
    logits = torch.tensor([[0.0, 30.0, 0.0], [30.0, 0.0, 0.0]])
    assert sample(logits, torch.Generator().manual_seed(0)).tolist() == [1, 0]


def test_half_of_the_openings_is_a_users_turn() -> None:
    model, tokenizer = toy_llama(), toy_tokenizer()
    begun = openings(model, tokenizer, 5)
    assert begun[:3] == [[256]] * 3
    assert [tokenizer.decode(ids) for ids in begun[3:]] == ["<|turn|>user\n"] * 2
    assert openings(model, toy_tokenizer(chat_template=None), 4) == [[256]] * 4


def test_openings_need_some_first_token() -> None:
    model, tokenizer = toy_llama(), toy_tokenizer()
    tokenizer.bos_token = None
    model.config.bos_token_id = 7
    assert openings(model, tokenizer, 1) == [[7]]
    model.config.bos_token_id = None
    assert openings(model, tokenizer, 1) == [[257]]
    tokenizer.eos_token = None
    with pytest.raises(UserError, match=r"give calibration\.text"):
        openings(model, tokenizer, 1)


@pytest.mark.usefixtures("_short_sequences")
@torch.no_grad()
def test_generated_text_is_seeded_and_of_the_wanted_size() -> None:
    model, tokenizer = toy_llama().eval(), toy_tokenizer()
    first = generate(model, tokenizer, 250, seed=1, progress=False)
    assert first.shape == (6, 40)
    assert (first[:3, 0] == 256).all()
    assert tokenizer.decode(first[5]).startswith("<|turn|>user\n")
    assert first.min() >= 0
    assert len(first.unique(dim=0)) == 6
    assert torch.equal(first, generate(model, tokenizer, 250, seed=1, progress=False))
    assert not torch.equal(first, generate(model, tokenizer, 250, seed=2, progress=False))
    assert generate(model, tokenizer, 20, seed=1, progress=False).shape == (1, 20)


@pytest.mark.usefixtures("_short_sequences")
@torch.no_grad()
def test_generated_text_follows_the_model() -> None:
    model, tokenizer = toy_llama().eval(), toy_tokenizer()
    ids = generate(model, tokenizer, 1920, seed=0, progress=False)
    probabilities = model(ids).logits[:, :-1].softmax(-1)
    drawn = probabilities.gather(2, ids[:, 1:, None])
    likelier = (probabilities * (probabilities > drawn)).sum(-1)
    written = slice(20, None)
    assert float(likelier[:, written].max()) < 0.951
    # Drawn at temperature 1, the mean probability of a token is near the expectation of its distribution.
    expected = probabilities.square().sum(-1)[:, written].mean()
    assert float(drawn[:, written].mean()) == pytest.approx(float(expected), rel=0.1)


def test_saved_text_comes_back_token_for_token(tmp_path: Path) -> None:
    tokenizer = toy_tokenizer()
    ids = torch.randint(0, 120, (4, 30), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = 256
    texts = [tokenizer.decode(row) for row in ids.tolist()]
    Calibration({}, texts, ids).save(tmp_path / "calibration.jsonl")
    assert torch.equal(read_tokens(tmp_path / "calibration.jsonl", tokenizer, 9999), ids)
    assert Calibration.load_texts(tmp_path / "calibration.jsonl") == texts


def test_saved_tokens_of_another_tokenizer_are_not_trusted(tmp_path: Path) -> None:
    tokenizer = toy_tokenizer()
    path = tmp_path / "calibration.jsonl"
    path.write_text(json.dumps({"text": "abc", "token_ids": [1, 2, 3, 4]}) + "\n")
    assert tokenizer.decode(read_tokens(path, tokenizer, 3)[0]) == "abc"


def test_given_text_is_cut_to_sequences(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = toy_tokenizer()
    plain = tmp_path / "text.txt"
    plain.write_text("abcdefgh" * 100)
    assert read_tokens(plain, tokenizer, 480).shape == (3, 160)
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        assert read_tokens(plain, tokenizer, 7680).shape == (5, 160)
    assert "has 800 tokens, fewer than calibration.num_tokens 7680" in caplog.text
    rows = tmp_path / "text.jsonl"
    rows.write_text('{"text": "abc"}\n{"text": "defg"}\n')
    assert tokenizer.decode(read_tokens(rows, tokenizer, 7)[0]) == "abcdefg"


def test_unusable_text_is_named(tmp_path: Path) -> None:
    tokenizer = toy_tokenizer()
    with pytest.raises(UserError, match=r"missing\.jsonl: no such file"):
        read_tokens(tmp_path / "missing.jsonl", tokenizer, 100)
    with pytest.raises(UserError, match=r"missing\.txt: no such file"):
        read_tokens(tmp_path / "missing.txt", tokenizer, 100)
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    with pytest.raises(UserError, match=r"empty\.txt: the calibration text has no tokens"):
        read_tokens(empty, tokenizer, 100)
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text('{"text": "a"}\n{"txt": "b"}\n')
    with pytest.raises(UserError, match=r'wrong\.jsonl:2: the row has no "text"'):
        read_tokens(wrong, tokenizer, 100)
