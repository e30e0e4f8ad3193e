"""Simulated operations: labels that follow real statistics, procedural images, Cholec80's layout."""

from features.simulation.procedure import Operation, draw_operation, frame_seconds, load_table
from features.simulation.scene import Scene
from features.simulation.write import SimulatedData, simulate

__all__ = ["Operation", "Scene", "SimulatedData", "draw_operation", "frame_seconds", "load_table", "simulate"]
