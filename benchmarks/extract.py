"""How fast `extract` is, compared with the usual way and with the bound of decoding and computing on all cores.

    python benchmarks/extract.py --json FILE [--repeat N]

Figures are in sampled frames per second, with one sampled frame per second of video. They are medians of `--repeat`
rounds; each round runs all programs, so that other load affects all of them. `*_fps` is per second of wall time, and
`*_processor_fps` per second of processor time of one core, which is more reliable on a busy machine. Ratios are given
for both. The benchmark takes about five minutes on two free cores.

- `ours_fps`: the command `extract` with one process per core, random ResNet50 weights, and the precision in
  `precision`. It runs on short videos, and on long ones that consist of the same frames several times. The rate is
  computed from the difference of the two, which excludes start-up and the constant cost of a video (real ones have
  about 2,000 sampled frames). `ours_with_start_up_fps` is the rate for the long videos, including the start of the
  interpreter and of the processes.
- `usual_fps`: decoding to JPEG files of 250x250, then PIL, a DataLoader and ResNet50 in fp32. Imports and building the
  network are not counted.
- `decode_fps`: decoding alone, to RGB, without the frames that are not needed; one process per core. `forward_fps`: the
  forward pass alone of a folded ResNet50 in the same precision; one process with one thread per core, with 8 or 32
  frames at a time, whichever is faster. `bound_fps` is 1 / (1 / decode + 1 / forward), the rate of both one after the
  other. This network consists of torch's layers. The project's own network, with ReLU fused into the convolutions, may
  exceed this bound; `own_forward_fps` and `own_bound_fps` are the figures for it (`extract_own.py`).
- `int8_fps`, `int8_forward_fps`, `int8_bound_fps`: the same with `extract.engine=openvino extract.precision=int8`, if
  OpenVINO is installed (`pip install -e '.[openvino]'`). Its calibration, on 32 frames, is part of the start-up.
  `ratio_int8_to_ours` compares the two engines. `ratio_int8_to_bound` compares the command with its own decoding and
  forward pass one after the other.
- `cosine_mean`, `cosine_worst` (`int8_cosine_*` for int8): the cosine similarity between the features of `extract` and
  those of a plain fp32 loop with the same weights and frames.

The input is real clips (SURGSTAGE_SHARED, by default `shared` beside the checkout), as many as divide evenly among the
cores. If there are none, it is a simulated video of 854x480 at 25 fps, H.264 with B-frames. `input` says which. Longer
videos repeat the same packets `turns` times and are not encoded again. The programs to compare with
(`extract_reference.py`) import nothing from the project.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import h5py
import numpy as np
from command import CORES, PROJECT, SHARED, options, pipeline, say
from scaling import repeat_packets

REFERENCE = Path(__file__).resolve().parent / "extract_reference.py"
OWN = Path(__file__).resolve().parent / "extract_own.py"
CONFIG = str(PROJECT / "configs" / "cholec80.yaml")
INT8 = ("extract.engine=openvino", "extract.precision=int8", "extract.calibration_frames=32")
Figures = dict[str, float]


def main() -> None:
    """Parse the options, measure, and print and write the figures."""
    parser = options(__doc__)
    parser.add_argument("--turns", type=int, nargs=2, default=(1, 7), metavar=("FEW", "MANY"))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder), given.repeat, given.turns)
    say(figures, given.json)


def measure(folder: Path, repeat: int, turns: Sequence[int]) -> dict[str, object]:
    """Measure all figures."""
    videos, kind = source_videos(folder)
    weights = random_weights(folder / "resnet50.pth")
    sets = [data_set(folder / f"data{count}", videos, count) for count in turns]
    paths = [str(path) for path in videos]
    rounds, precision = [], "fp32"
    int8 = find_spec("openvino") is not None
    for number in range(repeat):
        found, precision = ours(folder / f"round{number}", sets, weights)
        if int8:
            ours8, _ = ours(folder / f"int8-round{number}", sets, weights, INT8)
            found |= {key.replace("ours", "int8", 1): value for key, value in ours8.items()}
        for side, commands in (
            *([("int8_forward", [[str(OWN), "int8", str(weights)]] * CORES)] if int8 else []),
            ("usual", [[str(REFERENCE), "usual", str(weights), *paths]]),
            ("decode", [[str(REFERENCE), "decode", *paths]] * CORES),
            ("forward", [[str(REFERENCE), "forward", precision, str(weights)]] * CORES),
            ("own_forward", [[str(OWN), precision, str(weights)]] * CORES),
        ):
            found[f"{side}_fps"], found[f"{side}_processor_fps"] = together(commands)
        for own in ("", "own_", *(["int8_"] if int8 else [])):
            for unit in ("fps", "processor_fps"):
                found[f"{own}bound_{unit}"] = 1 / (1 / found[f"decode_{unit}"] + 1 / found[f"{own}forward_{unit}"])
        rounds.append(found)
        print(json.dumps(found), flush=True)
    middle = {key: statistics.median(found[key] for found in rounds) for key in rounds[0]}
    ratios = {
        f"ratio_to_{side}{name}": middle[f"ours_{unit}"] / middle[f"{side}_{unit}"]
        for side in ("usual", "bound", "own_bound")
        for name, unit in (("", "fps"), ("_by_processor", "processor_fps"))
    }
    together([[str(REFERENCE), "features", str(weights), str(folder / "fp32.npz"), *paths]])
    if int8:
        for name, unit in (("", "fps"), ("_by_processor", "processor_fps")):
            ratios[f"ratio_int8_to_ours{name}"] = middle[f"int8_{unit}"] / middle[f"ours_{unit}"]
            ratios[f"ratio_int8_to_bound{name}"] = middle[f"int8_{unit}"] / middle[f"int8_bound_{unit}"]
    cosine = cosines(next((folder / "round0").rglob(f"*-{max(turns)}/resnet50-*")), folder / "fp32.npz")
    if int8:
        found8 = cosines(next((folder / "int8-round0").rglob(f"*-{max(turns)}/resnet50-*")), folder / "fp32.npz")
        cosine |= {f"int8_{key}": value for key, value in found8.items()}
    rounded = {key: round(value, 5) for key, value in {**middle, **ratios, **cosine}.items()}
    return {**rounded, "precision": precision, "cores": CORES, "input": kind, "turns": list(turns), "rounds": rounds}


# ---------------------------------------------------------------------------------------------- material


def source_videos(folder: Path) -> tuple[list[Path], str]:
    """The real clips or, if there are none, a simulated video, and a description of them."""
    clips = sorted((SHARED / "data" / "clips" / "videos").glob("*.mp4"))
    if clips:
        clips = clips[: len(clips) // CORES * CORES or None]  # so that all cores finish at the same time
        return clips, f"real clips: {len(clips)}"
    command = ["simulate", str(folder / "simulated"), "--videos", "1", "--seed", "0", "--fps", "25"]
    size = ["--width", "854", "--height", "480", "--speed-up", "16", "--workers", str(CORES)]
    subprocess.run([sys.executable, str(PROJECT / "pipeline.py"), *command, *size], check=True)
    return sorted((folder / "simulated").rglob("*.mp4")), "simulated: 1 video"


def random_weights(path: Path) -> Path:
    """Write the initial weights of a ResNet50, which all programs use."""
    import torch
    import torchvision

    torch.manual_seed(0)
    torch.save(torchvision.models.resnet50(weights=None).state_dict(), path)
    return path


def data_set(root: Path, videos: Sequence[Path], turns: int) -> Path:
    """Write the videos in Cholec80's layout, in order; each repeats its packets `turns` times."""
    (root / "videos").mkdir(parents=True)
    for number, video in enumerate(videos):
        repeat_packets(video, root / "videos" / f"video{number + 1:02d}.mp4", turns)
    return root


