"""Evaluate a trained run: the temporal head, the per-frame head and the majority class on the same videos."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.errors import UserError
from configs.load import NO_KEYS, GivenKeys
from configs.schema import MAIN_TRACK, TEMPORAL_FOLDER, Config, DecodingMode, Inference
from engine.device import choose_device, start_stage
from engine.files import read_json_object, sha256_file, sha256_json
from engine.progress import say
from engine.runs import ABSENT, BEST_FILE, RESULT_FILE, StageIdentity, require_same_classes
from engine.stopping import StopRequest
from evaluation.files.truth import TRUTH_FILE
from evaluation.metrics import plugin_names
from evaluation.metrics.results import HEAD, METRICS_FILE, UNDECODED, Evaluation, read_evaluation
from features.dataset.catalogue import known_root, say_left_out
from features.dataset.index import Index
from features.dataset.trained_on import is_own_index, require_separate_split
from features.frames.preprocess import preprocess_from_json, require_extracted
from features.frames.settings_match import require_features_of
from features.store import EncoderSpec, VideoFeatures, feature_path, recorded_encoder
from features.store_folder import (
    ENCODER_FILE,
    INDEX_FILE,
    find_feature_folder,
    load_feature_set,
    usable_index,
    with_recorded_faults,
)
from stage2_temporal.data import require_tracks
from stage2_temporal.decoding.chosen import ChosenDecoding, Videos
from stage2_temporal.decoding.tools import smoothed_tool_logits
from stage2_temporal.mapped import PhaseMapping
from stage2_temporal.model import PhaseModel
from stage2_temporal.predict import (
    FRAME_FOLDER,
    TemporalAbout,
    as_trained,
    chosen_inference,
    load_temporal,
    other_encoder,
    predict_phases,
)
from stage2_temporal.scoring import (
    GroundTruth,
    Predicted,
    folder_name,
    majority_of_tracks,
    recorded_majority,
    report,
    score_and_write,
    validation_thresholds,
)
from stage2_temporal.tool_probe import ToolProbe, fitting_tool_probe, tool_logits_of


def evaluate_run(
    config: Config,
    run: Path,
    *,
    split: str = "test",
    features: Path | None = None,
    index_file: Path | None = None,
    stop: StopRequest,
    redo: bool = True,
    inference: Inference | None = None,
    given: GivenKeys = NO_KEYS,
    mapping: Path | None = None,
    decoding: DecodingMode | None = None,
) -> Evaluation:
    """Score a run's heads and tools on one split, print tables, and write the results to `RUN/evaluate/<name>/`.

    The files are `metrics.json`, `truth.json`, `predictions/<video>.csv` and `ribbons.png`. For the run's own test
    videos, `RUN/summary.json` is updated and `RUN/MODEL_CARD.md` written as well. With `index_file`, another data set
    with the same classes is evaluated, and missing features are extracted into the run's folder; with `mapping`, it may
    have other classes, and phases are scored in the mapping's vocabulary, other tracks and tools not at all.
    Tools of features without tool logits are recognised by the run's probe (`train-tools`), if there is one.
    `inference` overrides that of the training, and names the folder; so does `decoding`, the mode of
    `temporal.decoding` if the user asked for it for this evaluation only. Without `redo`, an existing evaluation of the
    same model, features and decoding is printed instead of being computed again. Raises UserError if the run is not
    trained or has no fitted decoding, if the data have other classes, if the features come from another encoder, or if
    image settings that the user gave (`given`) contradict the features.
    """
    temporal = run / TEMPORAL_FOLDER
    model, about = load_temporal(temporal)
    chosen_inference(inference, about.inference, model, temporal)
    if about.encoder:
        require_features_of(about.encoder, config, given, temporal / BEST_FILE)
    chosen = ChosenDecoding.of_run(temporal, config.temporal.decoding, about.classes, about.inference, inference)
    source = _Source(config, run, split, features, inference, mapping, decoding)
    folder, index, out, common = source.opened(given, index_file, about, stop)
    videos = _load(folder, index, split)
    _require_compatible(about, folder, index, videos, temporal, same_classes=common is None)
    say_left_out(index)

    probe = None if common else _tool_probe(run, videos, index, split, config.data.allow_overlap)
    tools = _Tools(probe, config.temporal.decoding.tool_smoothing_s)
    how = _How(inference, common, chosen, tools, _thresholds(folder, index, tools))
    labels = GroundTruth(index, split, _fps(videos), videos, known_root(config), () if common else about.further_tracks)
    identity = _identity(temporal, videos, labels, how).digest
    truth = common.of_truth(labels) if common else labels
    evaluation = None if redo else _made_before(out, identity)
    if evaluation is not None:
        say(f"{out}: unchanged")
    else:
        predicted = _predicted(config, temporal, videos, how, stop)
        recorded = how.recorded(truth.fps) | {"identity_sha256": identity, "encoder": _encoder(videos)}
        evaluation = score_and_write(out, truth, predicted, offline=_offline_heads(model, chosen), **recorded)
    report(run, out, truth, evaluation)
    return evaluation


@dataclass(frozen=True)
class _Tools:
    """How tools are recognised: by the net that made the features or a probe of them, smoothed over `smoothing_s`."""

    probe: ToolProbe | None
    smoothing_s: float

    def logits(self, videos: Mapping[str, VideoFeatures]) -> dict[str, NDArray[np.float32]]:
        """The logits (T, K) of the videos of which tools can be recognised."""
        return smoothed_tool_logits(tool_logits_of(videos, self.probe), self.smoothing_s, _fps(videos))


@dataclass(frozen=True)
class _How:
    """How the outputs of a run become predictions: everything but its weights."""

    inference: Inference | None
    common: PhaseMapping | None
    decoding: ChosenDecoding | None
    tools: _Tools
    thresholds: Mapping[str, float] | None

    def recorded(self, fps: float) -> dict[str, Any]:
        """What `metrics.json` says of it; None for what is not used."""
        probe = self.tools.probe
        return {
            "mapping": self.common.to_json() if self.common else None,
            "tool_probe": probe.to_json() if probe else None,
            "decoding": self.decoding.to_json(fps) if self.decoding else None,
            "tool_smoothing_s": self.tools.smoothing_s or None,
        }


def _fps(videos: Mapping[str, VideoFeatures]) -> float:
    return float(next(iter(videos.values())).attributes["fps"])


@dataclass(frozen=True)
class _Source:
    """Where the tested videos come from, and what the user asked for; `features` is the feature folder named.

    `own` and `other` return the feature folder, its index and the folder of the results. They raise UserError if videos
    of the training would be tested, before features are extracted, which may take hours.
    """

    config: Config
    run: Path
    split: str
    features: Path | None
    inference: Inference | None
    mapping: Path | None
    decoding: DecodingMode | None

    def opened(
        self, given: GivenKeys, index_file: Path | None, about: TemporalAbout, stop: StopRequest
    ) -> tuple[Path, Index, Path, PhaseMapping | None]:
        """The feature folder with all features, its index, the results' folder, and the mapping if one is named.

        Raises UserError if the data have other phases than the training, and no mapping is named.
        """
        folder, index, out = self.own(given) if index_file is None else self.other(index_file)
        common = PhaseMapping.read(self.mapping, about.dataset, about.phases, index) if self.mapping else None
        if common is None:
            _require_same_phases(about, index, index_file or folder / INDEX_FILE, self.run / TEMPORAL_FOLDER)
        if index_file is not None:
            folder, index = self.extracted(index_file, out / "features", about, stop)
        return folder, index, out, common

    def own(self, given: GivenKeys) -> tuple[Path, Index, Path]:
        """The run's feature folder, or the one that the user named, which counts as another index if it has one.

        Raises UserError if `--set` names an index whose videos or splits differ from those of the features.
        """
        config = self.config
        folder, asked_for = find_feature_folder(self.features, self.run, config.extract.store), config.data.index
        index = usable_index(folder)
        if "data.index" in given.by_set and asked_for.is_file():
            indices = (index, Index.load(asked_for))
            known, asked = ({v.id: (v.split, v.sha256_ends) for v in one.videos} for one in indices)
            if any(asked.get(name) != video for name, video in known.items()):
                raise UserError(
                    f"data.index={asked_for}: has other videos or splits than the features in {folder}; give this "
                    "index with --index to extract features for it"
                )
        index.require_excluded(config.data.exclude, folder)
        index.require_split(config.data.split, given, folder)
        own = is_own_index(self.run / TEMPORAL_FOLDER, index)
        self._require_separate(index, own=own)
        if not own:
            say(f"note: {folder}: other videos or splits than in the training, so evaluated as another index")
        return folder, index, self._place(None if own else folder.name)

    def other(self, index_file: Path) -> tuple[Path, Index, Path]:
        """As `own`, for an index that the user named, before its missing features are extracted."""
        index, out = _index_in(index_file), self._place(index_file.stem)
        self._require_separate(index, own=False)
        return out / "features", index, out

    def extracted(self, index_file: Path, folder: Path, about: TemporalAbout, stop: StopRequest) -> tuple[Path, Index]:
        """The feature folder for another index, and this index; the run's encoder extracts missing features."""
        from features.dataset.catalogue import open_dataset
        from stage1_cnn.extract import extract

        if self.features is not None:
            return self.features, with_recorded_faults(_index_in(index_file), self.features)
        require_extracted((about.encoder or {}).get("preprocess"), str(self.run / TEMPORAL_FOLDER / BEST_FILE))
        config = _as_in_training(self.config, about, str(self.run / TEMPORAL_FOLDER / BEST_FILE))
        changed: dict[str, Any] = {"data": config.data.model_copy(update={"index": index_file})}
        if self.mapping and not about.tool_inputs:
            changed["extract"] = config.extract.model_copy(update={"tool_head": False})
        config = config.model_copy(update=changed)

        def require(spec: EncoderSpec) -> None:
            _require_encoder(about, {**spec.to_json(), "digest": spec.digest}, self.run, folder)

        report = extract(config, self.run, open_dataset(config), folder=folder, require=require, stop=stop)
        report.require_others_done()
        return report.folder, usable_index(report.folder)

    def _place(self, other: str | None) -> Path:
        more = [*([self.decoding] if self.decoding else []), *([self.mapping.stem] if self.mapping else [])]
        return self.run / "evaluate" / folder_name(self.split, self.inference, other, *more)

    def _require_separate(self, index: Index, *, own: bool) -> None:
        allow = self.config.data.allow_overlap
        require_separate_split(self.run / TEMPORAL_FOLDER, index, self.split, allow, own=own)


