"""Write simulated operations as files, in the layout of Cholec80.

    OUT/videos/video01.mp4                         H.264 with B-frames
    OUT/phase_annotations/video01-phase.txt        one row per frame
    OUT/tool_annotations/video01-tool.txt          one row per second (every 25th frame at 25 fps)
    OUT/README.txt, OUT/simulation.json            a description, and the settings it was made with

Each video depends only on the seed, its number and the settings. It does not depend on how many videos are made, or by
how many processes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from configs.dataset_spec import DataSetSpec
from configs.errors import UserError
from engine.files import (
    atomic_path,
    make_folder,
    read_json_object,
    remove_stale_temporaries,
    require_free_bytes,
    write_json,
    write_text,
)
from engine.pool import Advance, VideoFault, work_through
from engine.stopping import StopRequest
from features.dataset.annotations import LabelTrack
from features.dataset.formats.cholec80 import read_phase_file, read_tool_file, write_label_file
from features.simulation.procedure import check_spec, draw_operation, frame_seconds, load_table
from features.simulation.scene import Scene
from features.video.scan import count_packets
from features.video.write import encode_mp4

# Incremented with every change that alters labels or pixels, so that a folder never contains videos of two versions.
SIMULATOR_VERSION = 1
SETTINGS_FILE = "simulation.json"
_README = "README.txt"
_VIDEOS, _PHASES, _TOOLS = "videos", "phase_annotations", "tool_annotations"
_PROGRAM = "surgstage simulate"
_RESUME = "run it again, perhaps with fewer workers: it resumes where it stopped"
# Options are fixed, and there is one thread, so that the same frames give the same stream. There are B-frames because
# real recordings have them.
_ENCODER = {
    "preset": "veryfast",
    "crf": "21",
    "threads": "1",
    # mbtree is off: its assembly code gave different bits from run to run, even with one thread (measured).
    "x264-params": "bframes=3:b-adapt=1:mbtree=0:keyint=250:min-keyint=25:threads=1:lookahead-threads=1",
}
_BYTES_PER_PIXEL = 0.08
_SMALLEST_PX, _LARGEST_PX = 48, 4096


@dataclass(frozen=True)
class Settings:
    """Everything that a simulated video depends on, apart from its number."""

    seed: int
    fps: int
    width_px: int
    height_px: int
    speed_up: float
    spec: DataSetSpec

    def to_json(self) -> dict[str, Any]:
        about = {"made_by": _PROGRAM, "simulated": True, "simulator_version": SIMULATOR_VERSION}
        numbers = {name: value for name, value in vars(self).items() if name != "spec"}
        classes = {"phases": list(self.spec.phases), "tools": list(self.spec.tools)}
        return {**about, **numbers, **classes, "id_format": self.spec.id_format}


@dataclass(frozen=True)
class SimulatedData:
    """The result of `simulate`: ids of the videos made, ids that were complete before, and seconds of video made."""

    made: tuple[str, ...]
    skipped: tuple[str, ...]
    video_s: float


def simulate(
    out: Path,
    *,
    videos: int,
    seed: int,
    spec: DataSetSpec,
    fps: int = 25,
    width_px: int = 224,
    height_px: int = 224,
    speed_up: float = 1.0,
    first_number: int = 1,
    workers: int = 1,
    stop: StopRequest | None = None,
) -> SimulatedData:
    """Write `videos` simulated operations, numbered from `first_number`, below `out`, with a progress bar.

    `speed_up` divides all durations: with 10, an operation of 35 minutes becomes a video of 3.5 minutes. Videos that
    are complete are not written again. Raises UserError if a setting is out of range, if the folder contains other data
    or was made with other settings, or if a video cannot be written. Raises Stopped when asked to stop, after removing
    unfinished videos.
    """
    _check_numbers(
        videos=(videos, 1, 100_000),
        seed=(seed, 0, 2**63 - 1),
        fps=(fps, 1, 120),
        width_px=(width_px, _SMALLEST_PX, _LARGEST_PX),
        height_px=(height_px, _SMALLEST_PX, _LARGEST_PX),
        speed_up=(speed_up, 0.1, 200),
        first_number=(first_number, 0, 1_000_000),
        workers=(workers, 1, 1024),
    )
    for name, size in (("width_px", width_px), ("height_px", height_px)):
        if size % 2:
            raise UserError(f"{name} {size}: H.264 with 4:2:0 colour needs even sizes; use {size + 1}")
    check_spec(spec)
    settings = Settings(seed, fps, width_px, height_px, float(speed_up), spec)
    _prepare_folder(out, settings, videos)
    stop = StopRequest() if stop is None else stop
    writer = _Writer(out, settings)
    jobs: list[_Video] = []
    complete: list[_Video] = []
    for number in range(first_number, first_number + videos):
        stop.raise_if_set()
        job, is_complete = writer.plan(number)
        (complete if is_complete else jobs).append(job)
    for job, reason in work_through(writer, jobs, min(workers, len(jobs)), "simulating", stop):
        if reason is not None:
            raise UserError(reason if isinstance(reason, VideoFault) else f"{out}: {job.name}: {reason}; {_RESUME}")
    made, skipped = (tuple(sorted(job.name for job in part)) for part in (jobs, complete))
    return SimulatedData(made, skipped, sum(job.frames / fps for job in jobs))


# ---------------------------------------------------------------------------------------------- before the first video


def _check_numbers(**limits: tuple[float, float, float]) -> None:
    for name, (value, low, high) in limits.items():
        if not low <= value <= high:  # NaN fails too
            raise UserError(f"{name} {value}: must be between {low} and {high}")


def _prepare_folder(out: Path, settings: Settings, videos: int) -> None:
    """Claim the folder, write its description, and remove leftovers of killed processes.

    Raises UserError if the folder cannot be used or the disk has too little space.
    """
    _claim_folder(out, settings)
    if not (out / _README).exists():
        write_text(out / _README, _readme(settings))
    for folder in (out, out / _VIDEOS, out / _PHASES, out / _TOOLS):
        remove_stale_temporaries(folder)
    require_free_bytes(out, _expected_bytes(settings, videos), f"simulating {videos} videos")


def _claim_folder(out: Path, settings: Settings) -> None:
    """Write the settings into an empty folder, or check that the folder was made with the same settings.

    Raises UserError if it contains other files or was made with other settings.
    """
    make_folder(out)
    wanted = settings.to_json()
    path = out / SETTINGS_FILE
    if path.exists():
        found = read_json_object(path)
        for key in wanted:
            if found.get(key) != wanted[key]:
                raise UserError(
                    f"{path}: this folder was simulated with {key} {found.get(key)!r}, not {wanted[key]!r}; choose "
                    "another folder or delete this one"
                )
        return
    others = sorted(entry.name for entry in out.iterdir() if not entry.name.startswith("."))
    if others:
        raise UserError(
            f"{out}: contains other files ({others[0]}) and no {SETTINGS_FILE}; choose an empty or new folder"
        )
    write_json(path, wanted)  # written first, so that the folder is recognised after an interruption


def _readme(settings: Settings) -> str:
    return f"""SIMULATED data: no image and no label in this folder comes from a patient.

