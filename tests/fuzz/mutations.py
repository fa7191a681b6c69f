"""Ways to spoil a JSON document, as text and as a structure, for hypothesis to choose from."""

from __future__ import annotations

import copy
import json
from typing import Any

from hypothesis import strategies as st

ODD_TEXTS = (
    "", " ", "\x00", "../../etc/passwd", "~/x", "/", "a/b", "a\nb", "é\u202e", "\ud800", "null", "NaN",
    "x" * 5000,
    "{{ 7 * 7 }}", "$(true)", "%s%n", "--set", "C:\\x", "a.b=c", "data:,x", "http://user:pass@host/x", "-1",
)  # fmt: skip
ODD_NUMBERS = (
    0, -1, 1, 2, 3.5, -0.0, 1e-300, 1e308, float("inf"), float("-inf"), float("nan"), 2**31, 2**63, 2**64,
    10**400,
)  # fmt: skip
ODD_VALUES: tuple[Any, ...] = (
    None, True, False, [], {}, [None], [[]], {"": ""}, [1, "a", None], {"path": "x"}, *ODD_NUMBERS,
    *ODD_TEXTS,
)  # fmt: skip
ODD_BYTES = (
    b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"{", b"}", b"[", b"]", b'"', b",", b":", b"\\u", b"\\ud800",
    b"1e999",
    b"NaN", b"-", b"\n", b"\r\n", b"//", b"[" * 3000, b'{"a":' * 3000, b"9" * 5000,
)  # fmt: skip


@st.composite
def spoiled_bytes(draw: st.DrawFn, text: bytes) -> bytes:
    """The text with one or two places cut, flipped, doubled or filled with something odd."""
    for _ in range(draw(st.integers(1, 2))):
        place = draw(st.integers(0, max(0, len(text) - 1)))
        length = draw(st.integers(1, 40))
        way = draw(st.sampled_from(["cut off", "remove", "flip", "insert", "double", "append"]))
        if way == "cut off":
            text = text[:place]
        elif way == "remove":
            text = text[:place] + text[place + length :]
        elif way == "flip" and text:
            text = text[:place] + bytes([text[place] ^ (1 << draw(st.integers(0, 7)))]) + text[place + 1 :]
        elif way == "double":
            text = text[: place + length] + text[place:]
        else:
            odd = draw(st.sampled_from(ODD_BYTES))
            text = text + odd if way == "append" else text[:place] + odd + text[place:]
    return text


@st.composite
def spoiled_values(draw: st.DrawFn, document: Any) -> Any:
    """The document with one or two of its values replaced, removed, renamed, doubled or wrapped."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 2))):
        places = list(_places(document))
        if not places:
            break
        holder, key = draw(st.sampled_from(places))
        way = draw(st.sampled_from(["odd", "odd", "odd", "remove", "rename", "wrap", "exchange", "add"]))
        if way == "odd":
            holder[key] = copy.deepcopy(draw(st.sampled_from(ODD_VALUES)))
        elif way == "remove":
            del holder[key]
        elif way == "wrap":
            holder[key] = draw(st.sampled_from([[holder[key]], {"value": holder[key]}, [holder[key]] * 2]))
        elif way == "exchange":
            other, name = draw(st.sampled_from(places))
            holder[key] = copy.deepcopy(other.get(name) if isinstance(other, dict) else other[name])
        elif isinstance(holder, dict):
            name = draw(st.sampled_from([f"{key}s", f"{key}"[:-1], str(key).upper(), *ODD_TEXTS[:6]]))
            holder[name] = (
                holder.pop(key) if way == "rename" else copy.deepcopy(draw(st.sampled_from(ODD_VALUES)))
            )
    return document


def as_json(document: Any) -> bytes:
    """As a careless program writes it: numbers that JSON has not, and lone surrogates, included."""
    return json.dumps(document, ensure_ascii=False).encode("utf-8", "surrogatepass")


def _places(value: Any) -> Any:
    """Every (object or list, key) in a document."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from _places(value[key])
