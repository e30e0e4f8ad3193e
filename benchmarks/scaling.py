"""Time and memory of `extract` by length of a video, and of `train-temporal` by number of videos.

    python benchmarks/scaling.py --json FILE

Both run as commands with their default number of processes. Videos are simulated: one clip of 854x480
at 25 fps, H.264 with B-frames, whose packets are repeated without decoding until the video is 10 min, 1 h and 4 h long.
The question is memory, not speed, so the backbone is a small one with random weights (decoding is real). Features for
`train-temporal` are random, 2048 wide, 1 to 80 videos of 2,158 frames (Cholec80's mean), one epoch.

Keys: `extract` and `train_temporal`, a list with `seconds`, `peak_mb` (highest sum of resident memory of the command
and its processes at one moment) and `biggest_mb` (highest of one process) for each size; `peak_mb_4h_over_10min` and
`biggest_mb_4h_over_10min`, the longest video over the shortest.
"""

from __future__ import annotations

import sys
import tempfile
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from command import PROJECT, options, say
from processes import run_measured
from start_up import write_feature_set

sys.path.insert(0, str(PROJECT))
WIDTH_PX, HEIGHT_PX, FPS = 854, 480, 25
CLIP_S = 20
FRAMES_A_VIDEO, EMBEDDING = 2158, 2048


def main() -> None:
    """Parse, measure, print, write."""
    parser = options(__doc__, repeat=None)
    parser.add_argument("--minutes", type=int, nargs="+", default=[10, 60, 240], help="lengths of the video")
    parser.add_argument("--videos", type=int, nargs="+", default=[1, 5, 20, 80], help="videos of features")
    parser.add_argument(
        "--fps", type=float, default=0.5, help="rate of sampling; decoding goes through all in any case"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="passed on to extract")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder), given.minutes, given.videos, given.fps, given.set)
    say(figures, given.json)


def measure(folder: Path, minutes: list[int], videos: list[int], fps: float, settings: list[str]) -> dict[str, object]:
    """All figures."""
    extracted = [measure_extract(folder, length, fps, settings) for length in minutes]
    trained = [measure_training(folder, count) for count in videos]
    ratios = {
        f"{key}_{minutes[-1] // 60}h_over_{minutes[0]}min": round(extracted[-1][key] / extracted[0][key], 3)
        for key in ("peak_mb", "biggest_mb")
    }
    return {"extract": extracted, "train_temporal": trained, **ratios, "sampled_fps": fps, "settings": settings}


def measure_extract(folder: Path, minutes: int, fps: float, settings: list[str]) -> dict[str, float]:
    """`index` and `extract` of one video; the time is that of `extract`."""
    place = folder / f"{minutes}min"
    (place / "data").mkdir(parents=True)
    clip = folder / "clip.mp4"
    if not clip.exists():
        write_clip(clip)
    repeat_packets(clip, place / "data" / "video01.mp4", minutes * 60 // CLIP_S)
    options = [
        f"data.root={place / 'data'}",
        f"data.index={place / 'index.json'}",
        f"data.fps={fps}",
        "data.split={rule: lists, test: [video01]}",
        f"runs={place / 'runs'}",
        "cnn.backbone=mobilenet_v3_small",
        "cnn.weights=random",
        "extract.encoder=initial",
        f"extract.store={place / 'store'}",
        *settings,
    ]
    words = [word for option in options for word in ("--set", option)]
    run_measured([str(PROJECT / "pipeline.py"), "index", *words], place)
    cost = run_measured([str(PROJECT / "pipeline.py"), "extract", *words], place)
    (place / "data" / "video01.mp4").unlink()
    return {
        "minutes": minutes,
        "seconds": round(cost.seconds, 1),
        "peak_mb": round(cost.tree_mb),
        "biggest_mb": round(cost.biggest_mb),
    }


def write_clip(path: Path) -> None:
    """A moving image with grain, in x264's default settings (B-frames, closed groups of pictures)."""
    rng = np.random.default_rng(0)
    field = rng.integers(0, 256, (HEIGHT_PX // 8, WIDTH_PX // 8 + CLIP_S * FPS, 3)).astype(np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"preset": "veryfast", "crf": "23", "g": "250"})
        stream.width, stream.height, stream.pix_fmt = WIDTH_PX, HEIGHT_PX, "yuv420p"
        for number in range(CLIP_S * FPS):
            small = field[:, number // 4 : number // 4 + WIDTH_PX // 8 + 1]
            image = small.repeat(8, axis=0).repeat(8, axis=1)[:HEIGHT_PX, :WIDTH_PX]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")))
        container.mux(stream.encode())


def repeat_packets(clip: Path, out: Path, times: int) -> None:
    """The clip `times` times in a row, without encoding again: its packets, with later times."""
    with av.open(str(clip)) as source:
        stream = source.streams.video[0]
        assert stream.time_base is not None
        assert stream.average_rate is not None
        read = [packet for packet in source.demux(stream) if packet.size]  # the last is empty
        length = round(Fraction(len(read)) / stream.average_rate / stream.time_base)
        packets = [(bytes(p), p.pts, p.dts, p.duration, p.is_keyframe) for p in read]
        with av.open(str(out), "w") as container:
            copy = container.add_stream_from_template(stream)
            for turn in range(times):
                for content, pts, dts, duration, key in packets:
                    packet = av.Packet(content)
                    packet.stream, packet.time_base, packet.duration = copy, stream.time_base, duration
                    packet.pts, packet.dts, packet.is_keyframe = pts + turn * length, dts + turn * length, key
                    container.mux(packet)


def measure_training(folder: Path, videos: int) -> dict[str, float]:
    """`train-temporal` for one epoch over so many videos (a fifth of them, rounded down, for validation)."""
    features = folder / f"features{videos}"
    phases = [np.repeat(np.arange(7, dtype=np.int8), FRAMES_A_VIDEO // 7 + 1)[:FRAMES_A_VIDEO]] * videos
    write_feature_set(features, phases)
    options = [f"runs={folder / f'runs{videos}'}", "temporal.epochs=1", "temporal.baseline=false"]
    words = [word for option in options for word in ("--set", option)]
    cost = run_measured([str(PROJECT / "pipeline.py"), "train-temporal", "--features", str(features), *words], folder)
    return {
        "videos": videos,
        "frames": videos * FRAMES_A_VIDEO,
        "features_mb": round(videos * FRAMES_A_VIDEO * EMBEDDING * 2 / 1e6),
        "seconds": round(cost.seconds, 1),
        "peak_mb": round(cost.tree_mb),
        "biggest_mb": round(cost.biggest_mb),
    }


if __name__ == "__main__":
    main()
