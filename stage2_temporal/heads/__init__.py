"""Temporal heads: from a sequence of embeddings to phase logits."""
