"""Files of other programs: MTRCNet's checkpoints, index pickles and text files."""

import configs  # noqa: F401, imported before torch, since it keeps torch's idle threads from spinning
