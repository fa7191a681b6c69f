"""Experience replay: every step also learns from examples of earlier tasks.

Rolnick et al., arXiv 1811.11682; Chaudhry et al., "On Tiny Episodic Memories in Continual Learning", arXiv
1902.10486: the step is taken on the union of the task's batch and one drawn from the buffer, so the loss is
the mean over the learnt tokens of both.
"""

from __future__ import annotations

from secura_ds.training.strategy import Replay, Strategy


class ExperienceReplay(Strategy):
    """Replay of `replay`; the first task of a sequence has none."""

    def __init__(self, replay: Replay | None) -> None:
        self.replay = replay
