"""Simulate operations: draw labels that follow real statistics, draw images, and write files laid out like Cholec80."""
