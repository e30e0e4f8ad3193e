"""Predicting phases and tools of unlabelled videos: from frames to prediction files.

The two stages, or a joint net, process the sampled frames in order, batch by batch, and the head's state is carried
from frame to frame. Only the probabilities take more memory for a longer video.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from configs.dataset_spec import DataSetSpec
from configs.errors import UserError
from configs.schema import MAIN_TRACK, Config
from engine.files import atomic_path, inside, make_folder, read_json, write_json, write_text
from engine.memory import needs_gpu_memory
from engine.pool import VIDEO_ERRORS, attempt, failure_reason, require_one_usable
from engine.progress import progress_bar, say
from engine.runs import package_version
from engine.stopping import StopRequest
from evaluation.files.pre_annotations import (
    ENDINGS,
    pre_annotation_text,
    predicted_intervals,
    write_labelling_config,
)
from evaluation.files.predictions import PHASE, PredictionFile, write_prediction_csv
from evaluation.reports.overlay import Overlay
from evaluation.reports.paper_figures import phase_ribbons
from features.annotation_files.intervals import DEFAULT_TRACK, VideoAnnotations
from features.dataset.build import dataset_of_source
from features.dataset.index import Dataset, VideoEntry
from features.dataset.sampling import frame_times_s, sampled_frames
from features.frames.source import open_source, source_frames
from features.ids import file_stem
from features.video.write import encode_mp4
from live.nets import Nets
from live.recogniser import PhaseRecogniser, Recognition
from live.recording import ENCODER
from stage1_cnn.decode_ahead import frames_of_videos


@dataclass
class PredictReport:
    """What one call of `predict` did: video ids by outcome, and the reason of each failure."""

    out: Path
    done: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)

    def sentence(self) -> str:
        """The outcome in one line."""
        others = [(len(self.skipped), "unchanged"), (len(self.failed), "failed")]
        more = "".join(f", {count} {word}" for count, word in others if count)
        return f"{len(self.done)} video(s) predicted{more}; {self.out}"


@needs_gpu_memory("extract.batch_frames")
def predict_new_videos(
    nets: Nets,
    sources: Sequence[Path],
    out: Path,
    *,
    draw: bool = False,
    formats: Sequence[str] = (),
    stop: StopRequest,
) -> PredictReport:
    """Write `<video>.csv`, `<video>.png` (ribbon), `<video>.json` and, with `draw`, `<video>.mp4` into `out`.

    For each additional label track that the net recognises, `<track>/<video>.csv` and `.png` are written too. `formats`
    are those of annotation tools to write as well (`evaluation.files.pre_annotations`). The JSON file records which net
    and source the others were made from. A video is skipped if its files exist and were made from the same net and
    source. A video that cannot be read is reported, and the others are predicted. Raises UserError if no video can be
    predicted or if two sources have the same name, and Stopped when `stop` is set.
    """
    datasets, report = {}, PredictReport(make_folder(out))
    for path in sources:
        try:
            dataset = dataset_of_source(path, nets.spec, nets.config.data)
        except UserError as error:
            report.failed.append((path.name, str(error)))
            continue
        name = dataset.index.videos[0].id
        if name in datasets:
            raise UserError(f"{path}: another source is called {name} too; predict each into its own folder with --out")
        datasets[name] = dataset
        for note in dataset.index.notes:
            say(f"note: {note}")
    require_one_usable(report.failed, len(datasets))
    if "labelstudio" in formats:
        write_labelling_config(out, nets.spec, nets.tracks)
    waiting = []
    for name, dataset in datasets.items():
        try:
            video = _Video(nets, dataset, out, draw, formats, stop)
            done = video.is_done()
        except VIDEO_ERRORS as error:
            report.failed.append((name, failure_reason(error)))
        else:
            report.skipped.append(name) if done else waiting.append(video)
    _predict_all(waiting, nets.config, report, stop)
    require_one_usable(report.failed, len(report.done) + len(report.skipped))
    return report


def _predict_all(videos: Sequence[_Video], config: Config, report: PredictReport, stop: StopRequest) -> None:
    """Predict the videos; several at the same time if other processes decode them."""
    total = sum(len(video.frame_index) for video in videos)
    failed: set[int] = set()
    messages = frames_of_videos([video.open_frames for video in videos], config, total, failed)
    with progress_bar(total, "predict", "frame") as bar, closing(messages):
        for number, message in messages:
            stop.raise_if_set()
            if number in failed:
                continue
            video = videos[number]
            reason = message if isinstance(message, str) else attempt(video.take, message)
            if reason is not None:
                failed.add(number)
                report.failed.append((video.entry.id, reason))
            elif message is None:
                report.done.append(video.entry.id)
            elif isinstance(message, Tensor):
                bar.update(len(message))


class _Found:
    """What was recognised in a video so far: labels, probabilities of each label track, and tools."""

    def __init__(self) -> None:
        self._labels: dict[str, list[int]] = {}
        self._probabilities: dict[str, list[NDArray[np.float32]]] = {}
        self._tools: list[NDArray[np.float32]] = []

    def add(self, recognised: Sequence[Recognition]) -> None:
        """Add what was recognised in the next frames."""
        for one in recognised:
            for track, found in {MAIN_TRACK: one.main, **one.tracks}.items():
                self._labels.setdefault(track, []).append(found.label)
                self._probabilities.setdefault(track, []).append(found.probabilities)
            if one.tools is not None:
                self._tools.append(one.tools)

    def predictions(self, frame_index: NDArray[np.int64], time_s: NDArray[np.float64]) -> list[PredictionFile]:
        """The prediction of the phases and that of each further track, for frames with these numbers and times."""
        tools = np.stack(self._tools) if self._tools else None
        return [
            PredictionFile(
                frame_index,
                time_s,
                np.array(self._labels[track], dtype=np.int8),
                np.stack(values),
                tools if track == MAIN_TRACK else None,
            )
            for track, values in self._probabilities.items()
        ]


class _Video:
    """The prediction of one video, computed from the messages of `stage1_cnn.decode_ahead`, and its files."""

    def __init__(
        self,
        nets: Nets,
        dataset: Dataset,
        out: Path,
        draw: bool,
        formats: Sequence[str],
        stop: StopRequest,
    ) -> None:
        self.entry, self._dataset = dataset.index.videos[0], dataset
        self._nets, self._draw, self._formats, self._stop = nets, draw, formats, stop
        endings = {kind: kind for kind in ("csv", "png", "mp4", "json")} | {
            f"as {kind}": ENDINGS[kind] for kind in formats
        }
        stem = file_stem(self.entry.id)
        self._files = {kind: out / f"{stem}.{ending}" for kind, ending in endings.items()}
        self._files |= {
            f"{track}/{kind}": out / track / f"{stem}.{kind}" for track in nets.tracks for kind in ("csv", "png")
        }
        self._made_by = {**_identity_of_source(self.entry), **nets.identity}
        version = package_version("surgstage")
        self._about = {"source": self.entry.source, "surgstage": version, "made_by": self._made_by}
        self.frame_index = sampled_frames(self.entry, nets.config.data.fps)
        self._time_s = frame_times_s(self.entry, self.frame_index)
        self.open_frames = partial(source_frames, nets.config, dataset, self.entry, self.frame_index)

    def is_done(self) -> bool:
        """Whether all files exist already. Raises UserError if a file exists that was made from something else."""
        wanted = [kind for kind in self._files if kind != "json" and (kind != "mp4" or self._draw)]
        return _is_done(self._files, wanted, self._made_by, inside(self._dataset.root, self.entry.source))

    def take(self, message: dict[str, str] | Tensor | None) -> None:
        """Process the next message: first a dict (the frames' reader and source), then batches of frames, then None.

        The dict starts the prediction (again), and None ends it and writes the files.
        """
        if isinstance(message, dict):
            # written first, so that after an interruption the other files are known to be this program's
            write_json(self._files["json"], {**self._about, "complete": False})
            self._recogniser, self._found, self._frames = PhaseRecogniser(self._nets), _Found(), 0
        elif message is not None:
            rows = slice(self._frames, self._frames + len(message))
            self._frames = rows.stop
            taken = self._recogniser.recognise(message, self.frame_index[rows].tolist(), self._time_s[rows].tolist())
            self._found.add(taken)
        else:
            self._found.add(self._recogniser.finish())
            self._write()

    def _annotations(self, predictions: Sequence[PredictionFile]) -> VideoAnnotations:
        """The predictions of each track as intervals.

        The last one lasts as long as a sample, but not beyond the video.
        """
        entry, config, spec = self.entry, self._nets.config, self._nets.spec
        time_s = predictions[0].time_s
        end_s = float(frame_times_s(entry, [entry.frame_count - 1])[0]) + 1 / entry.fps
        edges_s = np.append(time_s, min(time_s[-1] + 1 / config.data.fps, end_s))
        annotator = f"surgstage {self._about['surgstage']}"
        tracks = {DEFAULT_TRACK: spec.phases, **{name: spec.tracks[name].classes for name in self._nets.tracks}}
        found = [
            predicted_intervals(one.phase, one.probabilities, edges_s, classes, annotator, name)
            for one, (name, classes) in zip(predictions, tracks.items(), strict=True)
        ]
        media = str(inside(self._dataset.root, entry.source)) if entry.kind == "video" else None
        return VideoAnnotations(entry.id, tuple(chain.from_iterable(found)), entry.fps, media)

    def _write(self) -> None:
        spec = self._nets.spec
        prediction, *others = predictions = self._found.predictions(self.frame_index, self._time_s)
        self._write_track(prediction, spec, PHASE, "phases", "")
        for track, one in zip(self._nets.tracks, others, strict=True):
            make_folder(self._files[f"{track}/csv"].parent)
            self._write_track(one, spec.as_track(track), track, track, f"{track}/")
        if self._formats:
            annotations = self._annotations(predictions)
            for kind in self._formats:
                write_text(self._files[f"as {kind}"], pre_annotation_text(kind, annotations))
        if self._draw:
            _draw(self._nets, prediction, self._dataset, self._files["mp4"], self._stop)
        write_json(self._files["json"], {**self._about, "samples": len(prediction.phase), "complete": True})

    def _write_track(self, found: PredictionFile, spec: DataSetSpec, column: str, what: str, prefix: str) -> None:
        """Write CSV and ribbon of one track; `what` are its classes in the title, `prefix` that of the files' keys."""
        name, fps = self.entry.id, self._nets.config.data.fps
        write_prediction_csv(self._files[f"{prefix}csv"], found, spec, column)
        drawn = [(name, np.full(len(found.phase), -1, np.int8), {"predicted": found.phase})]
        title = f"{name}: predicted {what} ({self._nets.spec.title or self._nets.spec.name})"
        phase_ribbons(self._files[f"{prefix}png"], drawn, fps, spec.phases, title, {name: found.time_s})


def _identity_of_source(entry: VideoEntry) -> dict[str, Any]:
    """Everything in the video that a prediction depends on, including how the numbers in a frame folder are read."""
    return {
        "source_sha256_ends": entry.sha256_ends,
        "source_bytes": entry.size_bytes,
        "source_fps": entry.fps,
        "source_frames": entry.frame_count,
        "frames": entry.frames.model_dump(mode="json") if entry.frames else None,
        **({"times": entry.times.model_dump(mode="json")} if entry.times else {}),
    }


def _is_done(files: Mapping[str, Path], wanted: Sequence[str], made_by: Mapping[str, Any], source: Path) -> bool:
    """Whether all requested files exist already.

    Raises UserError if a file would be replaced that is the source itself or was made from something else.
    """
    for kind in (*wanted, "json"):
        if files[kind].exists() and files[kind].samefile(source):
            raise UserError(f"{source}: would be replaced by its own prediction; name another folder with --out")
    if not files["json"].exists():
        foreign = [kind for kind in wanted if files[kind].exists()]
        if foreign:
            raise UserError(
                f"{files[foreign[0]]}: exists and is not a prediction of this program; name another folder with --out"
            )
        return False
    found = read_json(files["json"])
    if not isinstance(found, dict) or found.get("made_by") != made_by:
        raise UserError(f"{files['json']}: made by another net or from another video; choose another --out")
    return bool(found.get("complete")) and all(files[kind].exists() for kind in wanted)


def _draw(nets: Nets, prediction: PredictionFile, dataset: Dataset, path: Path, stop: StopRequest) -> None:
    """Write a video of all frames of the source; below each frame the predictions up to it are drawn."""
    entry, spec = dataset.index.videos[0], nets.spec
    with open_source(nets.config, dataset, entry) as reader:
        shown = entry.image_frames[entry.image_frames >= prediction.frame_index[0]]
        samples = np.searchsorted(prediction.frame_index, shown, side="right") - 1
        scores = prediction.probabilities, prediction.tool_probabilities

        def drawn_frames() -> Iterator[NDArray[np.uint8]]:
            overlay = None
            with progress_bar(len(shown), f"{entry.id}, drawing", "frame") as bar:
                for frame, sample in zip(reader.read(shown.tolist()), samples.tolist(), strict=True):
                    if overlay is None:
                        size = frame.shape[1], frame.shape[0]
                        overlay = Overlay(*size, *scores, spec.phases, spec.tools, prediction.phase)
                    yield overlay.add(frame, sample)
                    bar.update()

        with atomic_path(path) as temporary:
            uneven = entry.times_s is not None or (entry.frames and entry.frames.missing)
            time_s = frame_times_s(entry, shown) if uneven else None
            rate = entry.fps / entry.image_stride
            encode_mp4(temporary, drawn_frames(), rate, ENCODER, stop.raise_if_set, time_s)
