"""The page of a task sequence: what each entry learnt, what it forgot, and at what cost."""
