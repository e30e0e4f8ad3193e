"""Draw what a simulated camera sees without tools: organs, gallbladder, blood, smoke, and images outside the body.

Everything here is drawn once per video; frames are made by moving and blending it. Lengths are in units of the frame's
shorter side, so that a video looks the same at any size; x points right and y down. Images with four bands have
Pillow's mode "RGBX": the fourth band is resampled together with RGB, and contains the strength of specular reflection
here.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

CANVAS_UNITS = 2.4
GALLBLADDER_UNITS = (1.0, 0.64)
GALLBLADDER_STATES = 8

_BLADDERS = np.array([[150, 150, 120], [170, 145, 140], [135, 145, 150], [185, 165, 115], [150, 110, 105]])


class Appearance:
    """The properties that differ between operations: colours (RGB, 0 to 255), light, textures and positions.

    They are drawn from `rng`. Changing the order of the draws requires a new version of the simulator.
    """

    def __init__(self, rng: np.random.Generator) -> None:
        light = np.array([rng.uniform(-0.5, 0.5), rng.uniform(-0.7, -0.15), 1.0])
        self.liver = np.array([118, 42, 36]) * rng.uniform(0.75, 1.25) + rng.uniform(-14, 14, 3)
        self.fat = np.array([210, 146, 70]) * rng.uniform(0.8, 1.1) + rng.uniform(-14, 14, 3)
        self.wall = np.array([150, 84, 74]) * rng.uniform(0.6, 1.1) + rng.uniform(-15, 15, 3)
        bladder = _BLADDERS[rng.integers(len(_BLADDERS))]
        self.bladder = bladder * rng.uniform(0.85, 1.15) + rng.uniform(-12, 12, 3)
        self.white_balance = np.exp(rng.normal(0, 0.05, 3)) * np.exp(rng.normal(0.03, 0.1))  # (3,) factors
        self.light = light / np.linalg.norm(light)  # (3,) unit vector towards the lamp
        self.view_radius = rng.uniform(0.5, 0.6)  # radius of the round field of view
        self.bumpiness = rng.uniform(0.6, 1.4)
        self.bladder_angle = rng.uniform(-2.3, -0.9)  # radians
        self.liver_edge = rng.normal(0, 0.12, 2)  # (2,) shift of the main lobe


# ---------------------------------------------------------------------------------------------- textures


def noise(rng: np.random.Generator, width_px: int, height_px: int, cells: float, octaves: int = 4) -> np.ndarray:
    """Draw a smooth random texture, (H, W) float32, about -1 to 1, as a sum of enlarged coarse grids (octaves)."""
    total = np.zeros((height_px, width_px), dtype=np.float32)
    longest = max(width_px, height_px)
    for octave in range(octaves):
        columns, rows = (max(2, round(cells * 2**octave * side / longest)) + 2 for side in (width_px, height_px))
        grid = Image.fromarray(rng.uniform(-1, 1, (rows, columns)).astype(np.float32))
        total += np.asarray(grid.resize((width_px, height_px), Image.Resampling.BICUBIC)) * 0.5**octave
    return total


def to_rgbx(colour: np.ndarray, fourth: np.ndarray) -> Image.Image:
    """Combine colours (H, W, 3) and a fourth band (H, W), all in 0 to 255, to an RGBX image."""
    bands = np.concatenate([colour, fourth[..., None]], axis=-1)
    pixels = np.clip(bands, 0, 255).astype(np.uint8)
    return Image.frombytes("RGBX", (pixels.shape[1], pixels.shape[0]), pixels.tobytes())


def smoothstep(value: np.ndarray, low: float, high: float) -> np.ndarray:
    """Return 0 below `low`, 1 above `high`, and a smooth transition between; `low` may be larger than `high`."""
    t = np.clip((value - low) / (high - low), 0.0, 1.0)
    return t * t * (3 - 2 * t)


def _grid(width_px: int, height_px: int, unit_px: float) -> tuple[np.ndarray, np.ndarray]:
    """Return x and y coordinates in units from the centre, each (H, W) float32."""
    x = (np.arange(width_px, dtype=np.float32) - width_px / 2) / unit_px
    y = (np.arange(height_px, dtype=np.float32) - height_px / 2) / unit_px
    grid_x, grid_y = np.meshgrid(x, y)
    return grid_x, grid_y


def _relief(height: np.ndarray, unit_px: float, look: Appearance) -> tuple[np.ndarray, np.ndarray]:
    """Return brightness (about 0.3 to 1.2) and reflection (0 to 255) of a surface with this height, all (H, W)."""
    slope_y, slope_x = np.gradient(height * unit_px)
    facing = (look.light[2] - slope_x * look.light[0] - slope_y * look.light[1]) / np.sqrt(1 + slope_x**2 + slope_y**2)
    half = look.light + np.array([0.0, 0.0, 1.0])
    half /= np.linalg.norm(half)
    mirror = (half[2] - slope_x * half[0] - slope_y * half[1]) / np.sqrt(1 + slope_x**2 + slope_y**2)
    # Wet tissue reflects the lamp in a few small spots, however the surface is oriented, so the limits are quantiles.
    low, high = np.quantile(mirror[::4, ::4], (0.94, 0.9995))
    return 0.15 + 1.0 * np.clip(facing, 0, 1) ** 1.5, 255 * np.clip((mirror - low) / (high - low + 1e-6), 0, 1)


# ---------------------------------------------------------------------------------------------- organs


def draw_organs(rng: np.random.Generator, look: Appearance, unit_px: int) -> Image.Image:
    """Draw the static part of the scene (abdominal wall, liver, its raw bed, fat), a square RGBX of `CANVAS_UNITS`."""
    side = int(CANVAS_UNITS * unit_px)
    x, y = _grid(side, side, unit_px)
    warp = noise(rng, side, side, 7)
    fine = noise(rng, side, side, 40, octaves=3)
    colour = look.wall * (1 + 0.12 * warp + 0.08 * fine)[..., None]
    height = 0.04 * warp
    edge_x, edge_y = look.liver_edge
    organs = [
        (0.5 + edge_y, -0.55 + edge_x, 0.75, 0.62, look.liver * 0.85, 0.05),
        (-0.5 + edge_x, -0.42 + edge_y, 0.95, 0.72, look.liver, 0.05),
    ]
    for depth in np.linspace(0.38, 1.0, 11):
        tint = (look.fat if rng.random() < 0.8 else look.wall * 1.2) * rng.uniform(0.85, 1.1)
        organs.append((rng.uniform(-1.1, 1.1), depth, rng.uniform(0.25, 0.6), rng.uniform(0.16, 0.3), tint, 0.14))
    for centre_x, centre_y, radius_x, radius_y, tint, grain in organs:
        level = ((x - centre_x) / radius_x) ** 2 + ((y - centre_y) / radius_y) ** 2 + 0.16 * warp
        inside = smoothstep(level, 1.03, 0.97)
        shadow = 1 - 0.5 * smoothstep(level, 1.5, 1.0)
        surface = tint * (1 + grain * warp + (grain * 0.8) * fine)[..., None]
        colour = colour * shadow[..., None] * (1 - inside)[..., None] + surface * inside[..., None]
        dome = np.sqrt(np.clip(1 - level, 0, 1)) * min(radius_x, radius_y) * 0.9
        height = height * (1 - inside) + dome * inside
    colour = _with_vessels(rng, colour, smoothstep(y + 0.15 * warp, 0.2, 0.45))
    colour = _with_bed(colour, x, y, warp, fine)
    brightness, reflection = _relief(height + 0.004 * look.bumpiness * fine + 0.02 * warp, unit_px, look)
    return to_rgbx(colour * brightness[..., None], reflection)


def _with_vessels(rng: np.random.Generator, colour: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Draw vessels as thin red lines, which are the zero lines of a smooth texture."""
    rows, columns = colour.shape[:2]
    lines = smoothstep(np.abs(noise(rng, columns, rows, 9, octaves=3)), 0.06, 0.01) * where * 0.55
    return colour * (1 - lines)[..., None] + np.array([130, 30, 24]) * lines[..., None]


