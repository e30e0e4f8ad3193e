"""Stage one: a backbone fine-tuned on tool presence, and the embeddings it gives each frame."""

import configs  # noqa: F401, which keeps idle threads from spinning if it comes before torch
