"""Writes small test videos whose frames carry their own number, so that 'frame k is frame k' can be proved.

Each frame is a grid of bright and dark cells: sixteen bits of the frame number and, below, the same bits inverted.
`frame_number` reads them back and fails on anything that is not exactly one number, such as a blend of two frames.
The cells are tinted and a texture moves behind them, so that a wrong colour conversion or a wrong neighbour shows too.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import numpy as np

BITS = 16
_COLUMNS = 8
_ROWS = 2 * BITS // _COLUMNS
TIME_BASE = Fraction(1, 12800)


def painted_frame(number: int, width_px: int = 96, height_px: int = 64) -> np.ndarray:
    """Frame `number`, (H, W, 3) uint8 RGB."""
    y, x = np.mgrid[:height_px, :width_px]
    bits = np.array([number >> bit & 1 for bit in range(BITS)])
    cells = np.concatenate([bits, 1 - bits]).reshape(_ROWS, _COLUMNS)
    bright = cells[y * _ROWS // height_px, x * _COLUMNS // width_px]
    texture = (5 * x + 3 * y + 7 * number) % 32
    base = np.where(bright, 200, 30) + texture
    tint = np.stack([base, base - 12 + 4 * (x % 3), base - 24 + (number % 5) * 4], axis=-1)
    return np.clip(tint, 0, 255).astype(np.uint8)


def frame_number(rgb: np.ndarray) -> int:
    """The number painted on an upright frame (H, W, 3); AssertionError if the frame does not show a single number."""
    height_px, width_px, _ = rgb.shape
    luma = rgb.astype(np.float64).mean(axis=-1)
    rows = np.linspace(0, height_px, _ROWS + 1)
    columns = np.linspace(0, width_px, _COLUMNS + 1)
    cells = []
    for top, bottom in itertools.pairwise(rows):
        for left, right in itertools.pairwise(columns):
            inset_y, inset_x = (bottom - top) / 4, (right - left) / 4
            cell = luma[round(top + inset_y) : round(bottom - inset_y), round(left + inset_x) : round(right - inset_x)]
            cells.append(cell.mean())
    bits = np.array(cells) > 128
    assert (np.abs(np.array(cells) - 128) > 30).all(), "the frame is a blend of frames"
    assert (bits[:BITS] != bits[BITS:]).all(), "the frame shows no number"
    return int(sum(1 << i for i, bit in enumerate(bits[:BITS]) if bit))


@dataclass(frozen=True)
class VideoSpec:
    """How a test video is made. `times_s` gives each frame's presentation time; None is a constant rate."""

    count: int = 60
    width_px: int = 96
    height_px: int = 64
    fps: Fraction = Fraction(25)
    codec: str = "libx264"
    pix_fmt: str = "yuv420p"
    gop: int = 12
    b_frames: int = 3
    times_s: Sequence[float] | None = None
    start_s: float = 0.0
    colorspace: int | None = None
    color_range: int | None = None
    with_audio: bool = False
    codec_options: dict[str, str] = field(default_factory=dict)
    container_options: dict[str, str] = field(default_factory=dict)
    paint: Callable[[int, int, int], np.ndarray] = painted_frame


def write_video(path: Path, spec: VideoSpec | None = None) -> Path:
    """Write the video that `spec` describes; the container follows the suffix (.mp4, .mkv, .avi, .ts, .mov)."""
    import av

    spec = spec or VideoSpec()
    with av.open(str(path), "w", options=spec.container_options) as output:
        stream = output.add_stream(spec.codec, rate=spec.fps)
        stream.width, stream.height, stream.pix_fmt = spec.width_px, spec.height_px, spec.pix_fmt
        options = {"g": str(spec.gop), "bf": str(spec.b_frames), **spec.codec_options}
        stream.options = options
        if spec.codec == "libx264":
            stream.options = {"preset": "veryfast", "crf": "20", "sc_threshold": "0", **options}
        context = stream.codec_context
        variable = spec.times_s is not None or spec.start_s != 0.0
        context.time_base = TIME_BASE if variable else 1 / spec.fps
        if spec.colorspace is not None:
            context.colorspace = spec.colorspace
        if spec.color_range is not None:
            context.color_range = spec.color_range
        audio = _add_silence(output) if spec.with_audio else None
        for frame in _frames(spec, variable):
            output.mux(stream.encode(frame))
            if audio is not None:
                output.mux(audio.encode(_silence()))
        output.mux(stream.encode(None))
    return path


