"""What an adapter does to the weights it adapts, one layer at a time, and what gradients did in training."""

from secura_ds.analysis.changes import Change, weight_changes
from secura_ds.analysis.gradients import NormStatistics, norm_statistics
from secura_ds.analysis.limiter import LEVELS, LimiterStatistics, limiter_statistics
from secura_ds.analysis.spectra import Spectrum, SpectrumChange, spectra

__all__ = [
    "LEVELS",
    "Change",
    "LimiterStatistics",
    "NormStatistics",
    "Spectrum",
    "SpectrumChange",
    "limiter_statistics",
    "norm_statistics",
    "spectra",
    "weight_changes",
]
