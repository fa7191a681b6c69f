"""Calibration: R from what each layer's inputs excite, on text that the frozen model writes itself."""

from secura_ds.calibration.corda import corda_starts
from secura_ds.calibration.factors import calibrate, drop_factors, linear_targets, put_factors, target_layers
from secura_ds.calibration.text import Calibration

__all__ = [
    "Calibration",
    "calibrate",
    "corda_starts",
    "drop_factors",
    "linear_targets",
    "put_factors",
    "target_layers",
]
