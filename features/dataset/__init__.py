"""Data sets on disk: find videos and their labels, assign splits, and record them in an index."""
