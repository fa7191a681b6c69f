"""Singular values of adapted weights before and after (the paper's Figure 3)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from secura_ds.analysis.weights import AdaptedWeight


class Spectrum(NamedTuple):
    """Of one weight (out, in): L2 norm of its singular values, their mean, and the largest."""

    norm: float
    """The Frobenius norm, too."""
    mean: float
    """The nuclear norm over min(out, in)."""
    largest: float


class SpectrumChange(NamedTuple):
    """One layer's spectrum before and after."""

    before: Spectrum
    after: Spectrum


def spectra(weights: Iterable[AdaptedWeight]) -> Iterator[tuple[str, SpectrumChange]]:
    """Each layer's name and spectra. Decomposes two weights a layer, which takes minutes for large models."""
    for weight in weights:
        yield weight.module, SpectrumChange(_spectrum(weight.before), _spectrum(weight.after))


def _spectrum(weight: Tensor) -> Spectrum:
    values = torch.linalg.svdvals(weight).double()
    return Spectrum(float(torch.linalg.vector_norm(values)), float(values.mean()), float(values.max()))
