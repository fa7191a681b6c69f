"""The one schema of a recipe: typed, strict, all errors at once, JSON Schema for editors."""

from secura_ds.recipe.adapter import Calibration, LoraAdapter, SecuraAdapter, SMagNorm
from secura_ds.recipe.loading import changed, load_recipe, recipe_schema
from secura_ds.recipe.schema import (
    BackboneRecipe,
    DataRecipe,
    EvaluationRecipe,
    Probe,
    Quantization,
    Recipe,
    Source,
    Task,
    TrainingRecipe,
)

__all__ = [
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
    "load_recipe",
    "recipe_schema",
]