def _offline_heads(model: PhaseModel, decoding: ChosenDecoding | None) -> set[str]:
    """The heads whose predictions depend on all later frames; a lag is in `PhaseAbout.decoding`."""
    if not model.causal:
        return {HEAD, UNDECODED}
    return {HEAD} if decoding and decoding.settings.mode == "offline" else set()


def _as_in_training(config: Config, about: TemporalAbout, where: str) -> Config:
    """The settings, with the preprocessing, sampling rate and backbone of the features of the training."""
    made = about.encoder
    if not made:
        return config
    preprocess = preprocess_from_json(made["preprocess"], where)
    return as_trained(config, preprocess, made["fps"], made["backbone"], made.get("storage"))


def _require_encoder(about: TemporalAbout, found: Mapping[str, Any], run: Path, folder: Path) -> None:
    """Raise UserError unless the encoder `found` made the features of the training, and those in `folder` if any."""
    difference = _other_encoder(about, found)
    if difference:
        raise UserError(
            f"{run / TEMPORAL_FOLDER / BEST_FILE}: trained on features of another encoder than the settings name "
            f"({difference}); give the settings of its encoder: extract.encoder, cnn.weights or extract.checkpoint"
        )
    known = folder / ENCODER_FILE
    if known.is_file() and read_json_object(known).get("digest") != found["digest"]:
        raise UserError(
            f"{folder}: holds features of another encoder than this run's; delete this folder and try again"
        )