def _with_bed(colour: np.ndarray, x: np.ndarray, y: np.ndarray, warp: np.ndarray, fine: np.ndarray) -> np.ndarray:
    """Draw the raw patch of liver under the gallbladder, which is visible once the gallbladder is removed."""
    inside = smoothstep((x / 0.17) ** 2 + ((y + 0.12) / 0.3) ** 2 + 0.5 * warp, 1.1, 0.7)[..., None]
    raw = np.array([122, 48, 30]) * (1 + 0.35 * warp + 0.4 * fine)[..., None] + 18 * (fine > 0.5)[..., None]
    return colour * (1 - inside) + raw * inside


def draw_gallbladder(rng: np.random.Generator, look: Appearance, unit_px: int) -> list[Image.Image]:
    """Draw the gallbladder in `GALLBLADDER_STATES` states, from untouched to freed, as premultiplied RGBX sprites.

    It lies along x with its neck on the left. The peritoneum is opened from the neck on, and the organ empties and
    reddens. A frame shows a state, which does not reveal the phase.
    """
    width, height = (round(side * unit_px) for side in GALLBLADDER_UNITS)
    x, y = _grid(width, height, unit_px)
    warp, fine = noise(rng, width, height, 6), noise(rng, width, height, 26, octaves=3)
    veins = smoothstep(np.abs(noise(rng, width, height, 5, octaves=3)), 0.05, 0.0) * 0.5
    along = (x + 0.44) / 0.88  # 0 at the neck, 1 at the fundus
    u = np.clip(along, 0, 1)
    sprites = []
    for state in np.linspace(0, 1, GALLBLADDER_STATES):
        belly = (0.30 - 0.09 * state) * (u**0.75) * np.sqrt(np.clip(1 - u**4, 0, 1)) + 0.035
        beyond = np.clip(np.abs(along - 0.5) - 0.5, 0, 1)
        level = ((y + 0.03 * np.sin(4 * u)) / belly) ** 2 + 0.12 * warp + 40 * beyond
        inside = smoothstep(level, 1.06, 0.94)
        opened = smoothstep(u + 0.22 * warp, state * 1.05 - 0.05, state * 1.05 - 0.16) * (state > 0)
        skin = (look.bladder * (1 - 0.1 * state)) * (1 + 0.1 * warp + 0.05 * fine)[..., None]
        skin = skin * (1 - veins)[..., None] + np.array([150, 50, 45]) * veins[..., None]
        raw = np.array([168, 82, 56]) * (1 + 0.3 * warp + 0.45 * fine)[..., None]
        colour = skin * (1 - 0.75 * opened)[..., None] + raw * (0.75 * opened)[..., None]
        bump = 0.003 * look.bumpiness * fine * (1 + 2 * opened)
        dome = np.sqrt(np.clip(1 - level, 0, 1)) * belly * 0.9
        brightness, reflection = _relief(dome + bump, unit_px, look)
        lit = colour * brightness[..., None] + 0.7 * reflection[..., None]
        sprites.append(premultiplied(lit, inside))
    return sprites


