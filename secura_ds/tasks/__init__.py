"""Tasks of a sequence: each defined by one YAML file, trained on and scored with the same tokens."""

from secura_ds.tasks.loading import load_tasks
from secura_ds.tasks.scoring import score_tasks
from secura_ds.tasks.task import Task

__all__ = ["Task", "load_tasks", "score_tasks"]
