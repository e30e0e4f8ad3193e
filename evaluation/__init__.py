"""Metrics of predictions under every published convention, and their tables, figures and files."""

import configs  # noqa: F401, which keeps idle threads from spinning if it comes before torch
