"""Draw a band below a video's frames that shows the predictions: phase and confidence, tools, and the phases so far."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluation.metrics.tools import DEFAULT_THRESHOLD
from evaluation.reports.paper_figures import phase_colours
from features.run_lengths import runs

_BACKGROUND, _TEXT, _FAINT = (24, 24, 24), (240, 240, 240), (110, 110, 110)
_SMALLEST_BAND_PX = 48
_FRACTION = 0.14  # height of the band as a fraction of the frame's height


class Overlay:
    """Draws the predictions of one video below its frames, which have `width_px` x `height_px` pixels.

    `probabilities` is (T, C), and `tools` is (T, K) or None. Only samples up to the current one are drawn, since no
    others are known during an operation.
    """

    def __init__(
        self,
        width_px: int,
        height_px: int,
        probabilities: NDArray[np.float32],
        tools: NDArray[np.float32] | None,
        phases: Sequence[str],
        tool_names: Sequence[str],
        predicted: NDArray[np.int8] | None = None,
    ) -> None:
        self._size = (height_px, width_px)
        self.width_px = width_px + width_px % 2  # H.264 needs even sides
        band = max(_SMALLEST_BAND_PX, round(_FRACTION * height_px))
        self.band_px = band + (band + height_px) % 2
        self._probabilities, self._tools = probabilities, tools
        self._phase = probabilities.argmax(axis=1) if predicted is None else predicted
        self._phases, self._tool_names = phases, tool_names
        self._colours = phase_colours(len(phases))
        self._fonts = [_font(round(self.band_px * fraction)) for fraction in (0.32, 0.22)]
        self._drawn: tuple[int, NDArray[np.uint8]] | None = None

    def add(self, frame: NDArray[np.uint8], sample: int) -> NDArray[np.uint8]:
        """Return the frame (H, W, 3) with the band of one sample below it; height and width are even.

        A frame with another size than the first (as in a folder of different images) is scaled to the first one's size.
        """
        if frame.shape[:2] != self._size:
            frame = self._scaled(frame)
        if frame.shape[1] != self.width_px:
            frame = np.pad(frame, ((0, 0), (0, self.width_px - frame.shape[1]), (0, 0)), mode="edge")
        return np.concatenate([frame, self.band(sample)])

    def _scaled(self, frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
        from PIL import Image

        height_px, width_px = self._size
        return np.array(Image.fromarray(frame).resize((width_px, height_px), Image.Resampling.BILINEAR))

    def band(self, sample: int) -> NDArray[np.uint8]:
        """Return the band (`band_px`, `width_px`, 3) of one sample."""
        if self._drawn is None or self._drawn[0] != sample:
            self._drawn = (sample, self._draw(sample))
        return self._drawn[1]

    def _draw(self, sample: int) -> NDArray[np.uint8]:
        from PIL import Image, ImageDraw

        image = Image.new("RGB", (self.width_px, self.band_px), _BACKGROUND)
        draw = ImageDraw.Draw(image)
        line, gap = round(0.42 * self.band_px), max(3, round(0.08 * self.band_px))
        phase = int(self._phase[sample])
        draw.rectangle((gap, gap, line - gap, line - gap), fill=self._colours[phase])
        confidence = f"{100 * float(self._probabilities[sample, phase]):.0f} %"
        draw.text((line + gap, gap), f"{self._phases[phase]}  {confidence}", fill=_TEXT, font=self._fonts[0])
        self._draw_tools(draw, sample, (gap, line), gap)
        self._draw_past(draw, sample, self.band_px - 2 * gap)
        return np.asarray(image)

    def _draw_tools(self, draw: Any, sample: int, place: tuple[int, int], gap: int) -> None:
        """Draw the names of the tools: present ones brightly with probabilities, and others faintly if they fit."""
        if self._tools is None:
            return
        font = self._fonts[1]
        labels = [
            (f"{name} {100 * probability:.0f} %", True) if probability >= DEFAULT_THRESHOLD else (name, False)
            for name, probability in zip(self._tool_names, self._tools[sample].tolist(), strict=True)
        ]
        if sum(draw.textlength(text, font=font) + 2 * gap for text, _ in labels) > self.width_px:
            labels = [(text, seen) for text, seen in labels if seen]
        x, y = place
        for text, seen in labels:
            draw.text((x, y), text, fill=_TEXT if seen else _FAINT, font=font)
            x += round(draw.textlength(text, font=font)) + 2 * gap

    def _draw_past(self, draw: Any, sample: int, top: int) -> None:
        """Draw the phases from the start to now as a line, on a scale with the length of the whole video."""
        edges = np.linspace(0, self.width_px, len(self._phase) + 1)
        for run in runs(self._phase[: sample + 1]):
            draw.rectangle((edges[run.start], top, edges[run.end], self.band_px), fill=self._colours[run.value])


def _font(size_px: int) -> Any:
    """Return a font that is available on every machine, since it is part of matplotlib."""
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size_px)
