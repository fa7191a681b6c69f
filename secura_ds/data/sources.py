"""Reading a source: JSONL, JSON or Parquet files, or a hub data set, in four formats of rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from datasets import load_dataset

from secura_ds.errors import UserError, first_line, shown
from secura_ds.reading import read_json, read_rows
from secura_ds.recipe import Source

ROLES = ("system", "user", "assistant", "tool")
FORMATS = {
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
    "text": ("text",),
}
OPTIONAL = {
    "messages": (),
    "prompt_completion": ("system",),
    "instruction": ("input", "system"),
    "text": (),
}
SUFFIXES = (".jsonl", ".json", ".parquet")


@dataclass(frozen=True)
class Example:
    """One thing to learn: a conversation (`pair` for a prompt and its completion), or plain text.

    `where` is its place for error messages: `file:line`, or `name row N`.
    """

    where: str
    messages: tuple[dict[str, Any], ...] = ()
    text: str | None = None

    @property
    def is_pair(self) -> bool:
        """True for one prompt and one completion, which need no chat template."""
        return [message["role"] for message in self.messages] == ["user", "assistant"]


@dataclass(frozen=True)
class Loaded:
    """A source's examples, in order, and the fields of its rows that are no part of them."""

    examples: list[Example]
    unused: list[str]

    def fingerprint(self) -> str:
        """SHA-256 of what the examples say, wherever they lie and however they will be rendered."""
        said = hashlib.sha256()
        for example in self.examples:
            said.update(json.dumps([example.text, example.messages], sort_keys=True).encode())
        return said.hexdigest()


def load_examples(source: Source, resolve_path: Callable[[str], Path] = Path) -> list[Example]:
    """The examples of `load_source`."""
    return load_source(source, resolve_path).examples


def load_source(source: Source, resolve_path: Callable[[str], Path] = Path) -> Loaded:
    """Read a source's rows.

    Args:
        resolve_path: turns `source.path` into a place on disk (`recipe.resolve_path`).

    Raises:
        UserError: the source is missing, empty or malformed, or a row fits no format; names the place.
    """
    rows = _hub_rows(source) if source.path is None else _file_rows(resolve_path(source.path))
    rows = rows[: source.max_examples]
    name = _format_of(source, rows[0])
    fields = dict.fromkeys(key for _, row in rows for key, value in row.items() if value is not None)
    return Loaded(
        [_example(row, name, where) for where, row in rows],
        [key for key in fields if key not in (*FORMATS[name], *OPTIONAL[name])],
    )


Rows = Sequence[tuple[str, Mapping[str, Any]]]


def _file_rows(path: Path) -> Rows:
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path}: files end in {', '.join(SUFFIXES)}, this one in {path.suffix or 'nothing'}")
    if path.suffix == ".jsonl":
        return read_rows(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; check the path")
    found = _json_rows(path) if path.suffix == ".json" else _parquet_rows(path)
    if not found:
        raise UserError(f"{path}: the file has no rows")
    return [(f"{path} row {number}", row) for number, row in enumerate(found, start=1)]


def _json_rows(path: Path) -> list[dict[str, Any]]:
    rows = read_json(path)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path}: expected a JSON list of objects; or put one object a line in a .jsonl file")
    return rows


def _parquet_rows(path: Path) -> list[dict[str, Any]]:
    try:
        # Not `read_table`, which makes columns of folders that are called `key=value`.
        with pyarrow.parquet.ParquetFile(path) as file:
            rows: list[dict[str, Any]] = file.read().to_pylist()
    except Exception as error:  # of a damaged file pyarrow raises several types, Python others for its values
        raise UserError(
            f"{path}: not a Parquet file, or a damaged one ({shown(first_line(error))}); copy it again"
        ) from error
    return rows


def _hub_rows(source: Source) -> Rows:
    assert source.hub is not None, "the recipe's schema asks for exactly one of path and hub"
    split = source.split or "train"
    try:
        dataset = load_dataset(source.hub, source.subset, split=split)
    except Exception as error:  # the hub client raises a dozen unrelated types; all mean the same to a user
        raise UserError(
            f"the hub data set {source.hub} (subset {source.subset}, split {split}) cannot be loaded: "
            f"{first_line(error)}"
        ) from error
    rows = dataset.select(range(min(len(dataset), source.max_examples or len(dataset)))).to_list()
    if not rows:
        raise UserError(f"the hub data set {source.hub} (split {split}) has no rows")
    return [(f"{source.hub} row {number}", row) for number, row in enumerate(rows, start=1)]


def _format_of(source: Source, first: tuple[str, Mapping[str, Any]]) -> str:
    if source.format != "auto":
        return source.format
    where, row = first
    for name, needed in FORMATS.items():
        if all(key in row for key in needed):
            return name
    raise _wrong_fields(where, row, "auto")


def _wrong_fields(where: str, row: Mapping[str, Any], name: str) -> UserError:
    allowed = {key: fields for key, fields in FORMATS.items() if name in ("auto", key)}
    wanted = "; ".join(f"{key} ({', '.join(fields)})" for key, fields in allowed.items())
    found = shown(", ".join(map(str, row))) or "none"
    return UserError(f"{where}: fields found: {found}; allowed: {wanted}; rename the fields, or set `format`")


def _example(row: Mapping[str, Any], name: str, where: str) -> Example:
    for key in FORMATS[name]:
        if key not in row:
            raise _wrong_fields(where, row, name)
        if row[key] is None:
            raise UserError(f"{where}: {key} is null; fill it in or remove the row")
    if name == "messages":
        return Example(where, messages=_messages(row["messages"], where))
    if name == "text":
        return Example(where, text=_string(row, "text", where))
    if name == "prompt_completion":
        prompt, completion = (_string(row, key, where) for key in ("prompt", "completion"))
    else:
        prompt, completion = (_string(row, key, where) for key in ("instruction", "output"))
        if row.get("input"):
            prompt = f"{prompt}\n\n{_string(row, 'input', where)}"
    turns = [("user", prompt), ("assistant", completion)]
    if row.get("system"):
        turns.insert(0, ("system", _string(row, "system", where)))
    return Example(where, messages=tuple({"role": role, "content": content} for role, content in turns))


def _string(row: Mapping[str, Any], key: str, where: str) -> str:
    if not isinstance(row[key], str):
        raise UserError(f"{where}: {key} should be a string, found {type(row[key]).__name__}")
    if not row[key].strip():
        raise UserError(f"{where}: {key} is empty; fill it in or remove the row")
    return str(row[key])


def _messages(messages: Any, where: str) -> tuple[dict[str, Any], ...]:
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: messages should be a list of {{role, content}} objects and not empty")
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise UserError(
                f"{where}: messages[{index}] should be an object with role and content, both strings"
            )
        if message.get("role") not in ROLES:
            given = shown(repr(message.get("role")))
            raise UserError(f"{where}: messages[{index}].role is {given}; allowed: {', '.join(ROLES)}")
        if message.get("tool_calls"):
            raise UserError(
                f"{where}: messages[{index}] has tool_calls, which would be left out: write the call into "
                "its content, as the model is to write it"
            )
        if message["role"] == "assistant" and not message["content"].strip():
            raise UserError(f"{where}: messages[{index}].content is empty; fill it in or remove the row")
    if all(message["role"] != "assistant" for message in messages):
        raise UserError(f"{where}: messages has no assistant turn, so there is nothing to learn")
    return tuple({"role": message["role"], "content": message["content"]} for message in messages)
