"""Spoiled data files: each is read, or refused in one line that names the file; nothing is left behind."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from evaluation_toys import byte_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutations import ODD_VALUES, as_json, spoiled_bytes, spoiled_values

from secura_ds.data import build_datasets
from secura_ds.errors import UserError, printable
from secura_ds.recipe import DataRecipe

TOKENIZER = byte_tokenizer()
LONGEST = 10.0  # seconds
COUNTED: Counter[str] = Counter()
TURNS = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
ROWS: tuple[list[dict[str, Any]], ...] = (
    [{"prompt": f"add {i}", "completion": f"sum {i}"} for i in range(4)],
    [
        {"messages": [{"role": "system", "content": "be brief"}, *TURNS]},
        {"messages": TURNS},
        {"messages": TURNS},
    ],
    [{"instruction": f"say {i}", "input": "" if i else "x", "output": str(i)} for i in range(3)],
    [{"text": f"some text {i}"} for i in range(3)],
)


def fuzz(examples: int) -> Any:
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


def check(folder: Path, suffix: str, content: bytes, format_: str = "auto") -> None:
    """Build data sets from one file as a run does."""
    path = folder / f"rows{suffix}"
    path.write_bytes(content)
    source = {"path": str(path), "format": format_}
    data = DataRecipe.model_validate({"sources": [source], "max_length": 256})
    began = time.monotonic()
    try:
        rows, _, report = build_datasets(SimpleNamespace(data=data, resolve_path=Path), TOKENIZER)
        assert report.train_examples == len(rows) > 0
        COUNTED["accepted"] += 1
    except UserError as error:
        said = printable(str(error))
        assert str(path) in said and said.isprintable() and len(said) < 2000
        COUNTED["refused"] += 1
    assert time.monotonic() - began < LONGEST
    assert list(folder.iterdir()) == [path]
    path.unlink()


FORMATS = st.sampled_from(["auto"] * 12 + ["messages", "prompt_completion", "instruction", "text"])
SHIPPED = st.sampled_from(ROWS)


def as_lines(rows: Any) -> bytes:
    return b"".join(as_json(row) + b"\n" for row in rows) if isinstance(rows, list) else as_json(rows)


@fuzz(350)
@given(data=st.data())
def test_spoiled_lines(folder: Path, data: st.DataObject) -> None:
    check(folder, ".jsonl", data.draw(spoiled_bytes(as_lines(data.draw(SHIPPED)))), data.draw(FORMATS))


@fuzz(300)
@given(data=st.data())
def test_spoiled_rows(folder: Path, data: st.DataObject) -> None:
    check(folder, ".jsonl", as_lines(data.draw(spoiled_values(data.draw(SHIPPED)))), data.draw(FORMATS))


@fuzz(150)
@given(data=st.data())
def test_spoiled_json(folder: Path, data: st.DataObject) -> None:
    rows = data.draw(SHIPPED)
    content = st.one_of(spoiled_bytes(as_json(rows)), spoiled_values(rows).map(as_json))
    check(folder, ".json", data.draw(content))


def as_parquet(rows: Any) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return bytes(sink.getvalue())


@fuzz(150)
@given(data=st.data())
def test_spoiled_parquet(folder: Path, data: st.DataObject) -> None:
    check(folder, ".parquet", data.draw(spoiled_bytes(as_parquet(data.draw(SHIPPED)))))


COLUMNS = st.sampled_from(
    ["prompt", "completion", "messages", "text", "instruction", "output", "input", "role"]
)
CELLS = st.sampled_from(
    [value for value in ODD_VALUES if not isinstance(value, float | int) or abs(value) < 2**60]
)


@fuzz(100)
@given(table=st.dictionaries(COLUMNS, CELLS, min_size=1), rows=st.integers(0, 3))
def test_odd_columns_of_parquet(folder: Path, table: dict[str, Any], rows: int) -> None:
    try:
        content = as_parquet([table] * rows)
    except (pyarrow.ArrowException, UnicodeEncodeError, TypeError):
        return  # no Parquet file can hold it
    check(folder, ".parquet", content)


@pytest.mark.parametrize(
    "line", ["[" * 3000, '{"text": ' + "9" * 5000 + "}", '{"text": "\\ud800"}', "\ufeff{}"]
)
def test_lines_that_python_trips_over(folder: Path, line: str) -> None:
    check(folder, ".jsonl", (line + "\n").encode() + json.dumps({"text": "x"}).encode())


def test_enough_was_tried() -> None:
    assert COUNTED.total() >= 1000
    assert COUNTED["refused"] > 300 and COUNTED["accepted"] > 100, COUNTED
