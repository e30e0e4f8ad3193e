"""Convert a video's frames to the backbone's input. Training, extraction, joint training and prediction use this code.

The steps, in order:

1. Cut off the endoscope's black margin, if the settings say so (the same box for all frames of a video).
2. Resize to `resize_px`, without keeping the aspect ratio (as the reference programs do). Or, with `short_side_px`,
   resize with the aspect kept and cut out the centre. Pillow's antialiased filters compute in integers, so the result
   is the same on every machine.
3. Crop to `crop_px`.
4. Scale to [0, 1], and normalise with a mean and standard deviation per channel.

The frame cache stores frames after step 2. Letters in shapes: N frames, T frames of a clip, R resized size, S crop
size; frames need not be square, so that R x R stands for the height and width `resize_px`, and S x S for `crop_px`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from configs.errors import UserError
from configs.schema import AugmentConfig, PreprocessConfig, Size, height_width
from features.store import IMPORTED
from features.video.base import FrameReader

if TYPE_CHECKING:
    import torch

    Frames = TypeVar("Frames", np.ndarray, torch.Tensor)

Box = tuple[int, int, int, int]
CropCount = Literal[1, 5, 10]


# Weights of Rec. 601 luma, as used by the colour jitter of torchvision and Pillow.
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)
# From RGB to NTSC's YIQ. A rotation of hues by an angle is, for rows of RGB, the sum of the three matrices _HUE_PARTS
# times 1, its cosine and its sine.
_TO_YIQ = np.array([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
_ROTATED = ([[1, 0, 0], [0, 0, 0], [0, 0, 0]], [[0, 0, 0], [0, 1, 0], [0, 0, 1]], [[0, 0, 0], [0, 0, 1], [0, -1, 0]])
_HUE_PARTS = np.stack([(np.linalg.inv(_TO_YIQ) @ part @ _TO_YIQ).T for part in _ROTATED])
# A video's margin is determined from this many frames, evenly spaced over the whole video.
MARGIN_FRAMES = 12
# Pixels up to this value count as black, because of compression noise. A row or column of which 5 % is brighter belongs
# to the field of view.
_BLACK_LEVEL = 24
_BRIGHT_FRACTION = 0.05
_MOST_LONG_PX = 1 << 15


@dataclass(frozen=True)
class Geometry:
    """How the frames of one video are cut and resized.

    `box` is the part to keep, (left, top, right, bottom) in pixels, or None for the whole frame.
    """

    resize_px: Size
    box: Box | None = None
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    short_side_px: int | None = None
    crop_px: Size | None = None  # given if there is a `short_side_px`

    @classmethod
    def of_video(cls, config: PreprocessConfig, reader: FrameReader) -> Geometry:
        """Return the geometry of the video that `reader` reads. If the margin is to be cut off, a few frames are read.

        The box depends only on the video (not on sampling rate, epoch or worker), so it is the same in every mode.
        """
        return cls.each_of_video([config], reader)[0]

    @classmethod
    def each_of_video(cls, configs: Sequence[PreprocessConfig], reader: FrameReader) -> list[Geometry]:
        """As `of_video`, for several settings at once, so that the margin is looked for once."""
        cuts = any(config.cut_margin for config in configs)
        box = find_margin(reader.read(reader.spread(MARGIN_FRAMES))) if cuts else None
        return [
            cls(
                config.resize_px,
                box if config.cut_margin else None,
                config.interpolation,
                config.short_side_px,
                None if config.short_side_px is None else config.crop_px,
            )
            for config in configs
        ]

    def resize_frame(self, rgb: np.ndarray) -> np.ndarray:
        """Cut and resize a frame: (H, W, 3) uint8 -> (R, R, 3) uint8. A box beyond the frame is cut to the frame."""
        from PIL import Image

        if self.box is not None:
            left, top, right, bottom = self.box
            cut = rgb[top:bottom, left:right]
            rgb = cut if cut.size else rgb
        image = Image.fromarray(np.ascontiguousarray(rgb))
        height, width = self._size(*rgb.shape[:2])
        pixels = np.array(image.resize((width, height), Image.Resampling[self.interpolation.upper()]))
        return pixels if self.short_side_px is None else self._centre(pixels)

    def _size(self, height: int, width: int) -> tuple[int, int]:
        """The height and width to which a frame of this size is resized, with torchvision's rounding."""
        short = self.short_side_px
        if short is None:
            return height_width(self.resize_px)
        shorter, longer = sorted((height, width))
        # the limit protects against frames of extreme aspect, of which the centre alone is kept
        scaled = min(int(short * longer / shorter), _MOST_LONG_PX)
        return (short, scaled) if height <= width else (scaled, short)

    def _centre(self, pixels: np.ndarray) -> np.ndarray:
        """The centre of size R, placed so that its own centre crop is the one that torchvision's CenterCrop cuts out.

        CenterCrop rounds half pixels to even numbers, the later crop (`crop_frames`) rounds down.
        """
        stored, crop = height_width(self.resize_px), height_width(self.crop_px or self.resize_px)
        sizes = zip(pixels.shape, stored, crop, strict=False)
        top, left = (
            min(max(round((whole - cut) / 2) - (kept - cut) // 2, 0), whole - kept) for whole, kept, cut in sizes
        )
        return np.ascontiguousarray(pixels[top : top + stored[0], left : left + stored[1]])

    def to_json(self) -> dict[str, Any]:
        return {"resize_px": _plain(self.resize_px), "box": None if self.box is None else list(self.box)}


def different_geometries(configs: Sequence[PreprocessConfig]) -> tuple[list[PreprocessConfig], list[int]]:
    """Of the settings, those that resize differently, and for each of `configs` which of these resizes as it does."""
    different: list[PreprocessConfig] = []
    found: list[dict[str, Any]] = []
    for config in configs:
        geometry = geometry_json(config)
        if geometry not in found:
            found.append(geometry)
            different.append(config)
    return different, [found.index(geometry_json(config)) for config in configs]


def resize_each(geometries: Sequence[Geometry], rgb: np.ndarray) -> np.ndarray:
    """Resize a frame in each of the ways: (H, W, 3) uint8 -> (R, R, 3), or (P, 3) if there are several.

    With several geometries, the P pixels are those of all sizes, one size after the other; `split_sizes` separates
    them.
    """
    sizes = [geometry.resize_frame(rgb) for geometry in geometries]
    return sizes[0] if len(sizes) == 1 else np.concatenate([size.reshape(-1, 3) for size in sizes])


def split_sizes(frames: Frames, sizes_px: Sequence[Size]) -> list[Frames]:
    """Separate the sizes in a batch made by `resize_each`: (N, R, R, 3) or (N, P, 3) -> (N, R, R, 3) each."""
    if len(sizes_px) == 1:
        return [frames]
    found, end = [], 0
    for height, width in map(height_width, sizes_px):
        begin, end = end, end + height * width
        found.append(frames[:, begin:end].reshape(len(frames), height, width, 3))
    return found


def find_margin(frames: Iterable[np.ndarray]) -> Box | None:
    """Find the bounding box of the bright field of view, (left, top, right, bottom) in pixels; None without a margin.

    For each frame (H, W, 3), the box spans the rows and columns of which at least 5 % is brighter than black. Frames
    without such rows or columns are ignored (dark frames, or the scope is outside), and so are fields smaller than a
    quarter of the height or width. Each side of the result is a quartile over the frames (25 % for left and top, 75 %
    for right and bottom), so that neither dark frames nor a few wide frames change it.
    """
    boxes, size = [], (0, 0)
    for frame in frames:
        size = frame.shape[:2]
        if (box := field_of_view(frame)) is not None:
            boxes.append(box)
    return margin_of(boxes, size)


def field_of_view(frame: np.ndarray) -> Box | None:
    """The bright field of view of one frame (H, W, 3); None if it is too small (see `find_margin`)."""
    bright = frame.max(axis=-1) > _BLACK_LEVEL
    rows = np.flatnonzero(bright.mean(axis=1) > _BRIGHT_FRACTION)
    columns = np.flatnonzero(bright.mean(axis=0) > _BRIGHT_FRACTION)
    if len(rows) > frame.shape[0] / 4 and len(columns) > frame.shape[1] / 4:
        return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
    return None


def margin_of(boxes: Sequence[Box], size: Sequence[int]) -> Box | None:
    """The box of a video with these fields of view in frames of `size` (height, width); see `find_margin`."""
    if not boxes:
        return None
    sides = np.array(boxes)
    left, top = np.quantile(sides[:, :2], 0.25, axis=0, method="lower").tolist()
    right, bottom = np.quantile(sides[:, 2:], 0.75, axis=0, method="higher").tolist()
    box = (int(left), int(top), int(right), int(bottom))
    return None if box == (0, 0, size[1], size[0]) else box


def crop_frames(frames: Frames, crop_px: Size, count: CropCount = 1) -> Frames:
    """Cut crops for evaluation from frames of any data type: (N, R, R, 3) -> (N, count, S, S, 3).

    With `count` 1, this is the centre (a view, with offset (R - S) // 2 on each axis). With 5: top left, top right,
    bottom left, bottom right, centre. With 10: these five, then the five of the frame mirrored left to right
    (torchvision's order).
    """
    below, right = _rest(frames.shape[1:3], crop_px)
    centre = (below // 2, right // 2)
    if count == 1:
        return _cut(frames, *centre, crop_px)[:, None]  # type: ignore[no-any-return]
    offsets = [(0, 0), (0, right), (below, 0), (below, right), centre]
    sources = [frames, _mirrored(frames)] if count == 10 else [frames]
    crops: Any = [_cut(source, top, left, crop_px) for source in sources for top, left in offsets]
    if isinstance(frames, np.ndarray):
        return np.stack(crops, axis=1)  # type: ignore[return-value]
    import torch

    return torch.stack(crops, dim=1)  # type: ignore[return-value]


def _rest(size: Sequence[int], crop_px: Size) -> tuple[int, int]:
    """How many rows and columns of a frame of `size` (height, width) a crop leaves over. Raises ValueError if none."""
    height, width = height_width(crop_px)
    below, right = size[0] - height, size[1] - width
    if min(below, right) < 0:
        raise ValueError(f"cannot crop {height} x {width} from {size[0]} x {size[1]} pixels")
    return below, right


def _cut(frames: Any, top: int, left: int, crop_px: Size) -> Any:
    height, width = height_width(crop_px)
    return frames[..., top : top + height, left : left + width, :]


def _mirrored(frames: Any) -> Any:
    return frames[..., ::-1, :] if isinstance(frames, np.ndarray) else frames.flip(-2)


def augment_generator(seed: int, epoch: int, sample: int) -> np.random.Generator:
    """Return the random generator for one sample in one epoch, the same in every worker process and after resuming."""
    return np.random.default_rng([seed, epoch, sample])


@dataclass(frozen=True)
class Draw:
    """One random augmentation: place and size of the crop, mirroring, and change of colours."""

    top: int
    left: int
    flip: bool
    # (3,) factors for brightness, contrast and saturation, or (4,) with the shift of hues, a fraction of the circle
    colour: NDArray[np.float32]
    window: tuple[int, int] | None = None  # height and width of a crop that is resized; None: as large as needed

    def crop(self, frames: Frames, crop_px: Size) -> Frames:
        """(T, R, R, 3) uint8 -> (T, S, S, 3); a view, unless the crop is resized."""
        cut: Frames = _cut(frames, self.top, self.left, self.window or crop_px)
        return cut if self.window is None else _resized(cut, crop_px)


def _resized(frames: Frames, size_px: Size) -> Frames:
    """Resize (T, H, W, 3) uint8 with torch's antialiased filter, which takes a fifth of Pillow's time."""
    import torch

    planes, size = torch.as_tensor(frames).permute(0, 3, 1, 2), height_width(size_px)
    planes = torch.nn.functional.interpolate(planes, size, mode="bilinear", antialias=True)
    pixels = planes.permute(0, 2, 3, 1)
    return pixels.numpy() if isinstance(frames, np.ndarray) else pixels


def draw_change(generator: np.random.Generator, config: AugmentConfig, resize_px: Size, crop_px: Size) -> Draw:
    """Draw a random augmentation for frames of `resize_px`.

    The number of values drawn is always the same, so that enabling one kind of change does not alter the others.
    """
    below, right = _rest(height_width(resize_px), crop_px)
    if below == right:  # one call, which draws what earlier versions drew
        top, left = generator.integers(0, below + 1, size=2).tolist()
    else:
        top, left = (int(generator.integers(0, rest + 1)) for rest in (below, right))
    flip = bool(generator.random() < 0.5) and config.flip
    signed = generator.uniform(-1.0, 1.0, size=3).astype(np.float32)
    shift, *fractions = generator.random(5)  # after everything that earlier versions drew
    if config.crop == "centre":
        top, left = below // 2, right // 2
    strength = np.array([config.brightness, config.contrast, config.saturation], dtype=np.float32)
    colour = 1 + strength * signed
    if config.hue:
        colour = np.append(colour, np.float32(config.hue * (2 * shift - 1)))
    if config.scale is None:
        return Draw(top, left, flip, colour)
    top, left, window = _window(fractions, config.scale, config.aspect, height_width(resize_px), height_width(crop_px))
    return Draw(top, left, flip, colour, window)


def _window(
    fractions: Sequence[float],
    scale: tuple[float, float],
    aspect: float,
    frame: tuple[int, int],
    crop: tuple[int, int],
) -> tuple[int, int, tuple[int, int]]:
    """Top, left and (height, width) of a random window of `frame` (height, width), which has the aspect of `crop`.

    As in Inception's crops (Szegedy et al., CVPR 2015), areas are uniform, here between the fractions `scale` of the
    largest such window, and the factor by which the aspect differs is log-uniform between 1 / aspect and aspect. Sides
    that then exceed the frame are cut to it, which only lessens this factor. `fractions` are four random numbers in
    [0, 1): area, aspect, top and left.
    """
    ratio = crop[0] / crop[1]  # height to width
    largest = min(frame[0], frame[1] * ratio)  # height
    area = (scale[0] + fractions[0] * (scale[1] - scale[0])) * largest**2 / ratio
    ratio *= aspect ** (2 * fractions[1] - 1)
    height, width = (area * ratio) ** 0.5, (area / ratio) ** 0.5
    window = (min(frame[0], max(1, round(height))), min(frame[1], max(1, round(width))))
    top, left = (int(part * (whole - side + 1)) for part, whole, side in zip(fractions[2:], frame, window, strict=True))
    return top, left, window


def changes_colour(config: AugmentConfig) -> bool:
    """Whether the settings ask for changes of colour."""
    return bool(config.brightness or config.contrast or config.saturation or config.hue)


def augment(frames: Frames, generator: np.random.Generator, config: AugmentConfig, crop_px: Size) -> Frames:
    """Crop and mirror all frames of a clip in the same random way: (T, R, R, 3) uint8 -> (T, S, S, 3).

    Colours are not changed here.
    """
    draw = draw_change(generator, config, (frames.shape[1], frames.shape[2]), crop_px)
    cut = draw.crop(frames, crop_px)
    changed: Any = _mirrored(cut) if draw.flip else cut
    dense: Any = np.ascontiguousarray(changed) if isinstance(changed, np.ndarray) else changed.contiguous()
    return dense  # type: ignore[no-any-return]


def changed_images(
    images: torch.Tensor,
    flip: torch.Tensor,
    colour: torch.Tensor,
    config: PreprocessConfig,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Mirror a batch, change its colours and normalise it on `device`: (N, S, S, 3) uint8 -> (N, 3, S, S) float32.

    `flip` (N,) bool says which frames to mirror. `colour` (N, 3) contains factors for brightness, contrast (relative to
    each frame's mean luma) and saturation (relative to each pixel's luma), and `colour` (N, 4) also the shift of hues.
    They are applied in this order, and results are clamped to 0..255 but not rounded. If `colour` is empty (0, 3),
    colours do not change. Bytes are copied to the device (asynchronously if they are pinned) and converted to floats
    there.
    """
    import torch

    pixels = images.to(device, non_blocking=True)
    mirror = flip.to(device, non_blocking=True)[:, None, None, None]
    pixels = torch.where(mirror, pixels.flip(2), pixels)
    if not len(colour):
        return normalise(pixels, config, device)
    return _normalised(_jittered(pixels.float(), colour.to(device, non_blocking=True)), config)


def _jittered(pixels: torch.Tensor, colour: torch.Tensor) -> torch.Tensor:
    """Change the colours of `pixels` (N, S, S, 3) float32 by `colour` (N, 3 or 4), in place where that is safe."""
    luma = _constants(_LUMA.tolist(), pixels.device)
    brightness, contrast, saturation = (factor[:, None, None, None] for factor in colour[:, :3].unbind(1))
    pixels = pixels.mul_(brightness)
    mean = (pixels @ luma).mean(dim=(1, 2))[:, None, None, None]
    pixels = pixels.sub_(mean).mul_(contrast).add_(mean)
    grey = (pixels @ luma)[..., None]
    pixels = pixels.sub_(grey).mul_(saturation).add_(grey)
    if colour.shape[1] > 3:
        pixels = (pixels.flatten(1, 2) @ _hue_rotations(colour[:, 3])).view(pixels.shape)
    return pixels.clamp_(0, 255)


def _hue_rotations(shift: torch.Tensor) -> torch.Tensor:
    """Matrices (N, 3, 3) that shift the hues of RGB rows by fractions `shift` (N,) of the circle, at equal luma.

    They rotate the plane of chrominance in NTSC's YIQ space, from red towards green. That is linear, and 20 times as
    fast on a CPU as the conversion to HSV and back in torchvision's ColorJitter, which keeps the value and not the
    luma.
    """
    parts = _constants(_HUE_PARTS.flatten().tolist(), shift.device).view(3, 3, 3)
    angle = (2 * np.pi * shift)[:, None, None]
    return parts[0] + angle.cos() * parts[1] + angle.sin() * parts[2]


def normalise(
    frames: np.ndarray | torch.Tensor, config: PreprocessConfig, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Normalise frames on `device`: (N, S, S, 3) uint8 -> (N, 3, S, S) float32, (x / 255 - mean) / std.

    Bytes are copied to the device and converted there. The result has the memory layout `channels_last`, in which
    convolutions are faster on CPUs and newer GPUs.
    """
    import torch

    pixels = torch.as_tensor(frames).to(device, non_blocking=True)
    if pixels.dtype != torch.uint8:
        raise ValueError(f"frames must be uint8, not {pixels.dtype}")
    return _normalised(pixels.float(), config)


def _constants(values: Sequence[float], device: torch.device) -> torch.Tensor:
    """Make a float32 tensor directly on the device; copying a list to a GPU waits for all work queued there."""
    import torch

    return torch.cat([torch.full((1,), value, dtype=torch.float32, device=device) for value in values])


def _normalised(pixels: torch.Tensor, config: PreprocessConfig) -> torch.Tensor:
    """Normalise floats in 0..255 as `normalise` does; they are overwritten."""
    import torch

    # Compute on entire rows of pixels: broadcasting over only the three channels is 15 times slower on a CPU.
    width = pixels.shape[2]
    mean = _constants(config.mean, pixels.device).repeat(width)
    std = _constants(config.std, pixels.device).repeat(width)
    rows = pixels.reshape(-1, 3 * width)
    images = rows.div_(255).sub_(mean).div_(std).view(pixels.shape).permute(0, 3, 1, 2)
    return images.contiguous(memory_format=torch.channels_last)


def preprocess_json(config: PreprocessConfig) -> dict[str, Any]:
    """Return everything that changes the backbone's input, including library and filter.

    It is part of the encoder's identity.
    """
    crop = {"crop": "centre", "crop_px": _plain(config.crop_px)}
    return {**geometry_json(config), **crop, "scale": "1/255", "mean": list(config.mean), "std": list(config.std)}


def require_extracted(recorded: Any, where: str) -> None:
    """Raise UserError if a record of preprocessing is that of imported features, since no frame can be made so."""
    if isinstance(recorded, Mapping) and IMPORTED in recorded:
        raise UserError(
            f"{where}: trained on imported features, whose encoder and preprocessing are not known here: `evaluate` "
            "scores such features, but commands that read frames, such as `predict`, cannot compute them"
        )


def preprocess_from_json(recorded: Any, where: str) -> PreprocessConfig:
    """Return the settings that a record made by `preprocess_json` describes.

    Raises UserError if another version made the record, or if the features were imported.
    """
    require_extracted(recorded, where)
    try:
        config = PreprocessConfig(
            cut_margin=recorded["cut_margin"] is not None,
            **{key: recorded[key] for key in ("resize_px", "crop_px", "mean", "std")},
            **{key: recorded[key] for key in ("short_side_px", "interpolation") if key in recorded},
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{where}: does not record how its frames were preprocessed; train it again") from error
    if preprocess_json(config) != recorded:
        raise UserError(f"{where}: its frames were preprocessed in a way unknown to this version; train it again")
    return config


def geometry_json(config: PreprocessConfig) -> dict[str, Any]:
    """Return the settings of the steps before the crop, which identify cached frames."""
    margin = {"frames": MARGIN_FRAMES, "black_level": _BLACK_LEVEL, "bright_share": _BRIGHT_FRACTION}
    aspect = "not kept" if config.short_side_px is None else "kept"
    found = {
        "resize_px": _plain(config.resize_px),
        "resize": f"Pillow {config.interpolation}, antialiased, aspect {aspect}",
        "cut_margin": margin if config.cut_margin else None,
        **config.model_dump(mode="json", include={"short_side_px", "interpolation"}),
    }
    # where the centre lies depends on the crop that is cut out of it later
    return found if config.short_side_px is None else {**found, "crop_px": _plain(config.crop_px)}


def _plain(size: Size) -> int | list[int]:
    return size if isinstance(size, int) else list(size)
