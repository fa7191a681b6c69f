"""The one schema of a recipe: typed, strict, all errors at once, JSON Schema for editors."""

from secura_ds.recipe.adapter import Adapter, Calibration, LoraAdapter, SecuraAdapter, SMagNorm
from secura_ds.recipe.loading import (
    changed,
    describes_sequences,
    load_recipe,
    load_sequence_recipe,
    recipe_schema,
)
from secura_ds.recipe.schema import (
    BackboneRecipe,
    DataRecipe,
    EvaluationRecipe,
    Probe,
    Quantization,
    Recipe,
    Source,
    StageTraining,
    Task,
    TrainingRecipe,
)
from secura_ds.recipe.sequence import (
    ElasticWeights,
    Entry,
    ExperienceReplay,
    InterpolatedLora,
    Sequence,
    SequenceRecipe,
    Sequential,
)

__all__ = [
    "Adapter",
    "ElasticWeights",
    "Entry",
    "ExperienceReplay",
    "InterpolatedLora",
    "Sequence",
    "SequenceRecipe",
    "Sequential",
    "StageTraining",
    "load_sequence_recipe",
    "BackboneRecipe",
    "Calibration",
    "DataRecipe",
    "EvaluationRecipe",
    "LoraAdapter",
    "Probe",
    "Quantization",
    "Recipe",
    "SMagNorm",
    "SecuraAdapter",
    "Source",
    "Task",
    "TrainingRecipe",
    "changed",
    "describes_sequences",
    "load_recipe",
    "recipe_schema",
]
