"""Draw the seven tools, each from a few strokes, once per video and in several degrees of opening.

A tool lies along x with its working point at the origin and its shaft towards negative x. Lengths are in units of the
frame's shorter side. Tools differ in their outlines, not in their colours, which vary between videos.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from features.simulation.anatomy import noise, premultiplied, smoothstep, to_rgbx

OPENINGS = 3
SPRITE_UNITS = (1.7, 0.62)
# Position of the working point in a sprite, as a fraction of its width; vertically it is in the middle.
WORKING_POINT = 1.36 / 1.7
BAG_UNITS = (0.95, 0.95)


@dataclass(frozen=True)
class Stroke:
    """A straight piece from `start` to `end` with evenly changing half-width, and round ends (flat ends if `blunt`)."""

    start: tuple[float, float]
    end: tuple[float, float]
    half_width: tuple[float, float]
    colour: np.ndarray
    blunt: bool = False


class Materials:
    """The colours of metals and plastics in one video, each (3,) RGB, drawn from `rng`."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.metal = np.array([176, 176, 182]) * rng.uniform(0.8, 1.15) + rng.uniform(-8, 8, 3)
        self.shaft = np.array([120, 122, 128]) * rng.uniform(0.5, 1.4) + rng.uniform(-8, 8, 3)
        self.dark = np.array([38, 38, 42]) * rng.uniform(0.6, 1.5)
        self.white = np.array([236, 234, 226]) * rng.uniform(0.88, 1.05)
        self.insulation = np.array([80, 112, 164]) * rng.uniform(0.7, 1.3) + rng.uniform(-25, 25, 3)
        self.amber = np.array([200, 128, 40]) * rng.uniform(0.7, 1.2) + rng.uniform(-25, 25, 3)
        self.clip = np.array([132, 72, 168]) * rng.uniform(0.7, 1.3) + rng.uniform(-30, 30, 3)


def _mirrored(strokes: list[Stroke]) -> list[Stroke]:
    """Return the strokes together with their mirror images across the tool's axis."""
    return strokes + [
        Stroke((s.start[0], -s.start[1]), (s.end[0], -s.end[1]), s.half_width, s.colour, s.blunt) for s in strokes
    ]


def _shaft(material: np.ndarray, half_width: float, until: float) -> Stroke:
    return Stroke((-2.0, 0.0), (until, 0.0), (half_width, half_width), material, blunt=True)


def _grasper(m: Materials, opening: float) -> list[Stroke]:
    """A thin shaft and two long slim jaws with a slot in each."""
    gap = 0.025 + 0.085 * opening
    jaws = [Stroke((-0.22, 0.012), (0.07, gap), (0.034, 0.02), m.metal)]
    slots = [Stroke((-0.14, 0.012 + gap * 0.27), (0.03, gap * 0.86), (0.009, 0.007), m.dark)]
    return [_shaft(m.shaft, 0.045, -0.22), *_mirrored(jaws), *_mirrored(slots)]


def _bipolar(m: Materials, opening: float) -> list[Stroke]:
    """Two thin bowed arms that separate and meet again, like the eye of a needle."""
    bow = 0.1 + 0.045 * opening
    arms = [
        Stroke((-0.32, 0.02), (-0.2, bow), (0.026, 0.024), m.insulation),
        Stroke((-0.2, bow), (-0.05, bow), (0.024, 0.024), m.insulation),
        Stroke((-0.05, bow), (0.07, 0.012 + 0.02 * opening), (0.022, 0.024), m.metal),
    ]
    return [_shaft(m.insulation * 0.8, 0.048, -0.31), *_mirrored(arms)]


def _hook(m: Materials, opening: float) -> list[Stroke]:
    """A thick dark shaft that ends in a white cone and a bent wire."""
    return [
        _shaft(m.dark * 1.5, 0.075, -0.2),
        Stroke((-0.22, 0.0), (-0.03, 0.0), (0.075, 0.022), m.white),
        Stroke((-0.04, 0.0), (0.04, 0.0), (0.011, 0.011), m.metal * 0.8),
        Stroke((0.04, 0.0), (0.045, 0.065 + 0.015 * opening), (0.011, 0.009), m.metal * 0.8),
    ]


