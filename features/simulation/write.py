"""Simulated operations as files, in Cholec80's own layout.

    OUT/videos/video01.mp4                         H.264 with B-frames
    OUT/phase_annotations/video01-phase.txt        a row each frame
    OUT/tool_annotations/video01-tool.txt          a row each second (each 25th frame at 25 fps)
    OUT/README.txt, OUT/simulation.json            what this is, and the settings it was made with

Each video depends on the seed, its number and the settings alone: not on how many are made, nor by how many processes.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from configs.errors import UserError
from configs.schema import DataSetSpec
from engine.files import (
    atomic_path,
    make_folder,
    read_json,
    remove_stale_temporaries,
    require_free_bytes,
    write_json,
    write_text,
)
from engine.stopping import StopRequest
from features.dataset.annotations import (
    PhaseTrack,
    ToolTrack,
    read_phase_file,
    read_tool_file,
    write_phase_file,
    write_tool_file,
)
from features.simulation.procedure import check_spec, draw_operation, frame_seconds, load_table
from features.simulation.scene import Scene
from features.video.readers import count_packets
from features.video.write import encode_mp4

# Raised with every change that alters labels or pixels, so that a folder never mixes two simulators.
SIMULATOR_VERSION = 1
SETTINGS_FILE = "simulation.json"
_README = "README.txt"
_POLL_S = 0.3
_VIDEOS, _PHASES, _TOOLS = "videos", "phase_annotations", "tool_annotations"
_PROGRAM = "surgstage simulate"
# Fixed, and one thread: the same pictures give the same stream. B-frames because real recordings have them.
_ENCODER = {
    "preset": "veryfast",
    "crf": "21",
    "threads": "1",
    # mbtree: its assembly code gave other bits from run to run, single-threaded (measured).
    "x264-params": "bframes=3:b-adapt=1:mbtree=0:keyint=250:min-keyint=25:threads=1:lookahead-threads=1",
}
_BYTES_A_PIXEL = 0.08
_SMALLEST_PX, _LARGEST_PX = 48, 4096
_Track = TypeVar("_Track", PhaseTrack, ToolTrack)


@dataclass(frozen=True)
class Settings:
    """All that a simulated video depends on beside its number."""

    seed: int
    fps: int
    width_px: int
    height_px: int
    speed_up: float
    spec: DataSetSpec

    def to_json(self) -> dict[str, Any]:
        return {
            "made_by": _PROGRAM,
            "simulated": True,
            "simulator_version": SIMULATOR_VERSION,
            "seed": self.seed,
            "fps": self.fps,
            "width_px": self.width_px,
            "height_px": self.height_px,
            "speed_up": self.speed_up,
            "phases": list(self.spec.phases),
            "tools": list(self.spec.tools),
            "id_format": self.spec.id_format,
        }


@dataclass(frozen=True)
class SimulatedData:
    """What `simulate` left in the folder: ids it made, ids that were whole already, seconds of video of the former."""

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
    on_progress: Callable[[int, int], object] | None = None,
) -> SimulatedData:
    """Write `videos` simulated operations, numbered from `first_number`, below `out`.

    `speed_up` divides the length of everything: at 10, an operation of 35 minutes becomes a video of 3.5. Videos that
    are whole already are left alone; `on_progress(done, videos)` counts them too. Raises UserError for settings that
    make no video, for a folder that holds other data or was made with other settings, and where nothing can be written;
    Stopped, with the video in hand removed, when asked to stop.
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
            raise UserError(f"{name} {size}: H.264 with 4:2:0 colour needs even sizes; take {size + 1}")
    check_spec(spec)
    settings = Settings(seed, fps, width_px, height_px, float(speed_up), spec)
    numbers = range(first_number, first_number + videos)
    _claim_folder(out, settings)
    if not (out / _README).exists():
        write_text(out / _README, _readme(settings))
    for folder in (out, out / _VIDEOS, out / _PHASES, out / _TOOLS):
        remove_stale_temporaries(folder)
    require_free_bytes(out, _expected_bytes(settings, videos), f"simulating {videos} videos")
    made: list[str] = []
    skipped: list[str] = []
    video_s = 0.0
    for done, (number, seconds) in enumerate(
        _each_video(out, settings, numbers, workers, StopRequest() if stop is None else stop), start=1
    ):
        (made if seconds else skipped).append(spec.id_format.format(number=number))
        video_s += seconds
        if on_progress is not None:
            on_progress(done, videos)
    return SimulatedData(tuple(sorted(made)), tuple(sorted(skipped)), video_s)


# ---------------------------------------------------------------------------------------------- before the first video


def _check_numbers(**limits: tuple[float, float, float]) -> None:
    for name, (value, low, high) in limits.items():
        if not low <= value <= high:  # NaN fails too
            raise UserError(f"{name} {value}: must lie between {low} and {high}")


def _claim_folder(out: Path, settings: Settings) -> None:
    """Take an empty folder, or one made with the same settings; write the settings into the former."""
    make_folder(out)
    wanted = settings.to_json()
    path = out / SETTINGS_FILE
    if path.exists():
        found = read_json(path)
        differing = [key for key in wanted if not isinstance(found, dict) or found.get(key) != wanted[key]]
        if differing:
            key = differing[0]
            was = found.get(key) if isinstance(found, dict) else None
            raise UserError(
                f"{path}: this folder was simulated with {key} {was!r}, not {wanted[key]!r}; choose another folder or "
                "delete this one"
            )
        return
    others = sorted(entry.name for entry in out.iterdir() if not entry.name.startswith("."))
    if others:
        raise UserError(f"{out}: holds other files ({others[0]}) and no {SETTINGS_FILE}; choose an empty or new folder")
    write_json(path, wanted)  # first: it makes the folder ours, should this be interrupted


