"""Predictions and truth in files: this project's and other programs'."""
