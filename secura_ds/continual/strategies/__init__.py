"""Strategies of continual learning: what they add to the one training loop."""

from secura_ds.continual.strategies.buffer import buffered
from secura_ds.continual.strategies.ewc import Anchors, ElasticWeights, fisher_information, joined, values_of
from secura_ds.continual.strategies.ilora import InterpolatedLora
from secura_ds.continual.strategies.replay import ExperienceReplay

__all__ = [
    "Anchors",
    "ElasticWeights",
    "ExperienceReplay",
    "InterpolatedLora",
    "buffered",
    "fisher_information",
    "joined",
    "values_of",
]