Made by `{_PROGRAM}` (simulator version {SIMULATOR_VERSION}, seed {settings.seed}, {settings.fps} frames per second,
{settings.width_px}x{settings.height_px} pixels, operations sped up {settings.speed_up:g} times).
The layout is that of Cholec80. Images are procedural drawings. Label sequences are random, drawn from

{load_table().attribution}

Results on this data show that the software works. They say nothing about real operations.
"""


def _expected_bytes(settings: Settings, videos: int) -> int:
    table = load_table()
    seconds = sum(length.segments * length.median for length in table.segments_s.values()) / table.videos
    frames = seconds / settings.speed_up * settings.fps * videos
    return int(frames * (settings.width_px * settings.height_px * _BYTES_PER_PIXEL + 40))


# ---------------------------------------------------------------------------------------------- videos


@dataclass(frozen=True)
class _Video:
    """One video to write, as a job for the process pool."""

    number: int
    name: str
    frames: int


@dataclass(frozen=True)
class _Content:
    """The files of one video and their content. `tools` (T, K) int8 has a row per frame; `rng` draws the images."""

    phase_file: Path
    phases: LabelTrack
    tool_file: Path
    tool_rows: LabelTrack
    video_file: Path
    tools: np.ndarray
    rng: np.random.Generator


@dataclass(frozen=True)
class _Writer:
    """Writes videos and their annotation files below `out`, as a task of the process pool."""

    out: Path
    settings: Settings

    def plan(self, number: int) -> tuple[_Video, bool]:
        """Return the job that writes a video, and whether all its files are already complete."""
        content, spec = self._draw(number), self.settings.spec
        job = _Video(number, content.video_file.stem, len(content.tools))
        complete = (
            _holds(content.phase_file, content.phases, spec, read_phase_file)
            and _holds(content.tool_file, content.tool_rows, spec, read_tool_file)
            and _frames_in(content.video_file) == job.frames
        )
        return job, complete

    def __call__(self, job: _Video, advance: Advance) -> None:
        content, settings = self._draw(job.number), self.settings
        write_label_file(content.phase_file, content.phases, settings.spec)
        write_label_file(content.tool_file, content.tool_rows, settings.spec)
        size_px = settings.width_px, settings.height_px
        scene = Scene(content.rng, content.phases.labels, content.tools, settings.spec, settings.fps, size_px)
        path = content.video_file
        with atomic_path(path) as temporary:
            encode_mp4(temporary, scene, settings.fps, _ENCODER, lambda: advance(1))
            if _frames_in(temporary) != job.frames:
                raise UserError(f"{path}: the encoder lost frames; check the installation of PyAV (pip install -U av)")

    def _draw(self, number: int) -> _Content:
        settings, spec = self.settings, self.settings.spec
        label_rng, image_rng = np.random.default_rng([settings.seed, number]).spawn(2)
        operation = draw_operation(label_rng, spec)
        second = frame_seconds(operation, settings.fps, settings.speed_up)
        phase, tools = operation.phase[second], operation.tools[second]
        name = spec.id_format.format(number=number)
        frame_index = np.arange(len(phase))
        rows = slice(None, None, settings.fps)
        return _Content(
            self.out / _PHASES / f"{name}-phase.txt",
            LabelTrack(frame_index, phase, stride=1),
            self.out / _TOOLS / f"{name}-tool.txt",
            LabelTrack(frame_index[rows], tools[rows], stride=settings.fps),
            self.out / _VIDEOS / f"{name}.mp4",
            tools,
            image_rng,
        )


def _holds(path: Path, track: LabelTrack, spec: DataSetSpec, read: Callable[[Path, DataSetSpec], LabelTrack]) -> bool:
    """Whether an annotation file contains the rows of `track`."""
    with suppress(UserError):
        found, wanted = vars(read(path, spec)), vars(track)
        # The stride is not compared, since a file with a single row does not show it.
        return all(np.array_equal(found[name], wanted[name]) for name in wanted if name != "stride")
    return False


def _frames_in(path: Path) -> int:
    """Count a video's frames without decoding; returns -1 if it is missing or damaged."""
    try:
        return count_packets(path)
    except UserError:
        return -1
