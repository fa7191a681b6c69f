from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from evaluation_toys import write_jsonl

from secura_ds.data import load_examples
from secura_ds.data.sources import load_source
from secura_ds.errors import UserError
from secura_ds.recipe import Source

PAIR = {"prompt": "2+2", "completion": "4"}


def source(path: Path, **settings: Any) -> Source:
    return Source(path=str(path), **settings)


@pytest.mark.parametrize(
    ("row", "contents"),
    [
        (PAIR, ["2+2", "4"]),
        ({"instruction": "Add.", "input": "2 2", "output": "4"}, ["Add.\n\n2 2", "4"]),
        ({"instruction": "Say four.", "input": "", "output": "4"}, ["Say four.", "4"]),
        ({"instruction": "Say four.", "output": "4"}, ["Say four.", "4"]),
        (PAIR | {"system": "Be brief."}, ["Be brief.", "2+2", "4"]),
        ({"instruction": "Four?", "output": "4", "system": ""}, ["Four?", "4"]),
        (
            {"messages": [{"role": "system", "content": "s"}, {"role": "assistant", "content": "a"}]},
            ["s", "a"],
        ),
    ],
)
def test_every_format_is_told_by_its_keys(tmp_path: Path, row: dict[str, Any], contents: list[str]) -> None:
    (example,) = load_examples(source(write_jsonl(tmp_path / "rows.jsonl", [row])))
    assert [message["content"] for message in example.messages] == contents
    assert example.text is None


def test_plain_text(tmp_path: Path) -> None:
    (example,) = load_examples(source(write_jsonl(tmp_path / "rows.jsonl", [{"text": "Once."}])))
    assert (example.text, example.messages) == ("Once.", ())


def test_fields_of_which_nothing_is_made_are_named(tmp_path: Path) -> None:
    rows = [PAIR | {"id": 1, "input": "x", "system": "s"}, PAIR | {"id": 2, "note": None, "score": 3}]
    assert load_source(source(write_jsonl(tmp_path / "rows.jsonl", rows))).unused == ["id", "input", "score"]
    text = load_source(source(write_jsonl(tmp_path / "text.jsonl", [{"text": "Once.", "system": "s"}])))
    assert text.unused == ["system"]


def test_a_fingerprint_is_of_what_is_said(tmp_path: Path) -> None:
    def fingerprint(name: str, *rows: dict[str, Any]) -> str:
        return load_source(source(write_jsonl(tmp_path / name, rows))).fingerprint()

    other = {"prompt": "2+3", "completion": "5"}
    first = fingerprint("a.jsonl", PAIR, other)
    assert first == fingerprint("b.jsonl", PAIR | {"id": 4}, other)
    changed = [[other, PAIR], [PAIR], [PAIR, PAIR], [PAIR, other | {"completion": "6"}]]
    assert len({first, *(fingerprint("c.jsonl", *rows) for rows in changed)}) == 5
    assert fingerprint("d.jsonl", {"text": "a"}) != fingerprint("e.jsonl", {"text": "b"})


def test_jsonl_json_and_parquet_give_the_same_examples(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}+1", "completion": str(i + 1)} for i in range(5)]
    write_jsonl(tmp_path / "a.jsonl", rows)
    (tmp_path / "a.json").write_text(json.dumps(rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    loaded = [load_examples(source(tmp_path / f"a.{suffix}")) for suffix in ("jsonl", "json", "parquet")]
    messages = [[example.messages for example in examples] for examples in loaded]
    assert messages[0] == messages[1] == messages[2]
    assert len(messages[0]) == 5
    assert [len(load_examples(source(tmp_path / "a.json", max_examples=n))) for n in (2, 9)] == [2, 5]


def test_lines_are_counted_with_the_blank_ones(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(PAIR)}\n\n{json.dumps({'prompt': '1'})}\n")
    with pytest.raises(UserError, match=r"rows\.jsonl:3: fields found: prompt; allowed: prompt_completion"):
        load_examples(source(path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", r"a\.jsonl: the file has no rows"),
        ("a.jsonl", '{"prompt": "a", "completion": "b"}\n{"prompt": \n', r"a\.jsonl:2: not JSON"),
        ("a.jsonl", "[1]\n", r"a\.jsonl:1: expected a JSON object"),
        ("a.json", "[]", r"a\.json: the file has no rows"),
        ("a.json", '[\n{"a": 1},\n', r"a\.json:3: not JSON"),
        ("a.json", '{"a": 1}', r"a\.json: expected a JSON list of objects"),
        ("a.parquet", "no table", r"a\.parquet: not a Parquet file"),
        ("a.csv", "a,b", r"a\.csv: files end in \.jsonl, \.json, \.parquet"),
    ],
)
def test_bad_files_name_the_place(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        load_examples(source(tmp_path / name))


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        (
            {"question": "a", "reply": "b"},
            {},
            r":1: fields found: question, reply; allowed: messages \(messages\); prompt_completion \(prompt, "
            r"completion\); instruction \(instruction, output\); text \(text\)",
        ),
        (PAIR, {"format": "text"}, r":1: fields found: prompt, completion; allowed: text \(text\)"),
        ({"prompt": "a", "completion": 4}, {}, r":1: completion should be a string, found int"),
        ({"prompt": "a", "completion": " "}, {}, r":1: completion is empty"),
        ({"prompt": "a", "completion": None}, {}, r":1: completion is null; fill it in or remove the row"),
        ({"messages": []}, {}, r":1: messages should be a list"),
        (
            {"messages": [{"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}]},
            {},
            r":1: messages\[0\] has tool_calls, which would be left out",
        ),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}]},
            {},
            r":1: messages\[1\]\.content is empty; fill it in",
        ),
        (
            {"messages": [{"role": "bot", "content": "a"}]},
            {},
            r"messages\[0\]\.role is 'bot'; allowed: system",
        ),
        (
            {"messages": [{"role": "user", "content": None}]},
            {},
            r"messages\[0\] should be an object with role",
        ),
        (
            {"messages": [{"role": "user", "content": "a"}]},
            {},
            r"no assistant turn, so there is nothing to learn",
        ),
    ],
)
def test_bad_rows_name_the_line_and_what_is_allowed(
    tmp_path: Path, row: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [row])
    with pytest.raises(UserError, match=message):
        load_examples(source(path, **settings))


def test_a_hub_data_set_that_cannot_be_loaded_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route\nmore")

    monkeypatch.setattr("secura_ds.data.sources.load_dataset", refuse)
    with pytest.raises(UserError, match=r"me/set \(subset None, split train\) cannot be loaded: no route$"):
        load_examples(Source(hub="me/set"))


def test_a_hub_data_set_is_read_by_name_subset_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import Dataset

    asked: list[Any] = []

    def load(name: str, subset: str | None, split: str) -> Dataset:
        asked.append((name, subset, split))
        return Dataset.from_list([PAIR, PAIR, PAIR])

    monkeypatch.setattr("secura_ds.data.sources.load_dataset", load)
    examples = load_examples(Source(hub="me/set", subset="en", split="test", max_examples=2))
    assert asked == [("me/set", "en", "test")]
    assert [example.where for example in examples] == ["me/set row 1", "me/set row 2"]
