"""The black margin of a source of which only the first frames are known."""

from __future__ import annotations

import json

import numpy as np
from numpy.typing import NDArray

from configs.schema import PreprocessConfig
from features.frames.preprocess import MARGIN_FRAMES, Geometry, find_margin
from live.margin import RunningGeometry

CONFIG = PreprocessConfig(resize_px=16, crop_px=16, cut_margin=True)


def frame(seed: int, left: int = 6, size: tuple[int, int] = (40, 60)) -> NDArray[np.uint8]:
    pixels = np.zeros((*size, 3), np.uint8)
    pixels[4:-4, left:-left] = np.random.default_rng(seed).integers(60, 255, (size[0] - 8, size[1] - 2 * left, 3))
    return pixels


def test_the_margin_is_that_of_the_first_frames() -> None:
    geometry, frames = RunningGeometry(CONFIG), [frame(k) for k in range(MARGIN_FRAMES)]
    for one in frames:
        geometry.resize(one)
    wide = frame(99, left=1)  # comes too late to change the margin
    expected = Geometry(16, find_margin(frames)).resize_frame(wide)
    np.testing.assert_array_equal(geometry.resize(wide), expected)
    np.testing.assert_array_equal(geometry.resize(wide), expected)


def test_frames_of_another_size_have_another_margin() -> None:
    geometry = RunningGeometry(CONFIG)
    geometry.resize(frame(0))
    other = frame(1, left=9, size=(50, 80))
    np.testing.assert_array_equal(geometry.resize(other), Geometry(16, find_margin([other])).resize_frame(other))


def test_a_restored_geometry_continues() -> None:
    one, other, frames = RunningGeometry(CONFIG), RunningGeometry(CONFIG), [frame(k, 3 + k) for k in range(20)]
    for number, pixels in enumerate(frames):
        if number == 5:
            other.restore(json.loads(json.dumps(one.state())))
        found = one.resize(pixels)
        if number >= 5:
            np.testing.assert_array_equal(other.resize(pixels), found)


def test_frames_keep_their_margin_unless_it_is_to_be_cut() -> None:
    config = PreprocessConfig(resize_px=16, crop_px=16)
    np.testing.assert_array_equal(RunningGeometry(config).resize(frame(0)), Geometry(16).resize_frame(frame(0)))
