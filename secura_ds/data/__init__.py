"""Data sets to trainer-ready examples: read, render with the chat template, mask, mix, split, pack."""

from secura_ds.data.building import DataReport, Datasets, SourceReport, build_datasets
from secura_ds.data.encoding import EncodedExample, encode, render_prompt
from secura_ds.data.showing import show_examples
from secura_ds.data.sources import Example, load_examples

__all__ = [
    "DataReport",
    "Datasets",
    "EncodedExample",
    "Example",
    "SourceReport",
    "build_datasets",
    "encode",
    "load_examples",
    "render_prompt",
    "show_examples",
]
