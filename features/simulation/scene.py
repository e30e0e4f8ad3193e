"""Draw the frames of a simulated operation from its labels.

`Scene` draws anatomy and tools once, plans all movements of the video, and then blends one frame at a time. A single
frame deliberately says little about the phase: the gallbladder's state starts, grows and fluctuates differently in
every video. The dissection of Calot's triangle and that of the gallbladder therefore look alike, and only the preceding
frames distinguish them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import numpy as np
from PIL import Image, ImageFilter

from configs.dataset_spec import DataSetSpec
from features.run_lengths import true_spans
from features.simulation import anatomy, instruments
from features.simulation.anatomy import smoothstep

_BAG = "SpecimenBag"
_ENERGY_TOOLS = ("Hook", "Bipolar")
# Direction from which each tool enters, in degrees (y down). It varies with a standard deviation of 15 between videos
# and of 8 between presences.
_ENTRY_DEG = {"Grasper": 188, "Bipolar": 15, "Hook": -8, "Scissors": -50, "Clipper": 8, "Irrigator": 55}
_TROCAR_UNITS = 1.05
_SLIDE_IN_S = 0.4
_INERTIA_S = 0.3
# The fraction of runs without any tool that do not show the operating field, and the image that these show.
_OUTSIDE_P = {"Preparation": 0.3, "GallbladderRetraction": 0.4, "GallbladderPackaging": 0.15}
_OUTSIDE_P_ELSEWHERE = 0.12
_OUTSIDE_KINDS = (0.45, 0.3, 0.15, 0.1)  # trocar tube, lens on tissue, drapes, black
GRAIN_SHIFTS = 64
_BILINEAR = Image.Resampling.BILINEAR
_Point = tuple[float, float]


class Scene:
    """The frames of one video. `for frame in Scene(...)` yields T frames (H, W, 3) uint8 RGB.

    `phase` (T,) and `tools` (T, K) are the labels of each frame, with classes in the order of `spec`.
    """

    def __init__(
        self,
        rng: np.random.Generator,
        phase: np.ndarray,
        tools: np.ndarray,
        spec: DataSetSpec,
        fps: float,
        size_px: tuple[int, int],
    ) -> None:
        look_rng, plan_rng = rng.spawn(2)
        self._look = anatomy.Appearance(look_rng)
        self._tool_names = spec.tools
        self._unit_px = min(size_px)
        self._size_px = size_px  # width, height
        self._draw_all(look_rng)
        self.plan = Plan(plan_rng, phase, tools.astype(bool), spec, fps)

    def __len__(self) -> int:
        return len(self.plan.zoom)

    def __iter__(self) -> Iterator[np.ndarray]:
        for index in range(len(self)):
            yield self.frame(index)

    def _draw_all(self, rng: np.random.Generator) -> None:
        unit_px, look = self._unit_px, self._look
        self._organs = anatomy.draw_organs(rng, look, unit_px)
        self._bladder = anatomy.draw_gallbladder(rng, look, unit_px)
        self._blood = anatomy.draw_blood(rng, unit_px)
        self._smoke = anatomy.draw_smoke(rng, unit_px)
        self._outside = anatomy.draw_outside(rng, unit_px)
        materials = instruments.Materials(rng)
        self._sprites = [
            instruments.draw_bag(rng, materials, unit_px)
            if name == _BAG
            else instruments.draw_tool(name, materials, unit_px)
            for name in self._tool_names
        ]
        self._lamp = self._draw_lamp(rng)
        # Grain is one tile, larger than the frame, that is shifted from frame to frame: drawing new noise for each
        # frame would take longer than everything else.
        tile = (self._size_px[1] + GRAIN_SHIFTS, self._size_px[0] + GRAIN_SHIFTS, 1)
        self._grain = rng.normal(0, 2.2, tile).astype(np.float32)

    def _draw_lamp(self, rng: np.random.Generator) -> np.ndarray:
        """Return one factor (H, W, 3) float32 for white balance, light fall-off and the round field of view."""
        width, height = self._size_px
        x = (np.arange(width, dtype=np.float32) + 0.5 - width / 2) / self._unit_px
        y = (np.arange(height, dtype=np.float32) + 0.5 - height / 2) / self._unit_px
        centre = rng.normal(0, 0.1, 2)
        distance = np.hypot(x[None, :] - centre[0], y[:, None] - centre[1])
        light = 1.12 - rng.uniform(0.5, 1.1) * distance**2
        view = np.clip((self._look.view_radius - np.hypot(x[None, :], y[:, None])) * self._unit_px + 0.5, 0, 1)
        factor = (np.clip(light, 0.25, None) * view)[..., None].astype(np.float32)
        return factor * self._look.white_balance.astype(np.float32)

    def frame(self, index: int) -> np.ndarray:
        """Draw frame `index`, (H, W, 3) uint8 RGB."""
        plan = self.plan
        if plan.outside[index] >= 0:
            image = self._seen(self._outside[plan.outside[index]], index)[..., :3].astype(np.float32)
        else:
            image = self.field(index)
        image *= self._lamp * np.float32(plan.exposure[index])
        if plan.smoke[index] > 0.02:
            self._add_smoke(image, index)
        shift_y, shift_x = plan.grain_shift[index]
        width, height = self._size_px
        image += self._grain[shift_y : shift_y + height, shift_x : shift_x + width]
        pixels = np.clip(image, 0, 255).astype(np.uint8)
        radius_px = float(plan.blur[index]) * self._unit_px
        if radius_px > 0.4:
            return np.asarray(Image.fromarray(pixels).filter(ImageFilter.BoxBlur(radius_px)))
        return pixels

    def field(self, index: int) -> np.ndarray:
        """Draw organs, blood, gallbladder, highlights and tools, without lamp and smoke: (H, W, 3) float32."""
        plan = self.plan
        seen = self._seen(self._organs, index)
        image, reflection = seen[..., :3].astype(np.float32), seen[..., 3]
        if plan.blood[index] > 8:
            cover = self._seen(self._blood, index).astype(np.float32) + np.float32(plan.blood[index] - 255.0)
            cover = np.clip(cover * np.float32(1 / 60), 0, 0.82)[..., None]
            image += (np.array([104, 10, 10], dtype=np.float32) - image) * cover
        highlight = np.clip((reflection.astype(np.float32) - np.float32(plan.glare[index])) * np.float32(4.0), 0, 190)
        image += highlight[..., None]
        if plan.bladder_shown[index]:
            state = min(int(plan.bladder_state[index] * len(self._bladder)), len(self._bladder) - 1)
            shift_x, shift_y, turn = plan.bladder_swing[index]
            angle = self._look.bladder_angle + turn + plan.roll[index]
            x, y = self._to_view(np.array([shift_x, shift_y - 0.05]), index)
            self._paste(image, self._bladder[state], (x, y), (0.32, 0.5), angle, plan.zoom[index])
        # The bag is behind the tools that hold and clean it, so it is drawn first.
        shown = sorted(np.flatnonzero(plan.tool_shown[index]), key=lambda k: self._tool_names[k] != _BAG)
        for k in shown:
            anchor = (0.5, 0.5) if self._tool_names[k] == _BAG else (instruments.WORKING_POINT, 0.5)
            sprite = self._sprites[k][plan.tool_opening[index, k]]
            tip = plan.tool_tip[index, k]
            self._paste(image, sprite, (tip[0], tip[1]), anchor, plan.tool_angle[index, k], plan.tool_scale[index, k])
        return image

    def _to_view(self, point: np.ndarray, index: int) -> tuple[float, float]:
        """Convert a point of the canvas to a position in the image, both in units from the centre."""
        plan = self.plan
        cos, sin = math.cos(plan.roll[index]), math.sin(plan.roll[index])
        x, y = (point - plan.pan[index]) * plan.zoom[index]
        return cos * x - sin * y, sin * x + cos * y

    def _seen(self, canvas: Image.Image, index: int) -> np.ndarray:
        """Return what the camera sees of a canvas, (H, W) or (H, W, 4) uint8."""
        plan = self.plan
        width, height = self._size_px
        centre = (
            canvas.width / 2 + plan.pan[index, 0] * self._unit_px,
            canvas.height / 2 + plan.pan[index, 1] * self._unit_px,
        )
        affine = _affine(plan.roll[index], plan.zoom[index], centre, (-width / 2, -height / 2))
        return np.asarray(canvas.transform((width, height), Image.Transform.AFFINE, affine, _BILINEAR))

    def _paste(
        self, image: np.ndarray, sprite: Image.Image, point: _Point, anchor: _Point, angle: float, scale: float
    ) -> None:
        """Draw a premultiplied sprite, rotated and scaled, with its `anchor` (as fractions of its sides) at `point`."""
        width, height = self._size_px
        at_x, at_y = width / 2 + point[0] * self._unit_px, height / 2 + point[1] * self._unit_px
        cos, sin = math.cos(angle), math.sin(angle)
        anchor_x, anchor_y = anchor[0] * sprite.width, anchor[1] * sprite.height
        corner_x = (np.array([0, sprite.width, 0, sprite.width]) - anchor_x) * scale
        corner_y = (np.array([0, 0, sprite.height, sprite.height]) - anchor_y) * scale
        xs, ys = at_x + cos * corner_x - sin * corner_y, at_y + sin * corner_x + cos * corner_y
        left, right = max(0, math.floor(xs.min())), min(width, math.ceil(xs.max()))
        top, bottom = max(0, math.floor(ys.min())), min(height, math.ceil(ys.max()))
        if right <= left or bottom <= top:
            return
        affine = _affine(angle, scale, (anchor_x, anchor_y), (left - at_x, top - at_y))
        laid = np.asarray(sprite.transform((right - left, bottom - top), Image.Transform.AFFINE, affine, _BILINEAR))
        below = image[top:bottom, left:right]
        below *= (255.0 - laid[..., 3:]) * np.float32(1 / 255)
        below += laid[..., :3]

    def _add_smoke(self, image: np.ndarray, index: int) -> None:
        density = self._seen(self._smoke, (index * 7) % len(self)).astype(np.float32)
        density *= np.float32(self.plan.smoke[index] / 255)
        image += (np.float32(178.0) * np.minimum(self._lamp, 1) - image) * density[..., None]


def _affine(angle: float, scale: float, anchor: _Point, offset: _Point) -> tuple[float, ...]:
    """Return Pillow's coefficients of the affine map from output pixels to the canvas.

    The canvas is rotated by `angle` and scaled by `scale` about its point `anchor`. `offset` is the vector from the
    anchor to the output's corner, in output pixels.
    """
    cos, sin = math.cos(angle) / scale, math.sin(angle) / scale
    left, top = anchor[0] + cos * offset[0] + sin * offset[1], anchor[1] - sin * offset[0] + cos * offset[1]
    return cos, sin, left, -sin, cos, top


# ---------------------------------------------------------------------------------------------- movements


class Plan:
    """All movements of a video, one row per frame, drawn to fit the frames' labels `phase` (T,) and `tools` (T, K)
    bool.

    Lengths are in units (see `features.simulation.anatomy`), angles in radians.
    """

    def __init__(
        self, rng: np.random.Generator, phase: np.ndarray, tools: np.ndarray, spec: DataSetSpec, fps: float
    ) -> None:
        frames = len(phase)
        # (T,) index of the image outside the body, or -1 for inside
        self.outside = _draw_outside(rng, phase, tools, spec)
        energy = _any_tool(tools, [k for k, name in enumerate(spec.tools) if name in _ENERGY_TOOLS])
        rinse = _any_tool(tools, [spec.tools.index("Irrigator")])
        burning = energy & (_wander(rng, frames, fps, 1.0)[:, 0] > -0.1)
        haze = np.maximum(0, 0.16 * _wander(rng, frames, fps, 8.0)[:, 0] - 0.12)
        camera = _wander(rng, frames, fps, 6.0, 6)
        # (T,) 0 to 1, and (T,) bool
        self.bladder_state, self.bladder_shown = _bladder(rng, phase, spec, fps)
        swing = _wander(rng, frames, fps, 4.0, 3) * (0.05, 0.05, 0.16) + rng.normal(0, 1, 3) * (0.05, 0.05, 0.2)
        freed = smoothstep(self.bladder_state, 0.85, 1.0)[:, None] * (0.18, 0.22, 0.9)
        self.bladder_swing = swing + freed  # (T, 3) shift x, y and rotation
        self.tool_shown = tools  # (T, K) bool
        # (T, K, 2), (T, K), (T, K), and (T, K) index of the sprite
        self.tool_tip, self.tool_angle, self.tool_scale, self.tool_opening = _tools(rng, tools, spec, fps)
        self.pan = camera[:, :2] * 0.1 + rng.normal(0, 0.06, 2)  # (T, 2)
        self.zoom = np.clip(rng.uniform(0.9, 1.3) * np.exp(0.13 * camera[:, 2]), 0.72, 1.7)  # (T,)
        self.roll = camera[:, 3] * 0.1 + rng.normal(0, 0.2)  # (T,)
        self.exposure = np.exp(0.1 * camera[:, 4])  # (T,)
        self.glare = np.clip(205 + 18 * camera[:, 5] + rng.normal(0, 10), 150, 250)  # (T,) threshold of highlights
        self.blur = np.clip(0.006 * (_wander(rng, frames, fps, 1.0)[:, 0] - 1.2), 0, 0.012)  # (T,) radius
        self.smoke = np.clip(_leak(burning * 0.5, fps, rise_s=0.6, fall_s=1.5) + haze, 0, 0.62)  # (T,) 0 to 1
        self.blood = _blood(rng, energy, rinse, fps)  # (T,) 0 to 255
        self.grain_shift = rng.integers(0, GRAIN_SHIFTS, (frames, 2))  # (T, 2) pixels


def _any_tool(tools: np.ndarray, columns: Iterable[int]) -> np.ndarray:
    """Return whether one of the tools in `columns` is present, (T,) bool."""
    return np.asarray(tools[:, list(columns)].any(axis=1))


def _wander(rng: np.random.Generator, frames: int, fps: float, memory_s: float, columns: int = 1) -> np.ndarray:
    """Draw smooth random functions of time with unit variance and a correlation time of `memory_s`, (T, columns).

    They are Ornstein-Uhlenbeck processes, smoothed by a low-pass filter (`_INERTIA_S`).
    """
    keep, slow = (math.exp(-1 / (fps * time_s)) for time_s in (memory_s, _INERTIA_S))
    kicks = rng.normal(0, math.sqrt(1 - keep * keep), (frames, columns))
    course = np.empty((frames, columns))
    pushed = smooth = rng.normal(0, 1, columns)
    for index in range(frames):
        pushed = keep * pushed + kicks[index]
        smooth = slow * smooth + (1 - slow) * pushed
        course[index] = smooth
    # Variance of a first-order process after a first-order low-pass filter.
    return course / math.sqrt((1 - slow) * (1 + keep * slow) / ((1 + slow) * (1 - keep * slow)))


def _leak(source: np.ndarray, fps: float, rise_s: float, fall_s: float) -> np.ndarray:
    """Low-pass filter `source` (T,), with different time constants for rising and falling."""
    rise, fall = 1 - math.exp(-1 / (fps * rise_s)), 1 - math.exp(-1 / (fps * fall_s))
    course = np.empty(len(source))
    value = 0.0
    for index, wanted in enumerate(source):
        value += (wanted - value) * (rise if wanted > value else fall)
        course[index] = value
    return course


def _draw_outside(rng: np.random.Generator, phase: np.ndarray, tools: np.ndarray, spec: DataSetSpec) -> np.ndarray:
    """Draw which image outside the body each frame shows, (T,), -1 for none.

    Only runs without a tool can show one, because tools in the labels must be visible.
    """
    outside = np.full(len(phase), -1)
    for start, end in true_spans(~_any_tool(tools, range(len(spec.tools)))):
        chance = _OUTSIDE_P.get(spec.phases[phase[start]], _OUTSIDE_P_ELSEWHERE)
        if rng.random() < chance:
            outside[start:end] = rng.choice(len(_OUTSIDE_KINDS), p=_OUTSIDE_KINDS)
    return outside


def _bladder(
    rng: np.random.Generator, phase: np.ndarray, spec: DataSetSpec, fps: float
) -> tuple[np.ndarray, np.ndarray]:
    """Draw the state of the gallbladder, (T,) from 0 (untouched) to 1 (freed), and whether it is visible, (T,) bool."""
    progress = np.zeros(len(phase))
    reached = 0.0
    for name, gain in (("CalotTriangleDissection", 0.45), ("ClippingCutting", 0.05), ("GallbladderDissection", 0.5)):
        during = phase == spec.phases.index(name)
        if during.any():
            first = int(np.argmax(during))
            last = len(phase) - int(np.argmax(during[::-1]))
            progress[first:last] = reached + gain * np.linspace(0, 1, last - first)
            progress[last:] = reached + gain
        reached += gain
    wavering = 0.13 * _wander(rng, len(phase), fps, 10.0)[:, 0]
    state = np.clip(rng.uniform(0, 0.35) + rng.uniform(0.2, 0.6) * progress + wavering, 0, 1)
    state[progress == 0] *= 0.6
    packed = np.flatnonzero(phase == spec.phases.index("GallbladderPackaging"))
    shown = np.ones(len(phase), dtype=bool)
    if len(packed):
        shown[packed[int(rng.uniform(0.1, 0.7) * len(packed))] :] = False
    return state, shown


def _blood(rng: np.random.Generator, energy: np.ndarray, rinse: np.ndarray, fps: float) -> np.ndarray:
    """Draw how far blood has spread, (T,) 0 to 255: it appears in bursts, drains slowly and is rinsed away."""
    level = np.empty(len(energy))
    value = rng.uniform(0, 120)
    bursts = rng.random(len(energy)) < np.where(energy, 0.06, 0.015) / fps
    heights = rng.uniform(40, 130, len(energy))
    for index in range(len(energy)):
        value = min(230.0, value + heights[index]) if bursts[index] else value
        value *= math.exp(-(0.12 if rinse[index] else 0.012) / fps)
        level[index] = value
    return level


def _tools(
    rng: np.random.Generator, tools: np.ndarray, spec: DataSetSpec, fps: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Draw the position of each tool's working point (T, K, 2), angle (T, K), scale (T, K) and opening (T, K)."""
    frames, kinds = tools.shape
    tip, angle = np.zeros((frames, kinds, 2)), np.zeros((frames, kinds))
    scale, opening = np.ones((frames, kinds)), np.zeros((frames, kinds), dtype=np.int64)
    for k, name in enumerate(spec.tools):
        course = _wander(rng, frames, fps, 1.5, 4)
        scale[:, k] = rng.uniform(0.95, 1.25) * np.exp(0.08 * course[:, 2])
        opening[:, k] = np.clip(np.floor((course[:, 3] + 1.2) / 0.8), 0, instruments.OPENINGS - 1)
        home = rng.normal(0, 0.06, 2)
        if name == _BAG:
            tip[:, k] = home + (0.0, 0.16) + 0.1 * course[:, :2]
            angle[:, k] = 0.35 * course[:, 2] + rng.normal(0, 0.3)
            continue
        entry = math.radians(_ENTRY_DEG[name] + rng.normal(0, 15))
        work = home + (0.06 * math.cos(entry), 0.06 * math.sin(entry)) + 0.11 * course[:, :2]
        for start, end in true_spans(tools[:, k]):
            turned = entry + math.radians(rng.normal(0, 8))
            trocar = _TROCAR_UNITS * np.array([math.cos(turned), math.sin(turned)])
            age_s = (np.minimum(np.arange(end - start), np.arange(end - start)[::-1]) + 0.5) / fps
            inside = 0.84 + 0.16 * np.minimum(1, age_s / _SLIDE_IN_S)[:, None]
            tip[start:end, k] = trocar + (work[start:end] - trocar) * inside
            towards = tip[start:end, k] - trocar
            angle[start:end, k] = np.arctan2(towards[:, 1], towards[:, 0])
    return tip, angle, scale, opening
