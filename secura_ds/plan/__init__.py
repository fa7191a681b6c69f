"""What a run will take before anything is loaded: memory by part, traffic, disk, a verdict and what would help."""

from secura_ds.plan.planning import Plan, plan
from secura_ds.plan.settings import Devices
from secura_ds.plan.simulation import Work

__all__ = ["Devices", "Plan", "Work", "plan"]
