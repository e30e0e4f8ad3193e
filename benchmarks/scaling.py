"""Time and memory by length of a video and by number of videos, and with features that are read from their files.

    python benchmarks/scaling.py --json FILE
    python benchmarks/scaling.py --only many streamed --json FILE

Everything runs as commands with their default number of processes. The parts (`--only`) are:

extract: the command for one simulated video. A clip of 854x480 at 25 fps (H.264 with B-frames) is repeated, packet by
    packet, until the video is 10 min, 1 h and 4 h long. Memory is measured rather than speed, so the backbone is a
    small one with random weights.
train_temporal: one epoch over random features of width 2048, for 1 to 80 videos of 2,158 frames (Cholec80's mean).
many: `index` and `features verify` for 5,000 videos of 10 frames. They are hard links to one simulated video and to one
    file of random features; each video has its own phase and tool files. `read_s` is the time of only reading all
    these files.
streamed: `train-temporal` on the same random features, once in memory and once read from their files
    (`temporal.features`), when the files are in the disk cache. The time is that of an epoch over whole videos (half
    the difference between a training of three epochs and one of one epoch). The peak memory is that of an epoch of a
    linear head, for a number of videos and for ten times as many.

The figures of a command are `seconds`, `processor_s` (processor time of all its processes, to be compared if other jobs
run), `peak_mb` (peak, over time, of the sum of the resident memory of all processes) and `biggest_mb` (peak of the
largest process); MB are 10^6 bytes. `peak_mb_4h_over_10min` and `biggest_mb_4h_over_10min` are the ratios of the
longest video to the shortest, and `stream_over_memory` is the ratio of an epoch read from files to one in memory.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from command import PROJECT, options, say
from processes import Cost, run_measured
from start_up import write_feature_set

sys.path.insert(0, str(PROJECT))
WIDTH_PX, HEIGHT_PX, FPS = 854, 480, 25
CLIP_S = 20
FRAMES_A_VIDEO, EMBEDDING = 2158, 2048
PARTS = ("extract", "train_temporal", "many", "streamed")


def main() -> None:
    """Parse the options, measure, and print and write the figures."""
    parser = options(__doc__, repeat=None)
    parser.add_argument("--minutes", type=int, nargs="+", default=[10, 60, 240], help="lengths of the video")
    parser.add_argument("--videos", type=int, nargs="+", default=[1, 5, 20, 80], help="videos of features")
    parser.add_argument(
        "--fps", type=float, default=0.5, help="sampling rate; the decoder goes through the whole video in any case"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="passed on to extract")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to measure; default: all")
    parser.add_argument("--many", type=int, default=5000, help="videos of the part `many`")
    parser.add_argument("--streamed", type=int, default=8, help="videos of the part `streamed`, and ten times as many")
    given = parser.parse_args()
    figures: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "extract" in given.only:
            figures |= measure_lengths(folder, given.minutes, given.fps, given.set)
        if "train_temporal" in given.only:
            figures["train_temporal"] = [measure_training(folder, count) for count in given.videos]
        if "many" in given.only:
            figures["many"] = measure_many(folder, given.many)
        if "streamed" in given.only:
            figures["streamed"] = measure_streamed(folder, given.streamed)
    say(figures, given.json)


def measure_lengths(folder: Path, minutes: list[int], fps: float, settings: list[str]) -> dict[str, object]:
    """Measure the part `extract`."""
    extracted = [measure_extract(folder, length, fps, settings) for length in minutes]
    ratios = {
        f"{key}_{minutes[-1] // 60}h_over_{minutes[0]}min": round(extracted[-1][key] / extracted[0][key], 3)
        for key in ("peak_mb", "biggest_mb")
    }
    return {"extract": extracted, **ratios, "sampled_fps": fps, "settings": settings}


def measure_extract(folder: Path, minutes: int, fps: float, settings: list[str]) -> dict[str, float]:
    """Run `index` and `extract` for one video; the figures are those of `extract`."""
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
    return {"minutes": minutes, **figures_of(cost)}


def write_clip(path: Path) -> None:
    """Write a video of a moving image with grain, in x264's default settings (B-frames, closed groups of pictures)."""
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
    """Write the clip `times` times in a row; its packets are copied with later time stamps and not encoded again."""
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


