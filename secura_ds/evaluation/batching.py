"""Batches of unequal token lists: longest first, padded to the left, with a progress bar."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from secura_ds.environment import is_main_process
from secura_ds.errors import UserError

T = TypeVar("T")


def batches(
    items: Sequence[T], size: int, length: Callable[[T], int], title: str, *, progress: bool
) -> Iterator[list[int]]:
    """Indices of `items` in batches of like length, longest first: too little memory shows at once."""
    order = sorted(range(len(items)), key=lambda i: -length(items[i]))
    with tqdm(total=len(items), desc=title, unit="item", disable=not (progress and is_main_process())) as bar:
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            yield batch
            bar.update(len(batch))


def check_enough(path: Path, found: int, what: str, asked: int | None) -> None:
    """Refuse a probe with fewer items than a recipe asks for: its score would be of something else.

    Raises:
        UserError: names both numbers.
    """
    if asked is not None and found < asked:
        raise UserError(f"{path} has {found} {what}, but max_items is {asked}: lower it, or leave it out")


def pad_left(
    rows: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, both (rows, longest) int64, each row ending at the right edge."""
    width = max(len(row) for row in rows)
    filler = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    ids = torch.full((len(rows), width), filler, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, width - len(row) :] = torch.tensor(row)
        mask[index, width - len(row) :] = 1
    return ids.to(device), mask.to(device)
