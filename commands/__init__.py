"""The commands of `pipeline.py`, by subject. A command imports what it needs only when it runs."""

import configs  # noqa: F401 - sets GOMP_SPINCOUNT, which must happen before torch is imported