def _load(folder: Path, index: Index, split: str) -> dict[str, VideoFeatures]:
    ids = [
        entry.id
        for entry in index.entries_of(split, folder / INDEX_FILE)
        if entry.split != "none" or feature_path(folder, entry.id).exists()  # videos of split none may have no features
    ]
    return load_feature_set(folder, ids, in_memory=False)


def _encoder(videos: Mapping[str, VideoFeatures]) -> dict[str, Any]:
    """The description of the encoder that made the features, as the feature files record it, and its digest."""
    attributes = next(iter(videos.values())).attributes
    return {**recorded_encoder(attributes), "digest": str(attributes.get("encoder_digest"))}


def _index_in(index_file: Path) -> Index:
    if not index_file.is_file():
        raise UserError(f"{index_file}: no such index; make it with `index --out {index_file}` and its data.root")
    return Index.load(index_file)


def _require_same_phases(about: TemporalAbout, index: Index, where: Path, temporal: Path) -> None:
    """Raise UserError unless the index `where` has the phases (in order) of the model's training."""
    try:
        require_same_classes(temporal, "phases", about.phases, index.dataset.phases, where)
    except UserError as error:
        raise UserError(f"{error}; for a data set with other phases, name a --mapping") from error


def _require_same_tracks(
    about: TemporalAbout, folder: Path, index: Index, videos: Mapping[str, VideoFeatures], temporal: Path
) -> None:
    """Raise UserError unless the features have the classes (in order) of every further track of the training."""
    for track, classes in (about.tracks or {}).items():
        known = index.dataset.tracks.get(track)
        require_same_classes(temporal, track, classes, known.classes if known else (), folder / INDEX_FILE)
    require_tracks(folder, videos, index.dataset, list(about.classes))