# ---------------------------------------------------------------------------------------------- programs


def ours(folder: Path, sets: Sequence[Path], weights: Path, more_settings: Sequence[str] = ()) -> tuple[Figures, str]:
    """Frames per second of `extract`: from the difference of long and short videos, and for the long ones alone."""
    frames, seconds, busy, precision = [], [], [], ""
    for root in sets:
        count = root.name.removeprefix("data")
        settings = [*extraction_settings(folder, root, weights), *more_settings]
        pipeline("index", CONFIG, None, settings)
        started, before = time.perf_counter(), sum(os.times()[2:4])
        pipeline("extract", CONFIG, f"bench{count}", settings)
        seconds.append(time.perf_counter() - started)
        busy.append(sum(os.times()[2:4]) - before)
        made = sorted((folder / f"features-{count}").glob("resnet50-*/*.h5"))
        frames.append(sum(rows(path) for path in made))
        with h5py.File(made[0], "r") as file:
            precision = str(file.attrs["precision"])
    more = frames[1] - frames[0]
    return {
        "ours_fps": more / (seconds[1] - seconds[0]),
        "ours_processor_fps": more / (busy[1] - busy[0]),
        "ours_with_start_up_fps": frames[1] / seconds[1],
    }, precision


def extraction_settings(folder: Path, root: Path, weights: Path) -> list[str]:
    """The settings of an extraction with the initial weights; index, features and runs are written below `folder`."""
    count = root.name.removeprefix("data")
    return [
        f"data.root={root}",
        f"data.index={folder / f'index-{count}.json'}",
        "data.split.rule=60%/20%/20%",
        "cnn.backbone=resnet50",
        f"cnn.weights={weights}",
        "extract.encoder=initial",
        f"extract.store={folder / f'features-{count}'}",
        f"runs={folder / 'runs'}",
        f"extract.workers={CORES}",
        "device=cpu",
    ]


def rows(path: Path) -> int:
    with h5py.File(path, "r") as file:
        return len(file["features"])


def together(commands: Sequence[Sequence[str]]) -> tuple[float, float]:
    """Frames per second of all processes, which start together: per second of wall time and of processor time."""
    environment = {**os.environ, **({"OMP_NUM_THREADS": "1"} if len(commands) > 1 else {})}
    running = [
        subprocess.Popen(
            [sys.executable, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for words in commands
    ]
    for process in running:
        assert process.stdout is not None
        process.stdout.readline()
    for process in running:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    found = [json.loads(process.communicate()[0]) for process in running]
    processor = sum(one["frames"] for one in found) / sum(one["processor_seconds"] for one in found)
    return sum(one["frames"] / one["seconds"] for one in found), processor


def cosines(store: Path, expected: Path) -> Figures:
    """The cosine similarity between the stored features and the `expected` fp32 ones, over all frames."""
    values = []
    with np.load(expected) as arrays:
        for number, name in enumerate(sorted(arrays.files)):
            wanted = arrays[name].astype(np.float64)
            with h5py.File(store / f"video{number + 1:02d}.h5", "r") as file:
                found = file["features"][: len(wanted)].astype(np.float64)
            product = (found * wanted).sum(1)
            values.append(product / np.linalg.norm(found, axis=1) / np.linalg.norm(wanted, axis=1))
    every = np.concatenate(values)
    return {"cosine_mean": float(every.mean()), "cosine_worst": float(every.min())}


if __name__ == "__main__":
    main()