def premultiplied(colour: np.ndarray, alpha: np.ndarray) -> Image.Image:
    """Return an RGBX image of colours (H, W, 3) multiplied by their opacity (H, W), 0 to 1."""
    return to_rgbx(np.clip(colour, 0, 255) * alpha[..., None], alpha * 255)


# ---------------------------------------------------------------------------------------------- what changes


def draw_blood(rng: np.random.Generator, unit_px: int) -> Image.Image:
    """Draw, as a grey image, the order in which blood covers the points of the canvas: points with 255 come first."""
    side = int(CANVAS_UNITS * unit_px)
    x, y = _grid(side, side, unit_px)
    near = np.exp(-(x**2 + (y - 0.15) ** 2) / 0.35)
    field_ = 0.5 + 0.4 * noise(rng, side, side, 10) + 0.35 * near - 0.2
    return Image.fromarray(np.clip(field_ * 190, 0, 255).astype(np.uint8))


def draw_smoke(rng: np.random.Generator, unit_px: int) -> Image.Image:
    """Draw the density of smoke, as a grey square of `CANVAS_UNITS`."""
    side = int(CANVAS_UNITS * unit_px)
    return Image.fromarray(np.clip(150 + 95 * noise(rng, side, side, 4, octaves=3), 0, 255).astype(np.uint8))


def draw_outside(rng: np.random.Generator, unit_px: int) -> list[Image.Image]:
    """Draw RGBX images that do not show the operating field: trocar tube, lens on tissue, drapes, black."""
    side = int(CANVAS_UNITS * unit_px)
    x, y = _grid(side, side, unit_px)
    warp = noise(rng, side, side, 5)
    shade = (1 + 0.15 * warp)[..., None]
    hole = ((x - rng.normal(0, 0.05)) ** 2 + (y - rng.normal(0, 0.05)) ** 2) / rng.uniform(0.16, 0.26) ** 2 + 0.1 * warp
    inside, rim = smoothstep(hole, 1.05, 0.95)[..., None], smoothstep(np.abs(hole - 0.75), 0.3, 0.0)[..., None]
    wall = np.array([188, 188, 198]) * shade * (0.75 + 0.25 * np.clip(np.hypot(x, y), 0, 1))[..., None]
    dark = np.array([52, 12, 12]) * shade + np.array([190, 120, 120]) * rim * smoothstep(y, 0.1, -0.25)[..., None]
    tube = wall * (1 - inside) + dark * inside + 170 * smoothstep(np.hypot(x * 0.8, y + 0.24), 0.2, 0.1)[..., None]
    close = np.array([214, 150, 70]) * rng.uniform(0.7, 1.1) * shade * smoothstep(x + 0.4 * warp, -0.8, 0.8)[..., None]
    folds = np.sin(9 * x + 5 * warp) * 0.2 + np.sin(4 * y - 3 * warp) * 0.2
    drapes = np.array([84, 112, 132]) * (1 + folds)[..., None]
    nothing = np.zeros_like(tube) + 10
    flat = np.zeros((side, side))
    return [to_rgbx(image, flat) for image in (tube, close, drapes, nothing)]