def _require_compatible(
    about: TemporalAbout,
    folder: Path,
    index: Index,
    videos: Mapping[str, VideoFeatures],
    temporal: Path,
    *,
    same_classes: bool,
) -> None:
    """Raise UserError unless the features have the encoder of the model's training, and the tools that are inputs.

    With `same_classes`, every track must have the classes of the training.
    """
    if same_classes:
        _require_same_tracks(about, folder, index, videos, temporal)
    if about.tool_inputs:
        require_same_classes(temporal, "tools", about.tool_inputs, index.dataset.tools, folder / INDEX_FILE)
    found = _encoder(videos)  # `load_feature_set` has checked that all videos have the same
    difference = _other_encoder(about, found)
    if difference:
        raise UserError(
            f"{folder}: features of encoder {found['digest'][:12]}, but {temporal} was trained on features of encoder "
            f"{about.encoder_digest[:12]} ({difference}); name the right folder with --features"
        )


def _other_encoder(about: TemporalAbout, found: Mapping[str, Any]) -> str | None:
    """How the encoder `found` (a description and its digest) differs from that of the training, if it does."""
    if found["digest"] == about.encoder_digest:
        return None
    return other_encoder(about.encoder, found) if about.encoder else "best.pt does not say how"


def _identity(temporal: Path, videos: Mapping[str, VideoFeatures], truth: GroundTruth, how: _How) -> StageIdentity:
    """Everything that an evaluation depends on.

    This is the weights of both heads and of the tools' probe, the encoder and sources of the features, the labels, the
    majority phase of the training videos, the thresholds (which depend on the validation videos), which videos are left
    out and why, the decoding, and the metrics and conventions of plug-ins.
    """
    heads = (temporal, temporal / FRAME_FOLDER)
    weights = [sha256_file(path) for folder in heads if (path := folder / BEST_FILE).exists()]
    labels = {
        name: [
            video.attributes["encoder_digest"],
            video.attributes.get("source_sha256_ends"),
            sha256_json([one.tolist() for one in (video.phase, video.tools, *(video.tracks[t] for t in truth.tracks))]),
        ]
        for name, video in videos.items()
    }
    return StageIdentity(
        {
            "weights": weights,
            "videos": labels,
            "split": truth.split,
            "inference": how.inference,
            "majority": recorded_majority(temporal / RESULT_FILE, required=True),
            "thresholds": how.thresholds,
            "left_out": truth.index.left_out_records(),
            "plugins": plugin_names() or ABSENT,
            **{key: ABSENT if value is None else value for key, value in how.recorded(truth.fps).items()},
        }
    )


