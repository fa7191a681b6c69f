"""What a run will take, before anything is loaded: memory by part, traffic, files, a verdict, advice."""

from secura_ds.plan.machine import here
from secura_ds.plan.planning import Plan, deepspeed_file, plan
from secura_ds.plan.settings import Devices
from secura_ds.plan.simulation import Work
from secura_ds.plan.verdict import Change, Verdict, advice, judge

__all__ = [
    "Change",
    "Devices",
    "Plan",
    "Verdict",
    "Work",
    "advice",
    "deepspeed_file",
    "here",
    "judge",
    "plan",
]
