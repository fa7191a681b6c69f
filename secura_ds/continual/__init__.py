"""A sequence of tasks, trained one after the other: what was learnt, what was forgotten."""

from secura_ds.continual.run import SequencesSummary, run_sequences

__all__ = ["SequencesSummary", "run_sequences"]