def _scissors(m: Materials, opening: float) -> list[Stroke]:
    """Two broad blades, spread wide, sharp at their ends, with a sleeve of insulation behind them."""
    spread = 0.13 + 0.08 * opening
    blades = [
        Stroke((-0.2, 0.0), (-0.07, spread * 0.85), (0.06, 0.062), m.metal),
        Stroke((-0.07, spread * 0.85), (0.11, spread), (0.062, 0.003), m.metal),
    ]
    collar = Stroke((-0.6, 0.0), (-0.24, 0.0), (0.07, 0.07), m.amber, blunt=True)
    joint = Stroke((-0.21, 0.0), (-0.21, 0.0), (0.04, 0.04), m.dark)
    return [_shaft(m.dark * 1.3, 0.05, -0.2), collar, *_mirrored(blades), joint]


def _clipper(m: Materials, opening: float) -> list[Stroke]:
    """A thick shaft, a block as its head and two blunt parallel prongs: a wide fork that holds a clip."""
    gap = 0.075 + 0.02 * opening
    prongs = [Stroke((-0.16, gap), (0.07, gap * 0.92), (0.04, 0.036), m.metal, blunt=True)]
    return [
        _shaft(m.metal * 0.9, 0.085, -0.26),
        Stroke((-0.42, 0.0), (-0.38, 0.0), (0.1, 0.1), m.dark, blunt=True),
        Stroke((-0.28, 0.0), (-0.12, 0.0), (0.13, 0.13), m.metal * 0.8, blunt=True),
        *_mirrored(prongs),
        Stroke((-0.08, 0.0), (0.05, 0.0), (gap * 0.5, gap * 0.42), m.clip),
    ]


def _irrigator(m: Materials, opening: float) -> list[Stroke]:
    """A straight tube of constant width, with depth marks around it, a row of holes, and an open end."""
    holes = [Stroke((x, 0.0), (x, 0.0), (0.026, 0.026), m.dark * 0.6) for x in (-0.17, -0.09, -0.01)]
    marks = [Stroke((x, 0.0), (x + 0.035, 0.0), (0.07, 0.07), m.dark, blunt=True) for x in (-0.5, -0.4, -0.3)]
    mouth = Stroke((0.055, 0.0), (0.085, 0.0), (0.058, 0.058), m.dark * 0.5, blunt=True)
    return [_shaft(m.metal, 0.068, 0.08), *marks, *holes, mouth]


_STROKES: dict[str, Callable[[Materials, float], list[Stroke]]] = {
    "Grasper": _grasper,
    "Bipolar": _bipolar,
    "Hook": _hook,
    "Scissors": _scissors,
    "Clipper": _clipper,
    "Irrigator": _irrigator,
}


def draw_tool(name: str, materials: Materials, unit_px: float) -> list[Image.Image]:
    """Draw one tool in `OPENINGS` degrees of opening, as premultiplied RGBX sprites of `SPRITE_UNITS`."""
    return [_draw_strokes(_STROKES[name](materials, k / (OPENINGS - 1)), unit_px) for k in range(OPENINGS)]


