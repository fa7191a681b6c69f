"""Measuring a model: the task it should learn, and probes of what it should keep."""

from secura_ds.evaluation.answers import answer_loss
from secura_ds.evaluation.parts import Parts, fingerprints
from secura_ds.evaluation.runner import evaluate, evaluating, read_probe

__all__ = ["Parts", "answer_loss", "evaluate", "evaluating", "fingerprints", "read_probe"]
