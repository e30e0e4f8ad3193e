"""Full disks, folders that cannot be written, dead workers, file systems without locks, with the real command line."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from features.store import read_features
from features.video.write import encode_mp4
from tests.cli import Ended, Forks
from tests.sameness import differences, left_half_done
from tests.videos import decode_everything

SETTINGS: dict[str, Any] = {
    "device": "cpu",
    "data": {"fps": 1.0, "root": "../data", "index": "index.json", "split": {"rule": "1/1/1"}},
    "cache": {"dir": "cache"},
    "preprocess": {"resize_px": 40, "crop_px": 32},
    "cnn": {
        "backbone": "shufflenet_v2_x0_5",
        "weights": "random",
        "precision": "fp32",
        "epochs": 1,
        "batch_frames": 8,
        "workers": 0,
    },
    "extract": {"store": "features", "precision": "fp32", "workers": 1, "batch_frames": 2},
    "temporal": {
        "head": {"name": "lstm", "hidden": 8},
        "sequence": {"mode": "chunked", "frames": 16, "batch": 2},
        "epochs": 2,
        "precision": "fp32",
    },
}
SIMULATE = ("--videos", "3", "--seed", "1", "--fps", "2", "--width", "64", "--height", "64", "--speed-up", "100")
RUN = ("run", "--config", "tiny.json", "--name", "r")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, forks: Forks) -> Path:
    """A folder with simulated videos in `data`; work folders are next to it."""
    folder = tmp_path_factory.mktemp("faults")
    must(forks, folder, "simulate", "data", *SIMULATE)
    return folder


@pytest.fixture(scope="module")
def finished(base: Path, forks: Forks) -> Path:
    """A work folder in which `run` and `report` have gone through; tests copy it before they change anything.

    `written` beside it lists the files that `run` wrote, in order.
    """
    folder = new_folder(base, "finished")
    must(forks, folder, *RUN, note_writes=folder.with_name("written"))
    must(forks, folder, "report", "runs/r", "--no-thumbnails")
    return folder


@pytest.fixture
def work(base: Path, request: pytest.FixtureRequest) -> Path:
    """An empty work folder with the settings in it."""
    return new_folder(base, re.sub(r"\W+", "-", request.node.name))


def new_folder(base: Path, name: str) -> Path:
    folder = base / name
    folder.mkdir()
    (folder / "tiny.json").write_text(json.dumps(SETTINGS))
    return folder


def must(forks: Forks, folder: Path, *arguments: str, **faults: Any) -> Ended:
    ended = forks.run(arguments, folder, **faults)
    assert ended.code == 0, ended.output
    return ended


def one_line(ended: Ended) -> str:
    """The one line that a fault ends in."""
    assert ended.code == 2, ended.output
    assert "Traceback" not in ended.output
    assert "Exception ignored" not in ended.output
    assert ended.last_line.startswith("error: ")
    assert ended.output.count("error: ") == 1
    return ended.last_line


# ---------------------------------------------------------------------------------------------- full disks


@pytest.mark.slow
def test_a_full_disk_at_every_file_of_the_pipeline(finished: Path, work: Path, forks: Forks) -> None:
    """One file after the other, in the order of their first write; the same command then resumes."""
    lines = finished.with_name("written").read_text().splitlines()
    names = list(dict.fromkeys(Path(line).relative_to(finished) for line in lines))
    patterns = {"best.pt", "last.pt", "metrics.jsonl", "events", "index.json", "encoder.json", "result.json",
                "summary.json", "metrics.json", "truth.json", "ribbons.png", "MODEL_CARD.md", "video01.h5"}  # fmt: skip
    assert patterns <= {name.name for name in names}
    for name in names:
        ended = forks.run(RUN, work, full_at=f"/{name}")
        assert "no room left on the disk" in one_line(ended), name
        assert left_half_done(work) == [], name
    must(forks, work, *RUN)
    assert "no room left" in one_line(forks.run(("report", "runs/r", "--no-thumbnails"), work, full_at="report.html"))
    must(forks, work, "report", "runs/r", "--no-thumbnails")
    assert differences(finished, work) == []


@pytest.mark.slow
def test_files_that_may_not_grow_are_one_line_at_any_size(base: Path, finished: Path, work: Path, forks: Forks) -> None:
    """A limit on the size of files, like a quota: the system refuses in the middle of files that grow beyond it."""
    failed = []
    for size in (15_000, 40_000, 100_000, 300_000, 1_000_000, 3_000_000):
        ended = forks.run(RUN, work, largest_file=size)
        if ended.code != 0:
            failed.append(one_line(ended))
            assert "no room left on the disk" in failed[-1] or "is the disk full?" in failed[-1]
        assert left_half_done(work) == []
    assert len(set(failed)) >= 4
    must(forks, work, *RUN)
    must(forks, work, "report", "runs/r", "--no-thumbnails")
    assert differences(finished, work) == []


@pytest.mark.slow
@pytest.mark.parametrize("command", ["simulate", "run"])
def test_a_small_disk_that_fills_up_again_and_again(
    base: Path, finished: Path, work: Path, forks: Forks, command: str
) -> None:
    """A tmpfs that is a little larger at each start; every start resumes the one before."""
    expected = base / "data" if command == "simulate" else finished
    arguments = ("simulate", "data", *SIMULATE) if command == "simulate" else RUN
    shutil.rmtree(work)
    size, growth = (40_000, 1.5) if command == "simulate" else (200_000, 2)
    failed: set[str] = set()
    with small_disk(work, size):
        if command == "run":
            (work / "tiny.json").write_text(json.dumps(SETTINGS))
        while True:
            ended = forks.run(arguments, work, blind=True)
            assert left_half_done(work) == []
            if ended.code == 0:
                break
            failed.add(one_line(ended))
            assert size < 100_000_000, ended.output
            size = int(size * growth)
            subprocess.run(["mount", "-o", f"remount,size={size}", str(work)], check=True)
        found = differences(expected, work / "data" if command == "simulate" else work)
        assert [line for line in found if line != "runs/r/report.html: missing"] == []
    assert len(failed) >= 4


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[None]:
    """A tmpfs of this many bytes at `folder`; skips if mounting is not allowed."""
    folder.mkdir(exist_ok=True)
    options = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if subprocess.run(options, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small disk takes root; files that may not grow are tested without")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
def test_predictions_that_do_not_fit_are_made_by_the_next_start(finished: Path, work: Path, forks: Forks) -> None:
    """A full disk ends the command, though a video that cannot be read would not."""
    shutil.rmtree(work)
    shutil.copytree(finished, work)
    videos = [f"../data/videos/video0{number}.mp4" for number in (1, 2)]
    line = ("predict", *videos, "--config", "tiny.json", "--name", "r")
    for name in ("video01.json", "video01.csv", "video01.png", "video02.csv"):
        assert f"{name}: no room left" in one_line(forks.run(line, work, full_at=f"predict/{name}"))
        assert left_half_done(work) == []
    assert "1 video(s) predicted" in must(forks, work, *line).output


@pytest.mark.slow
def test_labels_that_do_not_fit_leave_the_old_ones(finished: Path, base: Path, work: Path, forks: Forks) -> None:
    """New labels are written to a copy, so the features are not touched."""
    data = own_data(base, finished, work)
    path = data / "phase_annotations/video02-phase.txt"
    path.write_text(path.read_text().replace("ClippingCutting", "CalotTriangleDissection"))
    options = ("--config", "tiny.json", "--name", "r", "--set", f"data.root={data}")
    must(forks, work, "index", *options[:2], *options[4:], "--force")
    before = {path.name: path.read_bytes() for path in (work / "features").glob("*/*.h5")}
    assert "video02.h5: no room left" in one_line(forks.run(("extract", *options), work, full_at="/video02.h5"))
    assert {path.name: path.read_bytes() for path in (work / "features").glob("*/*.h5")} == before
    assert "1 with new labels only" in must(forks, work, "extract", *options).output
    after = {path.name: read_features(path) for path in (work / "features").glob("*/*.h5")}
    old = {path.name: read_features(path) for path in (finished / "features").glob("*/*.h5")}
    for name, video in after.items():
        assert video.features.tobytes() == old[name].features.tobytes()
        assert (video.phase == 2).any() == ((old[name].phase == 2).any() and name != "video02.h5")
    assert left_half_done(work) == []


def own_data(base: Path, finished: Path, work: Path) -> Path:
    """A copy of the videos beside a copy of the finished work folder, both free to be changed."""
    shutil.rmtree(work)
    shutil.copytree(finished, work)
    data = work.with_name(f"{work.name}-data")
    shutil.copytree(base / "data", data)
    return data


@pytest.mark.slow
def test_only_a_replaced_video_is_extracted_again(base: Path, finished: Path, work: Path, forks: Forks) -> None:
    data = own_data(base, finished, work)
    options = ("--config", "tiny.json", "--name", "r", "--set", f"data.root={data}")
    negative = [255 - frame for frame in decode_everything(data / "videos/video03.mp4")]
    encode_mp4(data / "videos/video03.mp4", negative, 2, {"preset": "ultrafast"}, lambda: None)
    ended = forks.run(("extract", *options), work)
    assert ended.code == 1
    assert re.search(
        r"failed: video03: .*video03\.mp4: has changed since it was indexed; run `index --force`", ended.output
    )
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in (work / "features").glob("*/*.h5")}
    must(forks, work, "index", *options[:2], *options[4:], "--force")
    assert "1 video(s) extracted" in must(forks, work, "extract", *options).output
    after = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in (work / "features").glob("*/*.h5")}
    assert {name for name in before if before[name] != after[name]} == {"video03.h5"}


# ---------------------------------------------------------------------------------------------- not allowed to write


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ("simulate", "new", *SIMULATE),
        ("index", "--config", "tiny.json", "--out", "other.json"),
        ("train-cnn", "--config", "tiny.json", "--name", "other"),
        ("train-cnn", "--config", "tiny.json", "--name", "r"),
        ("extract", "--config", "tiny.json", "--name", "other", "--set", "extract.encoder=initial"),
        ("extract", "--config", "tiny.json", "--name", "r"),
        ("train-temporal", "--config", "tiny.json", "--name", "r"),
        ("train-temporal", "--config", "tiny.json", "--name", "other", "--features", "FEATURES"),
        ("evaluate", "--config", "tiny.json", "--name", "r"),
        ("report", "runs/r", "--no-thumbnails"),
        ("predict", "../data/videos/video01.mp4", "--config", "tiny.json", "--name", "r"),
        ("export", "r", "--config", "tiny.json"),
        RUN,
    ],
    ids=lambda arguments: "-".join(arguments[:1] + arguments[5:6]),
)
def test_a_folder_that_may_only_be_read_is_one_line(
    finished: Path, work: Path, forks: Forks, arguments: tuple[str, ...]
) -> None:
    shutil.rmtree(work)
    shutil.copytree(finished, work)
    (features,) = (work / "features").iterdir()
    for name in ("runs/r/cnn/result.json", "runs/r/temporal/result.json", "runs/r/report.html"):
        if arguments[0] in ("train-cnn", "train-temporal", "report", "run"):
            (work / name).unlink()
    if arguments[0] == "extract" and len(arguments) == 5:
        (features / "video02.h5").unlink()
    arguments = tuple(str(features) if word == "FEATURES" else word for word in arguments)
    before = {path: path.stat().st_mtime_ns for path in work.rglob("*") if path.is_file()}
    for path in [work, *work.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        ended = forks.run(arguments, work, no_privileges=True)
        assert re.search(r"not allowed to write here|cannot create this folder \(Permission denied\)", one_line(ended))
        assert {path: path.stat().st_mtime_ns for path in work.rglob("*") if path.is_file()} == before
    finally:
        for path in [work, *work.rglob("*")]:
            path.chmod(0o755)


# ---------------------------------------------------------------------------------------------- dead workers


@pytest.mark.slow
def test_an_extraction_survives_a_killed_worker(finished: Path, work: Path, forks: Forks) -> None:
    """A killed process breaks the pool: the unfinished videos are done again, and no partial file remains."""
    shutil.rmtree(work)
    shutil.copytree(finished, work)
    shutil.rmtree(work / "features")
    shutil.rmtree(work / "cache")
    arguments = ("extract", "--config", "tiny.json", "--name", "r", "--set", "extract.workers=2")
    output = must(forks, work, *arguments, kill_a_worker="features/*/.*.h5.*.tmp").output
    assert "killed a worker" in output
    assert "3 video(s) extracted" in output
    shutil.copytree(finished / "cache", work / "cache")
    found = differences(finished, work)
    assert [line for line in found if "attribute frames_from" not in line and "attribute reader" not in line] == []


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["train-cnn", "train-joint"])
def test_a_training_whose_loader_was_killed_is_one_line_and_resumes(
    finished: Path, work: Path, stage: str, forks: Forks
) -> None:
    shutil.copytree(finished / "cache", work / "cache")
    shutil.copy(finished / "index.json", work)
    settings = {**SETTINGS, "joint": {"sequence": {"mode": "clips", "frames": 4, "batch": 2, "inference": "clip"},
                                      "multitask": {"epochs": 3, "precision": "fp32"}}}  # fmt: skip
    settings["cnn"] = {**SETTINGS["cnn"], "epochs": 6, "batch_frames": 2}
    (work / "tiny.json").write_text(json.dumps(settings))
    folder, block = {"train-cnn": ("cnn", "cnn"), "train-joint": ("joint/multitask", "joint")}[stage]
    line = (stage, "--config", "tiny.json", "--name", "x")
    workers = ("--set", f"{block}.workers=1")
    ended = forks.run((*line, *workers), work, kill_a_worker=f"runs/x/{folder}/last.pt")
    assert "a process that loads frames died" in one_line(ended)
    assert (work / "runs/x" / folder / "last.pt").exists()
    must(forks, work, *line)
    must(forks, work, *(word if word != "x" else "y" for word in line))
    shutil.copytree(work / "runs/x", base_of(work) / "x")
    shutil.copytree(work / "runs/y", base_of(work) / "y")
    found = differences(base_of(work) / "y", base_of(work) / "x")
    assert [line for line in found if not re.search(r"result\.json: checkpoint|config\.yaml: ", line)] == []


def base_of(work: Path) -> Path:
    return work.with_name(f"{work.name}-runs")


# ---------------------------------------------------------------------------------------------- network file systems


@pytest.mark.slow
def test_a_file_system_without_locks_that_renames_only_within_folders(finished: Path, work: Path, forks: Forks) -> None:
    faults = {"no_locks": True, "renames_within_folders": True}
    must(forks, work, *RUN, **faults)
    must(forks, work, "report", "runs/r", "--no-thumbnails", **faults)
    assert differences(finished, work) == []
