"""Compute metrics of predictions under every published convention, and write tables, figures and files."""

import configs  # noqa: F401 - sets GOMP_SPINCOUNT, which must happen before torch is imported