def _frames(spec: VideoSpec, variable: bool) -> Iterator:
    import av

    for number in range(spec.count):
        pixels = spec.paint(number, spec.width_px, spec.height_px)
        frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
        if spec.colorspace is not None or spec.color_range is not None:
            frame = frame.reformat(
                format=spec.pix_fmt, dst_colorspace=spec.colorspace, dst_color_range=spec.color_range
            )
        time_s = spec.times_s[number] if spec.times_s is not None else number / float(spec.fps)
        frame.pts = round((time_s + spec.start_s) / float(TIME_BASE)) if variable else number
        frame.time_base = TIME_BASE if variable else 1 / spec.fps
        yield frame


def _add_silence(output):
    return output.add_stream("aac", rate=8000, layout="mono")


def _silence():
    import av

    frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
    frame.sample_rate = 8000
    return frame


def open_gop(count: int = 60, gop: int = 12) -> VideoSpec:
    """Key frames preceded, in presentation order, by frames that need the group before (H.264 open GOP)."""
    return VideoSpec(count=count, gop=gop, codec_options={"x264-params": "open-gop=1:bframes=3:b-adapt=0"})


def variable_rate(count: int = 60) -> VideoSpec:
    """Frames 20 to 220 ms apart, so that times do not follow from frame numbers."""
    gaps = np.random.default_rng(1).integers(1, 12, size=count) * 0.02
    return VideoSpec(count=count, times_s=tuple(np.concatenate([[0.0], np.cumsum(gaps)[:-1]])))


def set_rotation(path: Path, degrees: int) -> Path:
    """Write a quarter-turn display matrix into an MP4's track header (what a phone does), pixels untouched."""
    turns = {0: (1, 0, 0, 1), 90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}
    a, b, c, d = (value << 16 for value in turns[degrees])
    matrix = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    content = bytearray(path.read_bytes())
    start = content.index(b"tkhd") + 4  # version and flags follow; version 0 holds the matrix 40 bytes on
    assert content[start] == 0
    content[start + 40 : start + 76] = matrix
    path.write_bytes(bytes(content))
    return path


def hide_frames(path: Path, first: int, duration_s: float) -> Path:
    """Rewrite an MP4's edit list (25 fps, as `write_video` makes it) to show `duration_s` from frame `first` on."""
    content = bytearray(path.read_bytes())
    entry = content.index(b"elst") + 12  # type, version and flags, number of entries
    _, media_time = struct.unpack_from(">Ii", content, entry)
    ticks_a_frame = _media_timescale(content) // 25
    struct.pack_into(">Ii", content, entry, round(duration_s * 1000), media_time + first * ticks_a_frame)
    path.write_bytes(bytes(content))
    return path


def _media_timescale(content: bytearray) -> int:
    start = content.index(b"mdhd") + 4
    return struct.unpack_from(">I", content, start + 12)[0]


def packet_spans(path: Path) -> list[tuple[int, int]]:
    """(offset, size) in the file of each coded frame, in decoding order."""
    import av

    with av.open(str(path)) as container:
        return [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]


def damage_packet(path: Path, number: int) -> Path:
    """Overwrite the inside of one coded frame, so that it cannot be decoded to the original."""
    offset, size = packet_spans(path)[number]
    content = bytearray(path.read_bytes())
    start = offset + size // 3
    content[start : offset + size - 2] = b"\xa5" * (offset + size - 2 - start)
    path.write_bytes(bytes(content))
    return path


