"""Ablations: many trainings of stage two with different settings."""
