"""A sequence of tasks, trained one after the other: what was learnt, what was forgotten."""
