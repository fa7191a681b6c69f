"""Hostile texts and values, and the one way in which hostile input may end: well, or in one clear report."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from secura_ds.errors import UserError

T = TypeVar("T")

SCALARS: list[Any] = [
    *(None, True, False, 0, -0.0, -1, 1, 2**31, 2**63, 2**64, -(2**63), 10**400, 0.5, 1e-320, 1e308, -1e308),
    *(
        float("inf"),
        float("-inf"),
        float("nan"),
        "",
        " ",
        "auto",
        "null",
        "1",
        "nf4",
        "embedded:",
        "(",
        "[",
        "*",
    ),
    *("..", ".", "/", "../..", "embedded:../..", "/dev/zero", "~", "~/x", "~nobody-at-all/x", "x/" * 3000),
    *("a\x00b", "a\nb", "\x1b[31m", "\u202e", "\ud800", "é☃\U0001f600", "x" * 300, "a" * 100_000),
    "https://user:pass@host/x",
]
CHANGES = ["replace", "replace", "twist", "twist", "remove", "rename", "add", "nest"]
WORDS = ["rank", "method", "lora", "model", "path", "cur_rank", "text", "messages", "role", "content", "x"]
PIECES = [
    *(
        b"\x00",
        b"\xff\xfe",
        b"\xef\xbb\xbf",
        b"\xed\xa0\x80",
        b"\xf0\x9f\x98\x80",
        b"\x1b[2J",
        b"\n",
        b"\r\n",
        b"\r",
    ),
    *(
        b"{",
        b"}",
        b"[",
        b"]",
        b'"',
        b"'",
        b"\\",
        b",",
        b":",
        b"//",
        b"\\ud800",
        b"1e999",
        b"NaN",
        b"-0",
        b"-Infinity",
    ),
    *(b"null", b'"a": 1, "a": 2,', b"1" * 5000, b"[" * 100_000, b'{"a":' * 3000),
]

values = st.recursive(
    st.sampled_from(SCALARS) | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(WORDS) | st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=6,
)


def fuzz(examples: int, inputs: st.SearchStrategy[T], check: Callable[[T], object]) -> None:
    """Run `check` on that many inputs: the same ones whenever the same modules are loaded."""
    count = 0

    @settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(inputs)
    def check_all(value: T) -> None:
        nonlocal count
        count += 1
        check(value)

    check_all()
    assert count >= examples, count


@st.composite
def broken_bytes(draw: st.DrawFn, text: bytes) -> bytes:
    """`text` cut, overwritten, filled in or repeated in up to four places."""
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(text)) | st.sampled_from([0, *_token_starts(text)]))
        length = draw(st.integers(0, 12))
        change = draw(st.sampled_from(["cut", "end", "flip", "insert", "insert", "swap", "repeat"]))
        if change == "cut":
            text = text[:place] + text[place + length :]
        elif change == "end":
            text = text[:place]
        elif change == "flip":
            flipped = bytes(byte ^ draw(st.integers(1, 255)) for byte in text[place : place + 2])
            text = text[:place] + flipped + text[place + 2 :]
        elif change == "repeat":
            text = text[:place] + text[max(0, place - 40) :]
        else:
            piece = draw(st.sampled_from(PIECES) | st.binary(max_size=8))
            text = text[:place] + piece + text[place + (length if change == "swap" else 0) :]
    return text


def _token_starts(text: bytes) -> list[int]:
    """Where a JSON text has a value or a key: what is put there is seldom inside a string."""
    return [match.end() for match in re.finditer(rb"[\[{:,]\s*", text)]


@st.composite
def broken_value(draw: st.DrawFn, value: Any) -> Any:
    """A deep copy of `value` in which up to three parts are replaced, removed, renamed, doubled or added."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        holder, key = draw(st.sampled_from([*_parts(value)] or [([value], 0)]))
        change = draw(
            st.sampled_from(["replace", "replace", "twist", "twist", "remove", "rename", "add", "nest"])
        )
        if change == "remove":
            del holder[key]
        elif change == "twist":
            holder[key] = draw(_of_the_same_type(holder[key]))
        elif change == "nest":
            holder[key] = draw(st.sampled_from([[holder[key]], {"x": holder[key]}, [holder[key]] * 3]))
        elif change in ("rename", "add") and isinstance(holder, dict):
            name = draw(
                st.sampled_from(WORDS) | st.text(max_size=8) | st.sampled_from(["\ud800", "k" * 9999])
            )
            holder[name] = holder.pop(key) if change == "rename" else draw(values)
        else:
            holder[key] = draw(values)
    return value


def _of_the_same_type(value: Any) -> st.SearchStrategy[Any]:
    if isinstance(value, bool):
        return st.booleans()
    if isinstance(value, int):
        return st.sampled_from([1, 2, 3, 7, 96, 4096, 2**31 - 1]) | st.integers(-1, 2**33)
    if isinstance(value, float):
        return st.sampled_from([1e-300, 1e-4, 0.5, 1.0, 1e300]) | st.floats()
    return st.just(value)


def _parts(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every part of a JSON value as its holder and its key there."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from _parts(value[key])


def as_json(value: Any) -> bytes:
    """JSON as Python writes it: NaN and lone surrogates (as escapes) included."""
    return json.dumps(value).encode()


def well_or_refused(action: Callable[[], T], *names: str) -> T | None:
    """What `action` returns, None where it refuses its input; any other end fails the test.

    A refusal is a `UserError` of printable lines, none very long, and names each of `names`.
    """
    try:
        return action()
    except UserError as error:
        report = str(error)
        lines = report.split("\n")
        assert all(line.strip() and line.isprintable() and len(line) < 1000 for line in lines), report[:3000]
        assert all(name in line for name in names for line in lines), report[:3000]
        return None


def listing(folder: Path) -> list[str]:
    """Every file and folder below `folder`."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
