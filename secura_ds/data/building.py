"""Trainer-ready data sets from a recipe: encode, split, mix by weight, pack; and an account of it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import pack_dataset

from secura_ds.data.encoding import EncodedExample, encode
from secura_ds.data.sources import load_source
from secura_ds.errors import UserError, shown
from secura_ds.recipe import DataRecipe, Recipe, Source

logger = logging.getLogger(__name__)


@dataclass
class SourceReport:
    """What became of one source's rows. `used` counts repeats of a source whose share exceeds its size.

    `unused` are fields of the rows that nothing is made of; `sha256` is of what the examples say.
    """

    name: str
    read: int
    dropped: int
    cut: int
    unused: list[str]
    sha256: str
    used: int = 0


@dataclass
class DataReport:
    """What became of all data; `sources` has the validation source last, if there is one."""

    sources: list[SourceReport] = field(default_factory=list)
    train_examples: int = 0
    train_rows: int = 0
    train_tokens: int = 0
    learnt_tokens: int = 0
    longest: int = 0
    validation_examples: int = 0

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)

    def summary(self) -> str:
        """A few lines for a person."""
        lines = [
            f"{self.train_examples} training examples in {self.train_rows} rows, {self.train_tokens} tokens "
            f"({self.learnt_tokens} learnt, longest row {self.longest}); "
            f"{self.validation_examples} for validation"
        ]
        for source in self.sources:
            line = f"  {source.name}: {source.read} read, {source.used} used"
            if source.cut:
                line += f", {source.cut} cut to max_length"
            if source.dropped:
                line += f", {source.dropped} dropped (cut to max_length, no token was left to learn)"
            if source.unused:
                line += f"; fields not used: {shown(', '.join(source.unused))}"
            lines.append(line)
        return "\n".join(lines)


class Datasets(NamedTuple):
    """What a recipe's sources give."""

    train: Dataset
    validation: Dataset | None
    report: DataReport


def build_datasets(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Datasets:
    """Training and validation data as `input_ids` and `labels` (-100: not learnt), as TRL's trainer takes it.

    With `data.packing` training rows hold several examples, their lengths in the column `seq_lengths`; the
    trainer's collator must then make position ids from them (`padding_free=True`). Seeded: every rank and
    every run builds the same rows in the same order.

    Without weights an epoch has every example once. A source's weight is its share of an epoch, which has as
    many examples as all sources together: a source whose share exceeds its size is repeated, one whose share
    is less is sampled.

    Raises:
        UserError: a source is bad, or no example of it keeps a token to learn within `data.max_length`.
    """
    data = recipe.data
    rng = np.random.default_rng(data.seed)
    report = DataReport()
    parts: list[list[EncodedExample]] = []
    held_out: list[EncodedExample] = []
    for source in data.sources:
        examples = _encode_source(source, data, recipe.resolve_path, tokenizer, report)
        count = _validation_count(len(examples), data.validation_fraction, source)
        order = rng.permutation(len(examples)) if count else np.arange(len(examples))
        held_out += [examples[i] for i in order[:count]]
        parts.append([examples[i] for i in order[count:]])
    sizes = [len(part) for part in parts]
    weights = [source.weight for source in data.sources if source.weight is not None]
    used = mixture_counts(sizes, weights) if weights else sizes
    for source_report, number in zip(report.sources, used, strict=True):
        source_report.used = number
    train = [
        example for part, number in zip(parts, used, strict=True) for example in _take(part, number, rng)
    ]
    train = [train[i] for i in rng.permutation(len(train))]
    if data.validation is not None:
        held_out = _encode_source(data.validation, data, recipe.resolve_path, tokenizer, report)
        report.sources[-1].used = len(held_out)
    dataset = _dataset(train)
    if data.packing:
        dataset = pack_dataset(dataset, data.max_length, "bfd")
    _count(report, train, held_out, dataset)
    logger.info("%s", report.summary())
    return Datasets(dataset, _dataset(held_out) if held_out else None, report)


def mixture_counts(sizes: Sequence[int], weights: Sequence[float]) -> list[int]:
    """How many examples each source gives to an epoch of `sum(sizes)`: by largest remainder, at least one.

    One source is left whole: `mixture_counts([7], [1.0]) == [7]`.
    """
    total = sum(sizes)
    shares = [total * weight / sum(weights) for weight in weights]
    counts = [int(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: counts[i] - shares[i])
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return [max(count, 1) for count in counts]


def _take(part: Sequence[EncodedExample], number: int, rng: np.random.Generator) -> list[EncodedExample]:
    """`number` examples: the whole part as often as it fits, then a sample without repeats."""
    whole, rest = divmod(number, len(part))
    return [*(list(part) * whole), *(part[i] for i in rng.permutation(len(part))[:rest])]


def _validation_count(size: int, fraction: float, source: Source) -> int:
    count = round(size * fraction)
    if fraction > 0 and not 0 < count < size:
        raise UserError(
            f"data.validation_fraction is {fraction}, but {source.path or source.hub} has {size} examples: "
            "none would be left on one side; change the fraction or give more data"
        )
    return count


def _encode_source(
    source: Source,
    data: DataRecipe,
    resolve_path: Callable[[str], Path],
    tokenizer: PreTrainedTokenizerBase,
    report: DataReport,
) -> list[EncodedExample]:
    loaded = load_source(source, resolve_path)
    examples = loaded.examples
    encoded = [
        encode(example, tokenizer, max_length=data.max_length, completion_only=data.completion_only)
        for example in examples
    ]
    kept = [example for example in encoded if example.num_learnt > 0]
    name = str(source.path or source.hub)
    dropped = len(encoded) - len(kept)
    if not kept:
        raise UserError(
            f"{name}: none of the {len(encoded)} examples keeps a token to learn when cut to data.max_length "
            f"= {data.max_length}: the prompts are longer; raise data.max_length or shorten them"
        )
    if dropped:
        logger.warning(
            "%s: %d of %d examples dropped: cut to data.max_length = %d, no token was left to learn",
            name,
            dropped,
            len(encoded),
            data.max_length,
        )
    cut = sum(example.was_cut for example in kept)
    report.sources.append(
        SourceReport(name, len(examples), dropped, cut, unused=loaded.unused, sha256=loaded.fingerprint())
    )
    return kept


def _dataset(examples: Sequence[EncodedExample]) -> Dataset:
    return Dataset.from_dict(
        {
            "input_ids": [example.input_ids for example in examples],
            "labels": [example.labels for example in examples],
        }
    )


def _count(
    report: DataReport, train: Sequence[EncodedExample], held_out: Sequence[EncodedExample], dataset: Dataset
) -> None:
    report.train_examples, report.train_rows = len(train), len(dataset)
    report.validation_examples = len(held_out)
    report.train_tokens = sum(len(example.input_ids) for example in train)
    report.learnt_tokens = sum(example.num_learnt for example in train)
    report.longest = max(len(ids) for ids in dataset["input_ids"])