def _made_before(out: Path, identity: str) -> Evaluation | None:
    """The evaluation that is already in the folder; None if files are missing or it has another identity."""
    path = out / METRICS_FILE
    if not all((out / name).exists() for name in (METRICS_FILE, TRUTH_FILE, "ribbons.png")):
        return None
    if read_json_object(path).get("identity_sha256") != identity:
        return None
    found = read_evaluation(path)
    return None if found.simulated is None else found


def _probabilities(
    config: Config, temporal: Path, videos: Mapping[str, VideoFeatures], inference: Inference | None, stop: StopRequest
) -> dict[str, dict[str, dict[str, NDArray[np.float32]]]]:
    """The probabilities (T, C) {track: {head: {video: ...}}}, phases first."""
    start_stage("evaluate", config, choose_device(config.device), "fp32")
    heads = {HEAD: temporal, "frame": temporal / FRAME_FOLDER}
    found: dict[str, dict[str, dict[str, NDArray[np.float32]]]] = {}
    for head, folder in heads.items():
        if (folder / BEST_FILE).exists():
            model, about = load_temporal(folder)
            predicted = predict_phases(
                model,
                videos,
                inference or about.inference,
                about.frames,
                device=config.device,
                stop=stop,
                tool_logits=bool(about.tool_inputs),
            )
            for name, values in predicted.items():
                for track, part in about.by_track(values).items():
                    found.setdefault(track, {}).setdefault(head, {})[name] = part
    return found


def _predicted(
    config: Config,
    temporal: Path,
    videos: Mapping[str, VideoFeatures],
    how: _How,
    stop: StopRequest,
) -> Predicted:
    """The predictions of both heads, of every track, and of the majority class, in the common vocabulary if given."""
    by_track: dict[str, Mapping[str, Videos]] = {**_probabilities(config, temporal, videos, how.inference, stop)}
    labels = {}
    if how.decoding:
        for track, heads in by_track.items():
            by_track[track], labels[track] = how.decoding.of_heads(track, _fps(videos), heads)
    predicted = Predicted(
        probabilities=by_track.pop(MAIN_TRACK),
        tool_logits=how.tools.logits(videos),
        majority=recorded_majority(temporal / RESULT_FILE, required=True),
        thresholds=how.thresholds,
        tracks=_of_tracks(temporal, by_track, labels),
        labels=labels.get(MAIN_TRACK, {}),
    )
    return how.common.of_predicted(predicted) if how.common else predicted


def _of_tracks(
    temporal: Path,
    probabilities: Mapping[str, Mapping[str, Videos]],
    labels: Mapping[str, Mapping[str, Mapping[str, NDArray[np.int8]]]],
) -> dict[str, Predicted]:
    """The predictions of additional label tracks, given the probabilities {track: {head: {video: (T, C)}}}.

    `labels` are {track: {head: {video: (T,)}}} of heads that are decoded.
    """
    constants = majority_of_tracks(temporal / RESULT_FILE, list(probabilities))
    return {
        track: Predicted(probabilities=one, tool_logits={}, majority=constants[track], labels=labels.get(track, {}))
        for track, one in probabilities.items()
    }


def _tool_probe(
    run: Path, videos: Mapping[str, VideoFeatures], index: Index, split: str, allow: bool
) -> ToolProbe | None:
    """The run's probe (`train-tools`), if the features have no tool logits and the probe recognises their tools.

    Raises UserError if it was trained on features of another encoder, or on videos that are tested.
    """
    if tool_logits_of(videos):
        return None
    encoder = _encoder(videos)
    probe = fitting_tool_probe(run, encoder, encoder["digest"], index.dataset.tools)
    if probe is not None:
        folder = probe.path.parent
        require_separate_split(folder, index, split, allow, own=is_own_index(folder, index))
    return probe


def _thresholds(folder: Path, index: Index, tools: _Tools) -> Mapping[str, float] | None:
    """A threshold per tool, chosen on the validation videos.

    None if a validation video has no features, or if none has tool labels.
    """
    ids = [entry.id for entry in index.by_split("val")]
    if not ids or not all(feature_path(folder, video_id).exists() for video_id in ids):
        return None
    videos = load_feature_set(folder, ids, in_memory=False)
    labels = {name: video.tools for name, video in videos.items()}
    return validation_thresholds(labels, tools.logits(videos), index.dataset.tools)
