"""Typed configuration: one schema, YAML presets, and data sets described as YAML."""
