"""A data set on disk: its videos, their labels and splits, and the index that records them."""
