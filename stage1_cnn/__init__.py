"""Stage one: fine-tuning a backbone on tool presence, and extracting one embedding per frame with it."""

import configs  # noqa: F401, imported before torch, since it keeps torch's idle threads from spinning
