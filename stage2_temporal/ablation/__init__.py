"""Many trainings of stage two over a space of settings."""
