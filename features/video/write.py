"""Write H.264 videos with the encoder that PyAV includes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.errors import UserError

WriteFrame = Callable[[NDArray[np.uint8], float | None], None]
_TICK_S = Fraction(1, 90_000)  # unit of the time stamps in videos with a variable rate


def encode_mp4(
    path: Path,
    frames: Iterable[NDArray[np.uint8]],
    fps: float,
    options: Mapping[str, str],
    check_stop: Callable[[], None],
    time_s: Iterable[float] | None = None,
) -> None:
    """Encode frames (H, W, 3) uint8 RGB, all of the same size with even sides, at `fps` with libx264's `options`.

    Only one frame is in memory at a time. If the rate varies, `time_s` gives each frame's time. `check_stop` is called
    before each frame and may raise an exception to stop. This function does not write atomically; that is up to the
    caller. Raises UserError if this PyAV has no H.264 encoder, and OSError if the disk is full.
    """
    times = itertools.repeat(None) if time_s is None else time_s
    with mp4_writer(path, fps, options, timed=time_s is not None) as write:
        for pixels, shown_s in zip(frames, times, strict=False):
            check_stop()
            write(pixels, shown_s)


@contextmanager
def mp4_writer(path: Path, fps: float, options: Mapping[str, str], *, timed: bool) -> Iterator[WriteFrame]:
    """Yield a function that encodes the next frame (H, W, 3); it takes the frame's time in seconds if they are `timed`.

    The other arguments and the errors are those of `encode_mp4`.
    """
    import av

    with _encoding(path), av.open(str(path), "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream: Any = None

        def write(pixels: NDArray[np.uint8], shown_s: float | None = None) -> None:
            nonlocal stream
            with _encoding(path):
                if stream is None:
                    rate = Fraction(fps).limit_denominator(1001)
                    stream = container.add_stream("libx264", rate=rate, options=dict(options))
                    stream.height, stream.width = pixels.shape[:2]
                    stream.pix_fmt = "yuv420p"
                    if timed:
                        stream.codec_context.time_base = _TICK_S
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                if shown_s is not None:
                    frame.pts, frame.time_base = round(shown_s / _TICK_S), _TICK_S
                container.mux(stream.encode(frame))

        yield write
        if stream is not None:
            container.mux(stream.encode())


@contextmanager
def _encoding(path: Path) -> Iterator[None]:
    """Turn FFmpeg's errors into UserError, except for a full disk, which stays an OSError."""
    import av

    try:
        yield
    except av.FFmpegError as error:
        if isinstance(error, OSError) and error.errno is not None and error.errno > 0:
            raise OSError(error.errno, error.strerror) from error
        raise UserError(f"{path}: cannot be encoded as H.264 ({error}); try `pip install -U av`") from error
