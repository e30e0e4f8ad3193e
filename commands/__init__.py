"""The commands of `pipeline.py`, by subject. What a command needs is imported when it runs."""

import configs  # noqa: F401 - before torch, since it keeps idle OpenMP threads from spinning
