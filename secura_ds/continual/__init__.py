"""A sequence of tasks, trained one after the other: what was learnt, what was forgotten."""

from secura_ds.continual.metrics import score_matrix
from secura_ds.continual.own_loop import evaluate, retention
from secura_ds.continual.run import SequencesSummary, Share, run_sequences

__all__ = ["SequencesSummary", "Share", "evaluate", "retention", "run_sequences", "score_matrix"]
