"""Predicting phases and tools of unlabelled videos: from frames to prediction files.

The two stages, or a joint net, process the sampled frames in order, batch by batch, and the head's state is carried
from frame to frame. Only the probabilities take more memory for a longer video.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from configs.dataset_spec import DataSetSpec
from configs.errors import UserError
from configs.load import NO_KEYS, GivenKeys, load_dataset
from configs.schema import CNN_FOLDER, JOINT_FOLDER, MAIN_TRACK, TEMPORAL_FOLDER, Config, Inference
from engine.device import start_stage
from engine.files import atomic_path, inside, make_folder, read_json, sha256_file, write_json, write_text
from engine.memory import needs_gpu_memory
from engine.pool import VIDEO_ERRORS, attempt, failure_reason, require_one_usable
from engine.progress import progress_bar, say
from engine.runs import BEST_FILE, package_version, require_same_classes
from engine.stopping import StopRequest
from evaluation.files.pre_annotations import (
    ENDINGS,
    pre_annotation_text,
    predicted_intervals,
    write_labelling_config,
)
from evaluation.files.predictions import PHASE, PredictionFile, write_prediction_csv
from evaluation.metrics.tools import sigmoid
from evaluation.reports.overlay import Overlay
from evaluation.reports.paper_figures import phase_ribbons
from features.annotation_files.intervals import DEFAULT_TRACK, VideoAnnotations
from features.dataset.build import dataset_of_source
from features.dataset.index import Dataset, VideoEntry
from features.dataset.sampling import frame_times_s, sampled_frames
from features.frames.preprocess import preprocess_from_json
from features.frames.settings_match import require_preprocess_of
from features.frames.source import open_source, source_frames
from features.ids import file_stem
from features.video.write import encode_mp4
from stage1_cnn.decode_ahead import frames_of_videos
from stage1_cnn.encoders.calibration import FromStore
from stage1_cnn.encoders.encoder import load_encoder
from stage2_temporal.data import with_tool_logits
from stage2_temporal.decoding.chosen import ChosenDecoding
from stage2_temporal.decoding.tools import ToolSmoother
from stage2_temporal.heads.base import require_causal
from stage2_temporal.model import PhaseModel
from stage2_temporal.predict import OnlinePredictor, as_trained, chosen_inference, load_temporal, other_encoder
from stage2_temporal.tool_probe import fitting_tool_probe

# Encodes fast, with sufficient quality: the annotated video illustrates a prediction and is not an archive.
_ENCODER = {"preset": "veryfast", "crf": "23"}


@dataclass(frozen=True)
class Recogniser:
    """A trained net that recognises phases and tools in frames.

    `encode` maps resized frames (N, R, R, 3) uint8 to the input of `phase`, which is (N, D) or (N, D + K) fp32, and to
    tool logits (N, K), or None without a tool branch. `weights` holds the SHA-256 of each checkpoint or encoder.
    """

    encode: Callable[[Tensor], tuple[Tensor, NDArray[np.float32] | None]]
    phase: PhaseModel
    inference: Inference
    clip_frames: int
    config: Config  # with the preprocessing and data.fps of the training
    spec: DataSetSpec
    weights: dict[str, str]
    tracks: tuple[str, ...] = ()  # additional label tracks, in the order of `phase`'s output after the phases
    decoding: ChosenDecoding | None = None

    def by_track(self, probabilities: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        """The output of `phase` (T, C), divided into the probabilities of the phases and of each of `tracks`."""
        return np.split(probabilities, np.cumsum(self.phase.head.widths)[:-1], axis=1)

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that a prediction depends on, apart from the video."""
        clip_frames = self.clip_frames if self.inference == "clip" else None
        found = {**self.weights, "inference": self.inference, "clip_frames": clip_frames, "fps": self.config.data.fps}
        smoothing_s = self.tool_smoothing_s
        found |= {"tool_smoothing_s": smoothing_s} if smoothing_s else {}
        return found | ({"decoding": self.decoding.to_json(self.config.data.fps)} if self.decoding else {})

    @property
    def tool_smoothing_s(self) -> float:
        """The time over which the probabilities of tools are smoothed; 0 for single frames."""
        return self.config.temporal.decoding.tool_smoothing_s


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


# ---------------------------------------------------------------------------------------------- the nets