def write_features_of(folder: Path, videos: int, frames: int = FRAMES_A_VIDEO) -> Path:
    """Write random features of so many videos, a fifth of which (rounded down) are for validation."""
    phases = np.resize(np.repeat(np.arange(7, dtype=np.int8), frames // 7 + 1), frames)
    write_feature_set(folder, [phases] * videos)
    return folder


def run_training(folder: Path, features: Path, *settings: str) -> Cost:
    """Run `train-temporal` for one head in a new run."""
    runs = tempfile.mkdtemp(dir=folder)
    options = [f"runs={runs}", "temporal.baseline=false", *settings]
    words = [word for option in options for word in ("--set", option)]
    return run_measured([str(PROJECT / "pipeline.py"), "train-temporal", "--features", str(features), *words], folder)


def measure_training(folder: Path, videos: int) -> dict[str, float]:
    """Measure `train-temporal` for one epoch over so many videos."""
    features = write_features_of(folder / f"features{videos}", videos)
    return figures_of(run_training(folder, features, "temporal.epochs=1")) | {
        "videos": videos,
        "frames": videos * FRAMES_A_VIDEO,
        "features_mb": round(videos * FRAMES_A_VIDEO * EMBEDDING * 2 / 1e6),
    }


def figures_of(cost: Cost) -> dict[str, float]:
    """The figures of one command."""
    return {
        "seconds": round(cost.seconds, 1),
        "processor_s": round(cost.processor_s, 1),
        "peak_mb": round(cost.tree_mb),
        "biggest_mb": round(cost.biggest_mb),
    }


def measure_many(folder: Path, videos: int) -> dict[str, object]:
    """Measure `index` and `features verify` for many short videos."""
    data, features = folder / "many", write_features_of(folder / "one", 1, frames=10)
    write_many(data, videos)
    stored = folder / "many-features"
    stored.mkdir()
    for number in range(1, videos + 1):
        os.link(features / "video01.h5", stored / f"video{number:02d}.h5")
    out = ["--root", str(data), "--out", str(folder / "many.json"), "--set", "data.split.rule=80%/10%/10%"]
    commands = {"index": ["index", *out], "verify": ["features", "verify", str(stored)]}
    found: dict[str, object] = {"videos": videos, "frames_each": 10}
    for name, words in commands.items():
        started = time.perf_counter()
        for path in sorted((data if name == "index" else stored).iterdir()):
            path.read_bytes()
        read_s = time.perf_counter() - started
        found[name] = figures_of(run_measured([str(PROJECT / "pipeline.py"), *words], folder)) | {
            "read_s": round(read_s, 1)
        }
    return found


def write_many(data: Path, videos: int) -> None:
    """Write one video of ten frames of noise under so many names, each with its own label files."""
    from configs.load import load_dataset
    from features.video.write import encode_mp4

    data.mkdir()
    spec, rng = load_dataset("cholec80"), np.random.default_rng(0)
    frames = rng.integers(0, 256, (10, 64, 64, 3)).astype(np.uint8)
    encode_mp4(data / "clip", frames, FPS, {"preset": "ultrafast"}, lambda: None)
    for number in range(1, videos + 1):
        name = f"video{number:02d}"
        os.link(data / "clip", data / f"{name}.mp4")
        rows = [f"{frame}\t{spec.phases[(number + frame // 5) % len(spec.phases)]}" for frame in range(10)]
        (data / f"{name}-phase.txt").write_text("\n".join(["Frame\tPhase", *rows, ""]))
        present = "\t".join(str(int(number % len(spec.tools) == k)) for k in range(len(spec.tools)))
        (data / f"{name}-tool.txt").write_text("\t".join(["Frame", *spec.tools]) + f"\n0\t{present}\n")
    (data / "clip").unlink()


def measure_streamed(folder: Path, videos: int) -> dict[str, object]:
    """Measure features in memory and features read from their files: an epoch, and peak memory by number of videos."""
    sets = {count: write_features_of(folder / f"streamed{count}", count) for count in (videos, 10 * videos)}
    found: dict[str, object] = {"videos": videos, "frames": videos * FRAMES_A_VIDEO}
    epochs, memory = {}, {}
    for where in ("memory", "stream"):
        setting = f"temporal.features={where}"
        one, three = (run_training(folder, sets[videos], setting, f"temporal.epochs={n}") for n in (1, 3))
        epochs[where] = {
            "epoch_s": round((three.seconds - one.seconds) / 2, 2),
            "epoch_processor_s": round((three.processor_s - one.processor_s) / 2, 2),
        }
        memory[where] = {
            count: figures_of(run_training(folder, path, setting, "temporal.epochs=1", "temporal.head.name=linear"))
            for count, path in sets.items()
        }
    ratios = {key: round(epochs["stream"][key] / epochs["memory"][key], 3) for key in epochs["memory"]}
    return found | {"epochs": epochs, "stream_over_memory": ratios, "linear_head_by_videos": memory}


if __name__ == "__main__":
    main()
