"""The commands of `pipeline.py`, by subject."""

import configs  # noqa: F401, which keeps idle threads from spinning if it comes before torch