def pair_of_stages(
    config: Config,
    run: Path,
    cnn_run: Path | None = None,
    inference: Inference | None = None,
    *,
    trusted: bool = False,
    given: GivenKeys = NO_KEYS,
) -> Recogniser:
    """Stage two of `run`, preceded by the encoder that computed the features of its training.

    The encoder is stage one of `cnn_run` (by default of the same run), unless `extract.checkpoint` or `extract.encoder`
    name another one. If it has no tool head, tools are recognised by the probe of `run`, if there is one. Raises
    UserError if stage two or the probe was trained on features of another encoder, if the head needs whole videos, or
    if the user gave (`given`) another preprocessing, sampling rate or backbone.
    """
    folder = run / TEMPORAL_FOLDER
    model, about = load_temporal(folder)
    require_causal(model.head)
    inference = chosen_inference(inference, about.inference, model, folder)
    decoding = ChosenDecoding.of_run(folder, config.temporal.decoding, about.classes, about.inference, inference)
    recorded = about.encoder
    if not recorded:
        raise UserError(f"{folder / 'best.pt'}: does not record the encoder of its features; train it again")
    preprocess = preprocess_from_json(recorded["preprocess"], str(folder / BEST_FILE))
    require_preprocess_of(preprocess, config, given, folder / BEST_FILE, recorded["fps"], recorded["backbone"])
    config = as_trained(config, preprocess, recorded["fps"], recorded["backbone"], recorded.get("storage"))
    spec = load_dataset(config.data.dataset)
    require_same_classes(folder / BEST_FILE, "phases", about.phases, spec.phases)
    for track, classes in (about.tracks or {}).items():
        known = spec.tracks.get(track)
        require_same_classes(folder / BEST_FILE, track, classes, known.classes if known else (), spec.name)
    try:
        int8 = FromStore(config.extract.store, recorded)
        encoder = load_encoder(config, cnn_run or run, spec.tools, trusted, int8)
    except UserError as error:
        raise _with_other_ways(error, run, cnn_run) from error
    if difference := other_encoder(recorded, encoder.spec.to_json()):
        as_it_is = config.extract.checkpoint is None and config.extract.encoder == "initial"
        run_of_net = "name the run whose net made the features: --from-cnn or --from-joint"
        todo = "give the weights that its encoder had: cnn.weights" if as_it_is else run_of_net
        raise UserError(f"{folder / 'best.pt'}: trained on features of another encoder ({difference}); {todo}")
    if about.tool_inputs:
        require_same_classes(folder / BEST_FILE, "tools", about.tool_inputs, spec.tools, spec.name)
    made_now = encoder.spec
    has_head = encoder.tool_head is not None
    probe = None if has_head else fitting_tool_probe(run, made_now.to_json(), made_now.digest, spec.tools)
    start_stage("predict", config, encoder.device, encoder.spec.precision)

    def encode(frames: Tensor) -> tuple[Tensor, NDArray[np.float32] | None]:
        embedding, logits = encoder(frames)
        stored = torch.from_numpy(embedding.astype(encoder.spec.storage))  # rounded as in the training of stage two
        if about.tool_inputs:
            stored = with_tool_logits(stored, torch.from_numpy(logits), str(folder))
        if probe is not None:
            logits = probe.logits(embedding.astype(made_now.storage))
        return stored.float(), logits if has_head or probe is not None else None

    weights = {"temporal": sha256_file(folder / BEST_FILE), "encoder": encoder.spec.digest}
    if probe is not None:
        weights["tools"] = sha256_file(probe.path)
    return Recogniser(encode, model, inference, about.frames, config, spec, weights, about.further_tracks, decoding)


def _with_other_ways(error: UserError, run: Path, cnn_run: Path | None) -> UserError:
    """The error with a hint about what to do instead, if the run has stage two but not stage one."""
    if cnn_run is not None or (run / CNN_FOLDER).is_dir():
        return error
    if not (run / JOINT_FOLDER).is_dir():
        return UserError(f"{error}; or use --from-cnn to name the run whose stage one made the features")
    return UserError(
        f"{error}; this run also has a joint net: add --model joint to predict with it or, if the features came from "
        f"its backbone, --from-joint {run.name}"
    )


# ---------------------------------------------------------------------------------------------- the videos


