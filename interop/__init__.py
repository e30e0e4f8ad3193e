"""Other programs' files: MTRCNet's checkpoints, index pickles and text files."""

import configs  # noqa: F401, which keeps idle threads from spinning if it comes before torch