def _readme(settings: Settings) -> str:
    return f"""SIMULATED data: not one picture or label in this folder comes from a patient.

Made by `{_PROGRAM}` (simulator version {SIMULATOR_VERSION}, seed {settings.seed}, {settings.fps} frames a second,
{settings.width_px}x{settings.height_px} pixels, operations sped up {settings.speed_up:g} times).
The layout is that of Cholec80. Pictures are procedural drawings. Label sequences are random, drawn from

{load_table().attribution}

Results on this data show that software works. They say nothing about real operations.
"""


def _expected_bytes(settings: Settings, videos: int) -> int:
    table = load_table()
    seconds = sum(length.segments * length.median for length in table.segments_s.values()) / table.videos
    frames = seconds / settings.speed_up * settings.fps * videos
    return int(frames * (settings.width_px * settings.height_px * _BYTES_A_PIXEL + 40))


# ---------------------------------------------------------------------------------------------- videos


def _each_video(
    out: Path, settings: Settings, numbers: Iterable[int], workers: int, stop: StopRequest
) -> Iterator[tuple[int, float]]:
    """Number and seconds of video made (0 if it was whole already) of each video, as they get ready."""
    if workers == 1:
        for number in numbers:
            yield number, _write_video(out, settings, number, stop.raise_if_set)
        return
    # Spawned, not forked: the parent may hold threads of other libraries.
    context = multiprocessing.get_context("spawn")
    stopped = context.Value("b", 0, lock=False)
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin_process, initargs=(stopped,))
    futures: dict[Future[float], int] = {
        pool.submit(_write_in_process, out, settings, number): number for number in numbers
    }
    try:
        while futures:
            finished, _ = wait(futures, timeout=_POLL_S, return_when=FIRST_COMPLETED)
            stop.raise_if_set()
            for future in finished:
                yield futures.pop(future), future.result()
    except BrokenProcessPool as error:
        raise UserError(
            f"{out}: a simulating process was killed (out of memory?); run it again with fewer workers, it goes on "
            "where it stopped"
        ) from error
    finally:
        stopped.value = 1
        pool.shutdown(wait=True, cancel_futures=True)


class _StoppedByParent(Exception):
    """Unwinds a video in a process whose parent has ended the work."""


_stopped: Any = None


def _begin_process(stopped: Any) -> None:
    """First thing in a process: signals reach the whole group, and it is the parent that decides what they mean."""
    global _stopped
    _stopped = stopped
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed parent cannot call its processes back."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _write_in_process(out: Path, settings: Settings, number: int) -> float:
    def check_stop() -> None:
        if _stopped.value:
            raise _StoppedByParent

    return _write_video(out, settings, number, check_stop)


def _write_video(out: Path, settings: Settings, number: int, check_stop: Callable[[], None]) -> float:
    """Write what is missing of one video; seconds of video made, 0 if all was there. `check_stop` raises to stop."""
    spec = settings.spec
    label_rng, picture_rng = np.random.default_rng([settings.seed, number]).spawn(2)
    operation = draw_operation(label_rng, spec)
    second = frame_seconds(operation, settings.fps, settings.speed_up)
    phase, tools = operation.phase[second], operation.tools[second]
    name = spec.id_format.format(number=number)
    frame_index = np.arange(len(phase))
    phases = PhaseTrack(frame_index, phase, stride=1)
    rows = ToolTrack(frame_index[:: settings.fps], tools[:: settings.fps], stride=settings.fps)
    whole = _keep(out / _PHASES / f"{name}-phase.txt", phases, spec, read_phase_file, write_phase_file)
    whole &= _keep(out / _TOOLS / f"{name}-tool.txt", rows, spec, read_tool_file, write_tool_file)
    path = out / _VIDEOS / f"{name}.mp4"
    if whole and _frames_in(path) == len(phase):
        return 0.0
    scene = Scene(picture_rng, phase, tools, spec, settings.fps, settings.width_px, settings.height_px)
    with atomic_path(path) as temporary:
        encode_mp4(temporary, scene, settings.fps, _ENCODER, check_stop)
        if _frames_in(temporary) != len(phase):
            raise UserError(f"{path}: the encoder lost frames; check the installation of PyAV (pip install -U av)")
    return len(phase) / settings.fps


def _keep(
    path: Path,
    track: _Track,
    spec: DataSetSpec,
    read: Callable[[Path, DataSetSpec], _Track],
    write: Callable[[Path, _Track, DataSetSpec], None],
) -> bool:
    """Make sure that an annotation file holds `track`; whether it did already."""
    with suppress(UserError):
        found = vars(read(path, spec))
        # Not the stride: a file of one row has none to read.
        if all(np.array_equal(found[name], value) for name, value in vars(track).items() if name != "stride"):
            return True
    write(path, track, spec)
    return False


def _frames_in(path: Path) -> int:
    """How many frames a video holds, counted without decoding; -1 for one that is missing or damaged."""
    try:
        return count_packets(path)
    except UserError:
        return -1
