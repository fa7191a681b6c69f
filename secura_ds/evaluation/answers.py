"""Mean token loss of the right answers: finer than a score, and it needs no answer from the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secura_ds.backbones.head import IGNORED
from secura_ds.data import Example, encode
from secura_ds.evaluation.batching import batches
from secura_ds.evaluation.metrics import bootstrap_stderr
from secura_ds.evaluation.runner import evaluating

TOKENS_PER_BATCH = 1024
"""Bounds the memory of the logits, which are tokens x vocabulary."""


def answer_loss(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    max_length: int,
    batch_size: int,
) -> dict[str, Any]:
    """Mean loss in nats of the tokens that training would learn of `examples`, with its standard error.

    Under ZeRO-3 every rank calls this and runs all the same batches.

    Args:
        max_length: longest example in tokens; longer ones are cut, as in training.

    Returns:
        `{"loss", "loss_stderr", "tokens"}`; both numbers are null if no token is left.
    """
    encoded = [encode(e, tokenizer, max_length=max_length, completion_only=True) for e in examples]
    kept = [example for example in encoded if example.num_learnt > 0]
    if not kept:
        return {"loss": None, "loss_stderr": None, "tokens": 0}
    sums = np.zeros((len(kept), 2))
    longest = max(len(example.input_ids) for example in kept)
    size = min(batch_size, max(1, TOKENS_PER_BATCH // longest))
    with evaluating(model):
        for batch in batches(kept, size, lambda e: len(e.input_ids), "loss", progress=False):
            width = max(len(kept[i].input_ids) for i in batch)
            ids = torch.zeros(len(batch), width, dtype=torch.int64)
            mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
            for row, i in enumerate(batch):
                length = len(kept[i].input_ids)
                ids[row, :length] = torch.tensor(kept[i].input_ids)
                labels[row, :length] = torch.tensor(kept[i].labels)
                mask[row, :length] = 1
            output = model(
                input_ids=ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False
            )
            for i, row_logits, row_labels in zip(batch, output.logits, labels.to(model.device), strict=True):
                loss = F.cross_entropy(row_logits[:-1].float(), row_labels[1:], reduction="sum")
                sums[i] = float(loss), int((row_labels[1:] != IGNORED).sum())

    def mean(rows: np.ndarray) -> float:
        return float(rows[:, 0].sum() / rows[:, 1].sum())

    return {"loss": mean(sums), "loss_stderr": bootstrap_stderr(sums, mean), "tokens": int(sums[:, 1].sum())}
