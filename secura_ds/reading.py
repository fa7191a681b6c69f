"""Reading text and JSON that users write or are given: whatever is wrong with it is said in one line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from secura_ds.errors import UserError, shown

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class NotJson(UserError):
    """The text is no JSON at all."""


def read_text(path: Path) -> str:
    """A UTF-8 text file, without the byte order mark that some editors put first.

    Raises:
        UserError: there is no such file, it may not be read, or it is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason}); save the file as UTF-8") from error
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{path}: no such file; check the path") from error
    except (OSError, ValueError) as error:  # a folder, no permission, a name that no file can have
        raise UserError(f"{shown(path)}: cannot be read ({shown(error)}); check the path") from error


def read_json(path: Path, *, remedy: str = "mend the file", unique_keys: bool = False) -> Any:
    """The value in a JSON file; `parse_json` says what is refused."""
    return parse_json(read_text(path), str(path), remedy=remedy, unique_keys=unique_keys)


def read_json_object(
    path: Path, *, remedy: str = "mend the file", unique_keys: bool = False
) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: as `parse_json`, or the file holds something else than an object.
    """
    value = read_json(path, remedy=remedy, unique_keys=unique_keys)
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(value).__name__}; {remedy}")
    return value


def read_rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Rows of a JSON-lines file, each with its place, `file:line`; empty lines are skipped.

    Raises:
        UserError: the file is missing or empty, or a line is not a JSON object; names file and line.
    """
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            where = f"{path}:{number}"
            row = parse_json(line, where, remedy="mend that line")
            if not isinstance(row, dict):
                raise UserError(
                    f"{where}: expected a JSON object, found {type(row).__name__}; mend that line"
                )
            rows.append((where, row))
    if not rows:
        raise UserError(f"{path}: the file has no rows; put one JSON object on each line")
    return rows


def parse_json(text: str, where: str, *, remedy: str, unique_keys: bool = False) -> Any:
    """The value of a JSON text.

    Args:
        where: the place for error messages; the line is added to it if the text has several.
        remedy: what is to be done about it.
        unique_keys: refuse an object that gives a key twice, of which Python would take the last.

    Raises:
        NotJson: it is none.
        UserError: it is nested too deeply, has a number too long to read, gives a key twice, or
            holds half of a surrogate pair, which no UTF-8 file can hold.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique_keys if unique_keys else None)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        place = f"{where}:{error.lineno}" if "\n" in text else where
        raise NotJson(f"{place}: not JSON ({error.msg}, column {error.colno}); {remedy}") from error
    except RecursionError as error:
        raise UserError(f"{where}: objects or lists are nested too deeply to be read; {remedy}") from error
    except KeyError as error:
        key = shown(repr(error.args[0]))
        raise UserError(f"{where}: the key {key} is given twice in one object; keep one") from error
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        raise UserError(f"{where}: {half} is half of a character (a lone surrogate); {remedy}") from error
    except ValueError as error:  # Python's limit of digits
        raise UserError(f"{where}: a number is too long to be read ({shown(error)}); {remedy}") from error
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise KeyError(next(key for key in keys if keys.count(key) > 1))
    return values
