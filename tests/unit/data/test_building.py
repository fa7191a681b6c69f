from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from evaluation_toys import byte_tokenizer, write_jsonl
from hypothesis import given
from hypothesis import strategies as st
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from secura_ds.data import build_datasets, show_examples
from secura_ds.data.building import mixture_counts
from secura_ds.errors import UserError
from secura_ds.recipe import DataRecipe

TOKENIZER = byte_tokenizer()


def rows(letter: str, number: int) -> list[dict[str, str]]:
    return [{"prompt": f"{letter}{i}", "completion": f"{letter}{i}!"} for i in range(number)]


def recipe(sources: list[dict[str, Any]], **settings: Any) -> Any:
    data = DataRecipe.model_validate({"sources": sources, **settings})
    return SimpleNamespace(data=data, resolve_path=Path)


def answers(dataset: Any) -> list[str]:
    return [
        TOKENIZER.decode([t for t in row["labels"] if t != -100])[: -len("!<|im_end|>")] for row in dataset
    ]


def test_one_source_gives_each_row_once_in_a_seeded_order(tmp_path: Path) -> None:
    path = str(write_jsonl(tmp_path / "a.jsonl", rows("a", 20)))
    built = [build_datasets(recipe([{"path": path}], seed=seed), TOKENIZER) for seed in (0, 0, 1)]
    (first, validation, report), (again, _, _), (other, _, _) = built
    assert validation is None
    assert first.column_names == ["input_ids", "labels"]
    assert sorted(answers(first)) == sorted(f"a{i}" for i in range(20))
    assert answers(first) == answers(again) != answers(other)
    assert (report.train_examples, report.train_rows, report.validation_examples) == (20, 20, 0)
    assert report.train_tokens == sum(len(ids) for ids in first["input_ids"])
    assert report.learnt_tokens == sum(len(answer) + 2 for answer in answers(first))


def test_validation_rows_never_train(tmp_path: Path) -> None:
    path = str(write_jsonl(tmp_path / "a.jsonl", rows("a", 20)))
    train, validation, report = build_datasets(recipe([{"path": path}], validation_fraction=0.25), TOKENIZER)
    assert validation is not None
    assert (len(train), len(validation), report.validation_examples) == (15, 5, 5)
    assert not set(answers(train)) & set(answers(validation))


def test_a_validation_source_is_used_whole(tmp_path: Path) -> None:
    a, b = (str(write_jsonl(tmp_path / f"{name}.jsonl", rows(name, 6))) for name in "ab")
    train, validation, report = build_datasets(recipe([{"path": a}], validation={"path": b}), TOKENIZER)
    assert validation is not None
    assert answers(validation) == [f"b{i}" for i in range(6)]
    assert len(train) == 6
    assert [(s.read, s.used) for s in report.sources] == [(6, 6), (6, 6)]


def test_without_weights_every_example_is_used_once(tmp_path: Path) -> None:
    a, b = (str(write_jsonl(tmp_path / f"{n}.jsonl", rows(n, number))) for n, number in (("a", 17), ("b", 3)))
    train, _, report = build_datasets(recipe([{"path": a}, {"path": b}]), TOKENIZER)
    assert [s.used for s in report.sources] == [17, 3]
    assert len(set(answers(train))) == len(train) == 20


def test_one_weight_asks_for_all(tmp_path: Path) -> None:
    a, b = (str(write_jsonl(tmp_path / f"{name}.jsonl", rows(name, 3))) for name in "ab")
    with pytest.raises(ValueError, match=r"sources\.1 has no weight, others have: give all of them one"):
        DataRecipe.model_validate({"sources": [{"path": a, "weight": 2.0}, {"path": b}]})


def test_fields_not_used_are_said(tmp_path: Path) -> None:
    path = str(write_jsonl(tmp_path / "a.jsonl", [row | {"topic": "x"} for row in rows("a", 3)]))
    _, _, report = build_datasets(recipe([{"path": path}]), TOKENIZER)
    assert report.summary().endswith("a.jsonl: 3 read, 3 used; fields not used: topic")


def test_weights_are_shares_of_an_epoch(tmp_path: Path) -> None:
    a, b = (str(write_jsonl(tmp_path / f"{name}.jsonl", rows(name, 10))) for name in "ab")
    sources = [{"path": a, "weight": 3.0}, {"path": b, "weight": 1.0}]
    train, _, report = build_datasets(recipe(sources), TOKENIZER)
    found = answers(train)
    assert [s.used for s in report.sources] == [15, 5]
    assert sum(answer[0] == "a" for answer in found) == 15
    # The whole of a once, five of its rows twice; no row of b twice.
    assert len({answer for answer in found if answer[0] == "a"}) == 10
    assert len({answer for answer in found if answer[0] == "b"}) == 5


