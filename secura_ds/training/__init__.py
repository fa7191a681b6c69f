"""Training: recipe in, run folder with an adapter out; every checkpoint resumes on any number of ranks."""

from secura_ds.training.model import build_model
from secura_ds.training.run import RunSummary, train

__all__ = ["RunSummary", "build_model", "train"]
