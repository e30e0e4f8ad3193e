"""Temporal heads, one file per head: from a sequence of embeddings to phase logits. Importing this package registers
every head of this project."""

from stage2_temporal.heads import linear, recurrent, tcn

__all__ = ["linear", "recurrent", "tcn"]