@given(st.lists(st.tuples(st.integers(1, 1000), st.floats(0.01, 100)), min_size=1, max_size=5))
def test_mixture_counts_add_up_and_keep_shares(sources: list[tuple[int, float]]) -> None:
    sizes, weights = zip(*sources, strict=True)
    counts = mixture_counts(sizes, weights)
    shares = [sum(sizes) * weight / sum(weights) for weight in weights]
    assert all(count == 1 or abs(count - share) <= 1 for count, share in zip(counts, shares, strict=True))
    assert 0 <= sum(counts) - sum(sizes) < len(sizes)


def test_packing_keeps_examples_whole_and_apart(tmp_path: Path) -> None:
    path = str(write_jsonl(tmp_path / "a.jsonl", rows("a", 10)))
    plain, _, _ = build_datasets(recipe([{"path": path}], max_length=64), TOKENIZER)
    packed, _, report = build_datasets(recipe([{"path": path}], max_length=64, packing=True), TOKENIZER)
    assert (report.train_examples, report.train_rows) == (10, 5)
    assert [sum(lengths) for lengths in packed["seq_lengths"]] == [len(ids) for ids in packed["input_ids"]]
    pieces = [row["input_ids"][s : s + n] for row in packed for s, n in starts(row["seq_lengths"])]
    assert sorted(pieces) == sorted(plain["input_ids"])
    batch = DataCollatorForLanguageModeling(pad_token_id=256, padding_free=True)([packed[0]])
    assert "attention_mask" not in batch
    lengths = packed[0]["seq_lengths"]
    assert batch["position_ids"][0].tolist() == [position for n in lengths for position in range(n)]
    assert batch["labels"].shape == batch["input_ids"].shape


def starts(lengths: list[int]) -> list[tuple[int, int]]:
    return [(sum(lengths[:i]), n) for i, n in enumerate(lengths)]


def test_rows_that_keep_nothing_to_learn_are_counted(tmp_path: Path) -> None:
    long = {"prompt": "x" * 60, "completion": "y"}
    middling = {"prompt": "x" * 10, "completion": "y" * 60}
    path = str(write_jsonl(tmp_path / "a.jsonl", [*rows("a", 3), long, middling]))
    train, _, report = build_datasets(recipe([{"path": path}], max_length=60), TOKENIZER)
    assert len(train) == 4
    assert (report.sources[0].read, report.sources[0].dropped, report.sources[0].cut) == (5, 1, 1)
    assert report.longest == 60
    assert "1 dropped (cut to max_length, no token was left to learn)" in report.summary()
    assert report.to_dict()["sources"][0]["dropped"] == 1


def test_all_rows_too_long_is_an_error(tmp_path: Path) -> None:
    path = str(write_jsonl(tmp_path / "a.jsonl", rows("a", 3)))
    with pytest.raises(
        UserError, match=r"a\.jsonl: none of the 3 examples keeps a token .* data\.max_length = 8"
    ):
        build_datasets(recipe([{"path": path}], max_length=8), TOKENIZER)


def test_a_split_with_an_empty_side_is_an_error(tmp_path: Path) -> None:
    path = str(write_jsonl(tmp_path / "a.jsonl", rows("a", 3)))
    with pytest.raises(UserError, match=r"validation_fraction is 0\.1, but .*a\.jsonl has 3 examples"):
        build_datasets(recipe([{"path": path}], validation_fraction=0.1), TOKENIZER)


def test_shown_examples_mark_what_is_learnt(tmp_path: Path) -> None:
    path = str(write_jsonl(tmp_path / "a.jsonl", [{"prompt": "Hi", "completion": "Yo"}]))
    train, _, _ = build_datasets(recipe([{"path": path}]), TOKENIZER)
    assert show_examples(train, TOKENIZER, 5).split("\n") == [
        "example 1: 24 tokens, 3 learnt",
        "  prompt  <|im_start|>|u|s|e|r|\\n|H|i|<|im_end|>|\\n|<|im_start|>|a|s|s|i|s|t|a|n|t|\\n",
        "  learnt  Y|o|<|im_end|>",
    ]