def repeat_video(source: Path, target: Path, times: int) -> Path:
    """Chain a video `times` times by copying its packets: hours of video in seconds."""
    import av

    with av.open(str(source)) as container, av.open(str(target), "w") as output:
        stream = container.streams.video[0]
        span = round(stream.frames / stream.average_rate / stream.time_base)
        add = getattr(output, "add_stream_from_template", None)  # since PyAV 14
        copy = add(stream) if add else output.add_stream(template=stream)
        for turn in range(times):
            with av.open(str(source)) as again:  # muxing rescales packets in place, so each repetition reads new ones
                for packet in again.demux(video=0):
                    if packet.size:
                        packet.pts, packet.dts = packet.pts + turn * span, packet.dts + turn * span
                        packet.stream = copy
                        output.mux(packet)
    return target


def truncate(path: Path, share: float) -> Path:
    """Keep the first `share` (a fraction) of the file's bytes."""
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    return path


def decode_everything(path: Path) -> list[np.ndarray]:
    """The simplest possible decoding, the reference of the tests: every frame in the decoder's order, RGB uint8."""
    import av

    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def rewrite(source: Path, target: Path, change: Callable[[list], list]) -> Path:
    """Write a video's packets again, after `change` has modified their list; the container follows the suffix."""
    import av

    with av.open(str(source)) as container, av.open(str(target), "w") as output:
        stream = container.streams.video[0]
        add = getattr(output, "add_stream_from_template", None)  # since PyAV 14
        copy = add(stream) if add else output.add_stream(template=stream)
        for packet in change([packet for packet in container.demux(stream) if packet.size]):
            packet.stream = copy
            output.mux(packet)
    return target


def decoding_times(packets: list) -> list:
    """Decoding times instead of presentation times, as written by programs that copy H.264 from AVI to MP4."""
    for packet, time in zip(packets, sorted(packet.pts for packet in packets), strict=True):
        packet.pts = packet.dts = time
    return packets


def without_start(packets: list, count: int = 5) -> list:
    """A recording that was started within a group of pictures: the first packets are missing."""
    return packets[count:]


def with_empty_chunks(source: Path, target: Path, after: Sequence[int]) -> Path:
    """An AVI file without B-frames and with an empty chunk after each of the frames `after`, as if one was lost."""
    content = source.read_bytes()
    body, entries = bytearray(), bytearray()
    movi = content.index(b"movi")
    for number, (offset, size) in enumerate(packet_spans(source)):
        chunk = content[offset : offset + size]
        for data, flags in [(chunk, 16 * (number % 12 == 0)), *([(b"", 0)] if number in after else [])]:
            entries += b"00dc" + struct.pack("<III", flags, 4 + len(body), len(data))
            body += b"00dc" + struct.pack("<I", len(data)) + data + bytes(len(data) % 2)
    written = bytearray(content[: movi + 4] + body + b"idx1" + struct.pack("<I", len(entries)) + entries)
    struct.pack_into("<I", written, 4, len(written) - 8)
    struct.pack_into("<I", written, movi - 4, 4 + len(body))
    for header, place in ((b"avih", 16), (b"strh", 32)):
        struct.pack_into("<I", written, content.index(header) + 8 + place, len(entries) // 16)
    target.write_bytes(bytes(written))
    return target


def cut_video(source: Path, targets: Sequence[Path], key_frames: Sequence[int]) -> None:
    """Cut a video at these key frames (of all key frames, counted from 0) by copying packets, as `ffmpeg -c copy`."""
    import av

    with av.open(str(source)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
        starts = [at for at, packet in enumerate(packets) if packet.is_keyframe]
    bounds = [0, *(starts[number] for number in key_frames), len(packets)]
    for target, (first, end) in zip(targets, itertools.pairwise(bounds), strict=True):

        def part(packets: list, first: int = first, end: int = end) -> list:
            start = packets[first].dts - packets[0].dts
            for packet in packets[first:end]:
                packet.dts -= start
                packet.pts = packet.dts if packet.pts is None else packet.pts - start  # AVI has decoding times only
            return packets[first:end]

        target.parent.mkdir(parents=True, exist_ok=True)
        rewrite(source, target, part)
