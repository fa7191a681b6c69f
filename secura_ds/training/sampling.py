"""Which examples a step takes: a random draw of the task's and, with replay, one of earlier tasks'."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from transformers.trainer_pt_utils import BatchRebalanceSampler

from secura_ds.training.strategy import Replay

REPLAYED = "replayed"
"""The column, and the key of a batch, that tells rows of earlier tasks from those of this one."""
_OTHER_DRAWS = 1 << 20  # apart from the seeds of the task's own draws, which are seed + epoch


class StepSampler(BatchRebalanceSampler):
    """Every step takes a random draw; only its cut into forward passes goes by length.

    So padding and waiting are least, and the step's gradient is that of the random draw. The order follows
    from seed and epoch alone, for any number of ranks with the same batch.

    Args:
        rows: the task's rows, and behind them those to be replayed (`with_replay`).
        batch: rows of the task in a step, over all ranks.
        replay: what is replayed; a step draws from it without repeats where there are rows enough.
    """

    def __init__(
        self,
        rows: Dataset,
        batch: int,
        *,
        ranks: int,
        rank: int,
        passes: int,
        seed: int,
        replay: Replay | None = None,
    ) -> None:
        self._all_lengths = [len(ids) for ids in rows["input_ids"]]
        self._replay = replay
        own = len(rows) - (len(replay.rows) if replay is not None else 0)
        super().__init__(self._all_lengths[:own], batch, ranks, passes, seed=seed, rank=rank, drop_last=False)

    def __iter__(self) -> Iterator[list[int]]:
        self._generator = torch.Generator().manual_seed(self.seed + self.epoch + _OTHER_DRAWS)
        yield from super().__iter__()

    def _yield_global_batch(self, batch_indices: list[int]) -> Iterator[list[int]]:
        indices = batch_indices + self._replayed()
        parts = self._assign(indices, [self._all_lengths[i] for i in indices])
        yield from parts[self.rank]

    def _replayed(self) -> list[int]:
        if self._replay is None:
            return []
        drawn: list[int] = []
        while len(drawn) < self._replay.per_step:
            drawn += torch.randperm(len(self._replay.rows), generator=self._generator).tolist()
        return [len(self.lengths) + i for i in drawn[: self._replay.per_step]]


def with_replay(rows: Dataset, replay: Replay | None) -> Dataset:
    """The task's rows with those to be replayed behind them, told apart by a column."""
    if replay is None:
        return rows
    marked = (
        part.add_column(REPLAYED, [earlier] * len(part))
        for part, earlier in ((rows, False), (replay.rows, True))
    )
    return concatenate_datasets(list(marked))


Collator = Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]


def marking(collate: Collator) -> Collator:
    """A collator that also says which rows of the batch are replayed, where rows say so."""

    def collate_marked(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        batch = collate([{key: row[key] for key in row if key != REPLAYED} for row in rows])
        if rows and REPLAYED in rows[0]:
            batch[REPLAYED] = torch.tensor([bool(row[REPLAYED]) for row in rows])
        return batch

    return collate_marked
