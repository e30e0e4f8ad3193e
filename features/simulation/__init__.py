"""Simulated operations: labels that follow real statistics, procedural images, Cholec80's layout."""
