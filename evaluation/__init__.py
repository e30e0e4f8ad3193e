"""Numbers, tables, figures and files out: what a prediction is worth, under every published convention."""

import configs  # noqa: F401, which keeps idle threads from spinning if it comes before torch
