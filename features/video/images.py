"""Read frames from a folder of images, and decode single images, with Pillow."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from features.video.base import MAX_PIXELS, FrameReader, ReaderError, spread_evenly

# The only image formats that are read. Pillow knows many more, and runs other programs for some (Ghostscript for EPS).
_IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
_IMAGE_MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"})


class FolderReader(FrameReader):
    """Reads the images of a folder (PNG or JPEG) with Pillow. Images may have different sizes.

    `names` contains the file name of each source frame that has an image, in the order of frame numbers.
    """

    name = "pillow"

    def __init__(self, folder: Path, names: Mapping[int, str]) -> None:
        import PIL

        if not names:
            raise ReaderError(f"{folder}: contains no images; leave it out")
        self.version = PIL.__version__
        self.frame_count = max(names) + 1
        self.path = folder
        self._names = names

    def _frames(self, wanted: list[int]) -> Iterator[np.ndarray]:
        """See FrameReader; only source frames that have an image can be read."""
        missing = next((k for k in wanted if k not in self._names), None)
        if missing is not None:
            raise ReaderError(f"{self.path}: has no image of frame {missing}; rebuild the index")
        paths = ((k, self.path / self._names[k]) for k in wanted)
        return (decode_image(path, str(path), k) for k, path in paths)

    def spread(self, count: int) -> list[int]:
        return spread_evenly(list(self._names), count)


def decode_image(source: Path | BinaryIO, place: str, number: int) -> np.ndarray:
    """Decode an image (PNG, JPEG) to (H, W, 3) uint8 RGB, with its EXIF rotation applied.

    `place` and the frame's `number` are used in messages. Raises ReaderError if the image is missing, damaged, too
    large or not 8-bit colour.
    """
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns about large images, which are checked here, and odd EXIF
            with Image.open(source, formats=_IMAGE_FORMATS) as image:
                _refuse_odd(image, place)
                return np.array(ImageOps.exif_transpose(image).convert("RGB"))
    except FileNotFoundError as error:
        raise ReaderError(f"{place}: no such image (frame {number}); rebuild the index") from error
    except Image.DecompressionBombError as error:
        raise ReaderError(f"{place}: this image is too large to decode; replace it") from error
    except (OSError, SyntaxError, ValueError) as error:  # Pillow raises all three for damaged files
        raise ReaderError(
            f"{place}: damaged or not an image, frame {number} cannot be read; replace it or leave the video out"
        ) from error


def _refuse_odd(image: Any, place: str) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise ReaderError(f"{place}: this image is too large to decode ({image.width} x {image.height} pixels)")
    if image.mode not in _IMAGE_MODES:
        raise ReaderError(f"{place}: its pixels have mode {image.mode}, not 8-bit colour; save it as RGB")