def _draw_strokes(strokes: list[Stroke], unit_px: float) -> Image.Image:
    width, height = (round(side * unit_px) for side in SPRITE_UNITS)
    x = ((np.arange(width, dtype=np.float32) + 0.5) / width - WORKING_POINT) * SPRITE_UNITS[0]
    y = ((np.arange(height, dtype=np.float32) + 0.5) / height - 0.5) * SPRITE_UNITS[1]
    grid_x, grid_y = np.meshgrid(x, y)
    colour: np.ndarray = np.zeros((height, width, 3), dtype=np.float32)
    opacity: np.ndarray = np.zeros((height, width), dtype=np.float32)
    shadow = np.zeros((height, width), dtype=np.float32)
    for stroke in strokes:
        distance, across = _distance(stroke, grid_x, grid_y)
        cover = np.clip(0.5 - distance * unit_px, 0, 1)
        # Shade the stroke like a cylinder lit from one side, with a bright line where it reflects the lamp.
        shade = 0.3 + 0.7 * np.sqrt(np.clip(1 - (across + 0.25) ** 2, 0, 1))
        shade = shade + 0.5 * smoothstep(np.abs(across + 0.35), 0.3, 0.0)
        colour = colour * (1 - cover)[..., None] + stroke.colour * (shade * cover)[..., None]
        opacity = np.maximum(opacity, cover)
        shadow = np.maximum(shadow, 0.4 * smoothstep(distance, 0.045, 0.0))
    opacity = np.maximum(opacity, shadow)
    # Cut off empty rows, which take time in every frame; equally on both sides, so that the axis stays in the middle.
    filled = opacity.max(axis=1) > 0
    empty = max(0, int(np.argmax(filled | filled[::-1])) - 1)
    kept = slice(empty, height - empty)
    return to_rgbx(colour[kept], 255 * opacity[kept])


def _distance(stroke: Stroke, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the distance to a stroke's outline (negative inside) and the position across it (-1 to 1), both (H, W)."""
    start, end = np.array(stroke.start), np.array(stroke.end)
    length = float(np.hypot(*(end - start)))
    direction = (end - start) / length if length > 0 else np.array([1.0, 0.0])
    along = (x - start[0]) * direction[0] + (y - start[1]) * direction[1]
    beside = (y - start[1]) * direction[0] - (x - start[0]) * direction[1]
    t = np.clip(along / length, 0, 1) if length > 0 else np.zeros_like(along)
    half_width = stroke.half_width[0] + (stroke.half_width[1] - stroke.half_width[0]) * t
    if stroke.blunt:
        distance = np.maximum(np.abs(beside) - half_width, np.maximum(-along, along - length))
    else:
        distance = np.hypot(beside, along - t * length) - half_width
    return distance, beside / half_width


def draw_bag(rng: np.random.Generator, materials: Materials, unit_px: float) -> list[Image.Image]:
    """Draw the specimen bag, a translucent pouch with a bright rim and folds, with its mouth in `OPENINGS` openings."""
    side = round(BAG_UNITS[0] * unit_px)
    axis = ((np.arange(side, dtype=np.float32) + 0.5) / side - 0.5) * BAG_UNITS[0]
    x, y = np.meshgrid(axis, axis)
    warp = noise(rng, side, side, 5)
    folds = noise(rng, side, side, 14, octaves=2)
    sprites = []
    for opening in np.linspace(0.35, 1.0, OPENINGS):
        pouch = (x / 0.3) ** 2 + ((y - 0.08) / 0.34) ** 2 + 0.14 * warp
        mouth = (x / 0.27) ** 2 + ((y + 0.16) / (0.16 * opening)) ** 2 + 0.06 * warp
        body = smoothstep(pouch, 1.05, 0.95)
        rim = smoothstep(np.abs(np.sqrt(np.maximum(mouth, 0)) - 1), 0.22, 0.1)
        inside = smoothstep(mouth, 1.0, 0.85)
        crease = smoothstep(np.abs(folds), 0.2, 0.0)
        light = (0.72 + 0.2 * warp + 0.13 * folds + 0.1 * crease)[..., None] * materials.white
        depth = np.array([120, 84, 76]) * (1 + 0.3 * warp)[..., None]
        colour = light * (1 - inside)[..., None] + depth * inside[..., None]
        colour = colour * (1 - rim)[..., None] + materials.white * rim[..., None] * 1.05
        sprites.append(premultiplied(colour, np.maximum(body * (0.74 + 0.08 * crease), rim)))
    return sprites