@needs_gpu_memory("extract.batch_frames")
def predict_new_videos(
    recogniser: Recogniser,
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
            dataset = dataset_of_source(path, recogniser.spec, recogniser.config.data)
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
        write_labelling_config(out, recogniser.spec, recogniser.tracks)
    waiting = []
    for name, dataset in datasets.items():
        try:
            video = _Video(recogniser, dataset, out, draw, formats, stop)
            done = video.is_done()
        except VIDEO_ERRORS as error:
            report.failed.append((name, failure_reason(error)))
        else:
            report.skipped.append(name) if done else waiting.append(video)
    _predict_all(waiting, recogniser.config, report, stop)
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


class _Video:
    """The prediction of one video, computed from the messages of `stage1_cnn.decode_ahead`, and its files."""

    def __init__(
        self,
        recogniser: Recogniser,
        dataset: Dataset,
        out: Path,
        draw: bool,
        formats: Sequence[str],
        stop: StopRequest,
    ) -> None:
        self.entry, self._dataset = dataset.index.videos[0], dataset
        self._recogniser, self._draw, self._formats, self._stop = recogniser, draw, formats, stop
        endings = {kind: kind for kind in ("csv", "png", "mp4", "json")} | {
            f"as {kind}": ENDINGS[kind] for kind in formats
        }
        stem = file_stem(self.entry.id)
        self._files = {kind: out / f"{stem}.{ending}" for kind, ending in endings.items()}
        self._files |= {
            f"{track}/{kind}": out / track / f"{stem}.{kind}" for track in recogniser.tracks for kind in ("csv", "png")
        }
        self._made_by = {**_identity_of_source(self.entry), **recogniser.identity}
        version = package_version("surgstage")
        self._about = {"source": self.entry.source, "surgstage": version, "made_by": self._made_by}
        self.frame_index = sampled_frames(self.entry, recogniser.config.data.fps)
        self.open_frames = partial(source_frames, recogniser.config, dataset, self.entry, self.frame_index)

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
            known = self._recogniser
            self._online = OnlinePredictor(known.phase, known.inference, known.clip_frames, known.config.device)
            self._phases: list[NDArray[np.float32]] = []
            self._smoother = ToolSmoother(known.tool_smoothing_s, known.config.data.fps)
            self._tools: list[NDArray[np.float64]] = []
        elif message is not None:
            embedding, logits = self._recogniser.encode(message)  # (N, D), (N, K)
            self._phases += [self._online.step(frame) for frame in embedding]
            if logits is not None:
                self._tools.append(self._smoother.step(sigmoid(logits)))
        else:
            self._write()

    def _predictions(self) -> list[PredictionFile]:
        """The predictions of the phases, with the tools, and of each additional track."""
        known = self._recogniser
        tools = np.concatenate(self._tools).astype(np.float32) if self._tools else None
        time_s = frame_times_s(self.entry, self.frame_index)
        found = []
        for track, values in zip((MAIN_TRACK, *known.tracks), known.by_track(np.stack(self._phases)), strict=True):
            labels, probabilities = values.argmax(axis=1).astype(np.int8), values
            if known.decoding:
                labels, probabilities = known.decoding.decode(track, known.config.data.fps, values)
            of_tools = tools if track == MAIN_TRACK else None
            found.append(PredictionFile(self.frame_index, time_s, labels, probabilities, of_tools))
        return found

    def _annotations(self, predictions: Sequence[PredictionFile]) -> VideoAnnotations:
        """The predictions of each track as intervals.

        The last one lasts as long as a sample, but not beyond the video.
        """
        entry, config, spec = self.entry, self._recogniser.config, self._recogniser.spec
        time_s = predictions[0].time_s
        end_s = float(frame_times_s(entry, [entry.frame_count - 1])[0]) + 1 / entry.fps
        edges_s = np.append(time_s, min(time_s[-1] + 1 / config.data.fps, end_s))
        annotator = f"surgstage {self._about['surgstage']}"
        tracks = {DEFAULT_TRACK: spec.phases, **{name: spec.tracks[name].classes for name in self._recogniser.tracks}}
        found = [
            predicted_intervals(one.phase, one.probabilities, edges_s, classes, annotator, name)
            for one, (name, classes) in zip(predictions, tracks.items(), strict=True)
        ]
        media = str(inside(self._dataset.root, entry.source)) if entry.kind == "video" else None
        return VideoAnnotations(entry.id, tuple(chain.from_iterable(found)), entry.fps, media)

    def _write(self) -> None:
        spec = self._recogniser.spec
        prediction, *others = predictions = self._predictions()
        self._write_track(prediction, spec, PHASE, "phases", "")
        for track, one in zip(self._recogniser.tracks, others, strict=True):
            make_folder(self._files[f"{track}/csv"].parent)
            self._write_track(one, spec.as_track(track), track, track, f"{track}/")
        if self._formats:
            annotations = self._annotations(predictions)
            for kind in self._formats:
                write_text(self._files[f"as {kind}"], pre_annotation_text(kind, annotations))
        if self._draw:
            _draw(self._recogniser, prediction, self._dataset, self._files["mp4"], self._stop)
        write_json(self._files["json"], {**self._about, "samples": len(prediction.phase), "complete": True})

    def _write_track(self, found: PredictionFile, spec: DataSetSpec, column: str, what: str, prefix: str) -> None:
        """Write CSV and ribbon of one track; `what` are its classes in the title, `prefix` that of the files' keys."""
        name, fps = self.entry.id, self._recogniser.config.data.fps
        write_prediction_csv(self._files[f"{prefix}csv"], found, spec, column)
        drawn = [(name, np.full(len(found.phase), -1, np.int8), {"predicted": found.phase})]
        title = f"{name}: predicted {what} ({self._recogniser.spec.title or self._recogniser.spec.name})"
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


def _draw(recogniser: Recogniser, prediction: PredictionFile, dataset: Dataset, path: Path, stop: StopRequest) -> None:
    """Write a video of all frames of the source; below each frame the predictions up to it are drawn."""
    entry, spec = dataset.index.videos[0], recogniser.spec
    with open_source(recogniser.config, dataset, entry) as reader:
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
            encode_mp4(temporary, drawn_frames(), rate, _ENCODER, stop.raise_if_set, time_s)
