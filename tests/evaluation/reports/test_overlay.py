"""The band below a frame: even sides, the phase's colour, nothing from later frames."""

from __future__ import annotations

import numpy as np
import pytest

from evaluation.reports.overlay import Overlay
from evaluation.reports.paper_figures import phase_colours

PHASES = ("Early", "Middle", "Late")


def overlay(width_px: int, height_px: int, tools: bool = True) -> Overlay:
    phase = np.repeat([0, 1, 2], 10)
    probabilities = np.full((30, 3), 0.1, np.float32)
    probabilities[np.arange(30), phase] = 0.8
    present = np.tile(np.float32([0.9, 0.1]), (30, 1)) if tools else None
    return Overlay(width_px, height_px, probabilities, present, PHASES, ("Grasper", "Hook"))


def colours_in(band: np.ndarray) -> set[str]:
    return {f"#{r:02X}{g:02X}{b:02X}" for r, g, b in np.unique(band.reshape(-1, 3), axis=0)}


@pytest.mark.parametrize(("width_px", "height_px"), [(96, 96), (95, 97), (854, 480), (480, 853)])
@pytest.mark.parametrize("tools", [True, False])
def test_sides_are_even_and_the_frame_is_unchanged(width_px: int, height_px: int, tools: bool) -> None:
    image = np.random.default_rng(0).integers(0, 255, (height_px, width_px, 3), dtype=np.uint8)
    shown = overlay(width_px, height_px, tools).add(image, 0)
    assert shown.shape[0] % 2 == shown.shape[1] % 2 == 0
    assert np.array_equal(shown[:height_px, :width_px], image)


def test_only_phases_up_to_now_are_drawn() -> None:
    drawn = overlay(300, 300)
    first, second, third = phase_colours(3)
    assert {first} == colours_in(drawn.band(5)) & {first, second, third}
    assert {first, second} == colours_in(drawn.band(15)) & {first, second, third}
    assert {first, second, third} == colours_in(drawn.band(29)) & {first, second, third}
    assert np.array_equal(drawn.band(5), overlay(300, 300).band(5))  # whatever was drawn before


def test_tools_that_are_seen_are_bright() -> None:
    with_tools, without = overlay(300, 300).band(0), overlay(300, 300, tools=False).band(0)
    rows = slice(round(0.52 * with_tools.shape[0]), round(0.8 * with_tools.shape[0]))
    assert with_tools[rows].max() == 240
    assert without[rows].max() == 24


def test_frames_of_another_size_are_scaled_to_the_first() -> None:
    drawn = overlay(96, 96)
    for shape in ((64, 80, 3), (200, 300, 3), (96, 97, 3)):
        assert drawn.add(np.zeros(shape, np.uint8), 0).shape == drawn.add(np.zeros((96, 96, 3), np.uint8), 0).shape
