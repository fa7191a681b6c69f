"""Broken data files by the thousand: each makes training data, or is refused in one line that names it."""

from __future__ import annotations

import io
import json
import logging
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from calibration_toys import toy_tokenizer
from fuzz_toys import as_json, broken_bytes, broken_value, fuzz, listing, well_or_refused
from hypothesis import strategies as st
from training_toys import write_toy

from secura_ds.data import build_datasets
from secura_ds.errors import UserError
from secura_ds.recipe import Recipe, load_recipe

pytestmark = pytest.mark.long

ran: Counter[str] = Counter()
valid: Counter[str] = Counter()
TOKENIZER = toy_tokenizer()

ROWS: dict[str, list[dict[str, Any]]] = {
    "pair": [{"prompt": f"add {i}", "completion": f"sum {i}", "source": i} for i in range(4)],
    "text": [{"text": f"Once there were {i} of them.", "tags": ["a", None]} for i in range(4)],
    "instruction": [{"instruction": "Add.", "input": f"{i} {i}", "output": str(2 * i)} for i in range(4)],
    "messages": [
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": f"what is {i}?"},
                {"role": "assistant", "content": f"it is {i}"},
                {"role": "user", "content": "sure?"},
                {"role": "assistant", "content": "yes"},
            ]
        }
        for i in range(3)
    ],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_toy(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def _watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing may be left in the folders for temporary files and for caches, either."""
    with pytest.MonkeyPatch.context() as patch:
        places = [tmp_path_factory.mktemp(name) for name in ("temporary", "cache")]
        patch.setattr(tempfile, "tempdir", str(places[0]))
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", places[1])
        logging.getLogger("secura_ds.data").setLevel(logging.ERROR)
        datasets.disable_progress_bars()
        yield
        datasets.enable_progress_bars()
        logging.getLogger("secura_ds.data").setLevel(logging.NOTSET)
        assert [listing(place) for place in places] == [[], []]
    print(f"\ndata files tried: {dict(ran)}, of them valid: {dict(valid)}")


@pytest.fixture(scope="module")
def recipes(folder: Path) -> dict[str, Recipe]:
    """A recipe for each kind of file, so that only the file changes; some pack, some hold rows out."""
    made = {}
    for suffix, options in (
        ("jsonl", ["data.packing=true"]),
        ("json", ["data.validation_fraction=0.3"]),
        ("parquet", []),
    ):
        (folder / f"fuzzed.{suffix}").touch()
        made[suffix] = load_recipe(folder / "recipe.json", [f"data.sources.0.path=fuzzed.{suffix}", *options])
    return made


def _try(recipes: dict[str, Recipe], suffix: str, content: bytes) -> None:
    recipe = recipes[suffix]
    path = Path(recipe.data.sources[0].path or "")
    path.write_bytes(content)
    before = listing(path.parent)
    ran[suffix] += 1
    built = well_or_refused(lambda: build_datasets(recipe, TOKENIZER), path.name)
    assert listing(path.parent) == before
    if built is not None:
        valid[suffix] += 1
        rows, _, report = built
        assert len(rows) == report.train_rows > 0 and report.learnt_tokens > 0


def _lines(rows: list[Any]) -> bytes:
    return b"".join(as_json(row) + b"\n" for row in rows)


samples = st.sampled_from(list(ROWS.values()))
encodings = st.sampled_from(["utf-8", "utf-8", "utf-8-sig", "utf-16", "latin-1"])


@st.composite
def jsonl(draw: st.DrawFn) -> bytes:
    """Rows of JSON, with broken ones and broken text among them."""
    rows = draw(samples)
    if draw(st.booleans()):
        rows = draw(broken_value(rows))
        rows = rows if isinstance(rows, list) else [rows]
    text = _lines(rows)
    if draw(st.booleans()):
        text = draw(broken_bytes(text))
    return text.replace(b"\n", draw(st.sampled_from([b"\n", b"\n", b"\r\n", b"\n\n", b"\r"])))


@st.composite
def json_file(draw: st.DrawFn) -> bytes:
    rows = draw(broken_value(draw(samples)))
    text = json.dumps(rows, indent=draw(st.sampled_from([None, 1])), ensure_ascii=True)
    content = text.encode(draw(encodings), errors="replace")
    return draw(broken_bytes(content)) if draw(st.booleans()) else content


def _parquet(rows: list[dict[str, Any]]) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


TYPES = [
    *(pyarrow.int8(), pyarrow.float16(), pyarrow.bool_(), pyarrow.null(), pyarrow.decimal128(9, 2)),
    *(pyarrow.timestamp("ns", tz="Nowhere/Here"), pyarrow.date64(), pyarrow.duration("s")),
    *(pyarrow.large_string(), pyarrow.binary(), pyarrow.list_(pyarrow.string())),
    *(pyarrow.map_(pyarrow.string(), pyarrow.string()), pyarrow.dictionary(pyarrow.int8(), pyarrow.string())),
]


@st.composite
def parquet(draw: st.DrawFn) -> bytes:
    """A table with other types, other columns or nulls, or a damaged file of a good one."""
    rows = draw(samples)
    if draw(st.booleans()):
        return draw(broken_bytes(_parquet(rows)))
    table = pyarrow.Table.from_pylist(rows)
    column = draw(st.integers(0, table.num_columns - 1))
    name = table.column_names[column]
    change = draw(st.sampled_from(["type", "rename", "double", "drop", "nulls", "bytes", "empty", "value"]))
    if change == "type":
        array = pyarrow.nulls(len(table), draw(st.sampled_from(TYPES)))
        table = table.set_column(column, name, array)
    elif change == "rename":
        new = draw(
            st.sampled_from(["a.b", "", "a\nb", "x" * 500]) | st.text(max_size=5).filter(str.isprintable)
        )
        table = table.rename_columns([new if n == name else n for n in table.column_names])
    elif change == "double":
        table = table.append_column(name, table.column(column))
    elif change == "drop":
        table = table.remove_column(column)
    elif change == "nulls":
        kept = [None if draw(st.booleans()) else value for value in table.column(column).to_pylist()]
        table = table.set_column(column, name, pyarrow.array(kept, table.schema.field(column).type))
    elif change == "bytes":  # strings that are not UTF-8
        raw = pyarrow.array([b"\xff\xfe" + bytes([i]) for i in range(len(table))], pyarrow.binary())
        table = table.set_column(column, name, raw.view(pyarrow.string()))
    elif change == "empty":
        table = table.slice(0, 0)
    else:
        texts = draw(st.lists(st.text(max_size=10), min_size=len(table), max_size=len(table)))
        usable = [text.encode(errors="replace").decode() for text in texts]
        table = table.set_column(column, name, pyarrow.array(usable))
    file = io.BytesIO()
    pyarrow.parquet.write_table(table, file)
    return file.getvalue()


def test_broken_lines(recipes: dict[str, Recipe]) -> None:
    fuzz(1200, jsonl(), lambda content: _try(recipes, "jsonl", content))
    assert valid["jsonl"] >= 50


def test_broken_json(recipes: dict[str, Recipe]) -> None:
    fuzz(600, json_file(), lambda content: _try(recipes, "json", content))
    assert valid["json"] >= 20


def test_broken_parquet(recipes: dict[str, Recipe]) -> None:
    fuzz(600, parquet(), lambda content: _try(recipes, "parquet", content))
    assert valid["parquet"] >= 20


@pytest.mark.parametrize(
    ("suffix", "content", "words"),
    [
        ("jsonl", b'{"text": "a"}\n' + b"[" * 100_000, r"fuzzed\.jsonl:2: .* nested too deeply"),
        ("jsonl", b'{"text": "a", "n": ' + b"1" * 5000 + b"}", r"fuzzed\.jsonl:1: a number is too long"),
        ("jsonl", b'\n{"text": "\\ud800"}\n', r"fuzzed\.jsonl:2: '\\ud800' is half of a character"),
        ("json", b'[{"text": "\\ud800"}]', r"fuzzed\.json: '\\ud800' is half of a character"),
        ("jsonl", b'{"' + b"k" * 5000 + b'": 1}', r"fields found: k{77}\.\.\.; allowed"),
        ("jsonl", b'{"a\\u001b[2J\\n": 1}', r"fields found: a\\x1b\[2J\\n; allowed"),
        (
            "jsonl",
            as_json({"messages": [{"role": ["x"] * 5000, "content": "a"}]}),
            r"role is \['x', .{60,80}\.\.\.; allowed: system",
        ),
        ("parquet", b"PAR1", r"fuzzed\.parquet: not a Parquet file"),
    ],
)
def test_known_bad_files(recipes: dict[str, Recipe], suffix: str, content: bytes, words: str) -> None:
    Path(recipes[suffix].data.sources[0].path or "").write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        build_datasets(recipes[suffix], TOKENIZER)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500


def test_a_byte_order_mark_is_no_mistake(recipes: dict[str, Recipe]) -> None:
    Path(recipes["jsonl"].data.sources[0].path or "").write_bytes(b"\xef\xbb\xbf" + _lines(ROWS["pair"]))
    _, _, report = build_datasets(recipes["jsonl"], TOKENIZER)
    assert report.train_examples == 4


def test_strings_that_are_no_text_in_a_table(recipes: dict[str, Recipe]) -> None:
    raw = pyarrow.array([b"\xff\xfe"], pyarrow.binary()).view(pyarrow.string())
    path = Path(recipes["parquet"].data.sources[0].path or "")
    pyarrow.parquet.write_table(pyarrow.table({"text": raw}), path)
    with pytest.raises(UserError, match=r"fuzzed\.parquet: .*utf-8.* copy it again"):
        build_datasets(recipes["parquet"], TOKENIZER)


def test_weights_that_cannot_be_added(folder: Path) -> None:
    sources = json.dumps([{"path": "rows.jsonl", "weight": weight} for weight in (1e308, 1e308)])
    with pytest.raises(UserError, match=r"data\.sources\.0\.weight is 1e\+308 .*less than 1000000000"):
        load_recipe(folder / "recipe.json", [f"data.sources={sources}"])
    sources = json.dumps([{"path": "rows.jsonl", "weight": weight} for weight in (5e-324, 1e8)])
    _, _, report = build_datasets(load_recipe(folder / "recipe.json", [f"data.sources={sources}"]), TOKENIZER)
    assert [source.used for source in report.sources] == [1, 80]


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ cycler.__init__.__globals__.os.system('true') }}", "unsafe|undefined"),
        ("{% for i in range(10 ** 9) %}x{% endfor %}", "Range too big"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages[7].content }}", "no element 7|undefined"),
        ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "recursion"),
        ("{{ messages.clear() }}", "unsafe"),
        ("{% if %}", "Expected an expression"),
    ],
)
def test_chat_templates_run_in_a_sandbox(recipes: dict[str, Recipe], template: str, reason: str) -> None:
    Path(recipes["jsonl"].data.sources[0].path or "").write_bytes(_lines(ROWS["messages"]))
    with pytest.raises(UserError, match=rf"jsonl:1: the backbone's chat template .*({reason})"):
        build_datasets(recipes["jsonl"], toy_tokenizer(template))
