"""Evaluate a trained run: the temporal head, the per-frame head and the majority class on the same videos."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from configs.errors import UserError
from configs.load import NO_KEYS, GivenKeys
from configs.schema import Config
from engine.device import choose_device, start_stage
from engine.files import make_folder, read_json_object, sha256_file, sha256_json, write_json
from engine.progress import say
from engine.runs import ABSENT, RESULT_FILE, StageIdentity, require_same_classes, update_summary
from engine.stopping import StopRequest
from evaluation.files.predictions import TOOLS_ALONE, PredictionFile, write_prediction_csv
from evaluation.files.truth import TRUTH_FILE, Truth, VideoTruth, is_simulated, write_truth
from evaluation.metrics import plugin_names
from evaluation.metrics.conventions import MAIN_CONVENTION
from evaluation.metrics.phases import evaluate_phases
from evaluation.metrics.results import HEAD, METRICS_FILE, Evaluation, JointDetails, ToolResults, read_evaluation
from evaluation.metrics.tools import choose_thresholds, evaluate_tools, sigmoid
from evaluation.reports.model_card import write_model_card
from evaluation.reports.paper_figures import phase_ribbons
from evaluation.reports.summary import summarise, used_videos
from evaluation.reports.tables import comparison_table, phase_table, tool_table
from features.dataset.catalogue import known_root, say_left_out
from features.dataset.index import Index
from features.dataset.labels import unlabelled_note
from features.frames.settings_match import require_features_of
from features.ids import file_stem, natural_key
from features.store import VideoFeatures, feature_path, recorded_encoder
from features.store_folder import (
    INDEX_FILE,
    find_feature_folder,
    load_feature_set,
    usable_index,
    with_recorded_faults,
)
from features.video_labels import VideoLabels
from stage2_temporal.predict import (
    Inference,
    TemporalAbout,
    chosen_inference,
    load_temporal,
    other_encoder,
    predict_phases,
)


@dataclass(frozen=True)
class GroundTruth:
    """The labels that predictions are scored against: one split at `fps`, in the order of the index; `root` is the data
    root if it is known."""

    index: Index
    split: str
    fps: float
    videos: Mapping[str, VideoLabels]
    root: Path | None = None

    @property
    def phases(self) -> dict[str, NDArray[np.int8]]:
        """Phase labels of all videos; empty if no video has any."""
        labels = {name: video.phase for name, video in self.videos.items()}
        return labels if any((phase >= 0).any() for phase in labels.values()) else {}

    @property
    def without_labels(self) -> dict[str, list[str]]:
        """Videos without labels by task: this split's by their labels, others by whether the index names a file."""
        known = self.videos
        phases = [name for name, video in known.items() if not (video.phase >= 0).any()]
        tools = [name for name, video in known.items() if not (video.tools >= 0).any()]
        for entry in self.index.videos:
            if entry.split != "none" and entry.id not in known and entry.records is None:
                phases += [] if entry.phase_file else [entry.id]
                tools += [] if entry.tool_file else [entry.id]
        return {"phases": sorted(phases, key=natural_key), "tools": sorted(tools, key=natural_key)}

    def record(self) -> Truth:
        """The content of `truth.json`."""
        hashes = {name: self.index.entry(name).sha256_ends for name in self.videos}
        videos = {name: VideoTruth(video.phase, video.tools, hashes[name]) for name, video in self.videos.items()}
        return Truth(self.index.dataset, self.split, self.fps, videos)


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
) -> Evaluation:
    """Score a run's heads and tools on one split, and write the results below `RUN/evaluate/<name>/`.

    Writes `metrics.json`, `truth.json`, `predictions/<video>.csv`, `ribbons.png`, and for the run's own test videos a
    summary into `RUN/summary.json` and `RUN/MODEL_CARD.md`; prints tables. With `index_file`, another data set with the
    same classes is evaluated; missing features are extracted into the run's folder. `inference` overrides the inference
    mode (clips or carried state) of the training. Without `redo`, an evaluation of the same model and features is
    printed again, not computed. Raises UserError if the run is not trained, its classes differ from the data's, the
    features come from another encoder, or the user gave settings of images that the features do not have (`given`).
    """
    temporal = run / "temporal"
    model, about = load_temporal(temporal)
    chosen_inference(inference, about.inference, model, temporal)
    if about.encoder:
        require_features_of(about.encoder, config, given, temporal / "best.pt")
    name = split if index_file is None else f"{index_file.stem}-{split}"
    name += f"-{inference}" if inference else ""
    out = run / "evaluate" / name
    if index_file is None:
        folder = find_feature_folder(features, run, config.extract.store)
        index = usable_index(folder)
        _require_own_index(config, given, index, folder)
        index.require_excluded(config.data.exclude, folder)
    else:
        folder, index = _other_features(config, run, index_file, out / "features", features, stop)
    videos = _load(folder, index, split)
    _require_compatible(about, folder, index, videos, temporal)
    say_left_out(index)

    majority = recorded_majority(temporal / RESULT_FILE, required=True)
    thresholds = _thresholds(folder, index)
    identity = _identity(temporal, videos, index, split, inference, majority, thresholds).digest
    fps = float(next(iter(videos.values())).attributes["fps"])
    truth = GroundTruth(index, split, fps, videos, known_root(config))
    evaluation = None if redo else _made_before(out, identity)
    if evaluation is not None:
        say(f"{out}: unchanged")
    else:
        evaluation = score_and_write(
            out,
            truth,
            _probabilities(config, temporal, videos, inference, stop),
            _tool_logits(videos),
            majority=majority,
            thresholds=thresholds,
            identity_sha256=identity,
            encoder=_encoder(videos),
        )
    print_evaluation(evaluation)
    if index_file is None and split == "test" and inference is None:
        update_summary(run, summary_of(run, truth, evaluation))
        write_model_card(run, "temporal", index, evaluation)
    say(f"written: {out / METRICS_FILE}, predictions/, ribbons.png")
    return evaluation


def _require_own_index(config: Config, given: GivenKeys, index: Index, folder: Path) -> None:
    """Raise UserError if `--set` names an index of other videos or splits than the features are of."""
    named = config.data.index
    if "data.index" not in given.by_set or not named.is_file():
        return
    known, asked = ({v.id: (v.split, v.sha256_ends) for v in one.videos} for one in (index, Index.load(named)))
    if any(asked.get(name) != video for name, video in known.items()):
        raise UserError(
            f"data.index={named}: has other videos or splits than the features in {folder}; name it with --index, and "
            "features are extracted from it"
        )


def _load(folder: Path, index: Index, split: str) -> dict[str, VideoFeatures]:
    ids = [
        entry.id
        for entry in index.entries_of(split, folder / INDEX_FILE)
        if entry.split != "none" or feature_path(folder, entry.id).exists()  # other splits are not needed
    ]
    return load_feature_set(folder, ids, in_memory=False)


def _encoder(videos: Mapping[str, VideoFeatures]) -> dict[str, Any]:
    """What is recorded of the encoder that made the features."""
    attributes = next(iter(videos.values())).attributes
    return {**recorded_encoder(attributes), "digest": str(attributes.get("encoder_digest"))}


def _other_features(
    config: Config, run: Path, index_file: Path, out: Path, features: Path | None, stop: StopRequest
) -> tuple[Path, Index]:
    """The feature folder of another index; missing files are extracted with the run's own encoder."""
    from features.dataset.catalogue import open_dataset
    from stage1_cnn.extract import extract

    if not index_file.is_file():
        raise UserError(f"{index_file}: no such index; make it with `index --out {index_file}` and its data.root")
    if features is not None:
        return features, with_recorded_faults(Index.load(index_file), features)
    data = config.data.model_copy(update={"index": index_file})
    other = config.model_copy(update={"data": data})
    index, root = open_dataset(other)
    report = extract(other, run, index, root, folder=out, stop=stop)
    report.require_others_done()
    return report.folder, usable_index(report.folder)


def _require_compatible(
    about: TemporalAbout, folder: Path, index: Index, videos: Mapping[str, VideoFeatures], temporal: Path
) -> None:
    """Raise UserError unless the data have the classes, in order, and the encoder that the model was trained with."""
    require_same_classes(temporal, "phases", about.phases, index.dataset.phases, folder / INDEX_FILE)
    if about.tool_inputs:
        require_same_classes(temporal, "tools", about.tool_inputs, index.dataset.tools, folder / INDEX_FILE)
    found = _encoder(videos)["digest"]  # of all, as loaded
    if found == about.encoder_digest:
        return
    difference = other_encoder(about.encoder, _encoder(videos)) if about.encoder else "best.pt does not say how"
    if difference:
        raise UserError(
            f"{folder}: features of encoder {found[:12]}, but {temporal} was trained on those of "
            f"{about.encoder_digest[:12]} ({difference}); name the right folder with --features"
        )


def _identity(
    temporal: Path,
    videos: Mapping[str, VideoFeatures],
    index: Index,
    split: str,
    inference: Inference | None,
    majority: int | None,
    thresholds: Mapping[str, float] | None,
) -> StageIdentity:
    """What an evaluation depends on: both heads' weights, the features' encoder and sources, labels, the majority
    phase of training, thresholds (and through them the validation videos), which videos are left out and why, and
    metrics and conventions from outside."""
    weights = [sha256_file(path) for path in (temporal / "best.pt", temporal / "frame" / "best.pt") if path.exists()]
    labels = {
        name: [
            video.attributes["encoder_digest"],
            video.attributes.get("source_sha256_ends"),
            sha256_json([video.phase.tolist(), video.tools.tolist()]),
        ]
        for name, video in videos.items()
    }
    return StageIdentity(
        {
            "weights": weights,
            "videos": labels,
            "split": split,
            "inference": inference,
            "majority": majority,
            "thresholds": thresholds,
            "left_out": index.left_out_records(),
            "plugins": plugin_names() or ABSENT,
        }
    )


def recorded_majority(result: Path, required: bool = False) -> int | None:
    """The most frequent phase of the training videos as the training's `result.json` records it.

    None if it records none (imported nets, tool-only nets). Raises UserError if the file is damaged, and if a
    `required` phase is missing.
    """
    found = read_json_object(result).get("majority_phase") if required or result.exists() else None
    if type(found) is not int and (required or found is not None):
        raise UserError(f"{result}: damaged: records no majority phase; delete it and run the training again")
    return found


def _made_before(out: Path, identity: str) -> Evaluation | None:
    """The evaluation in the folder; None if it lacks files or has another identity."""
    path = out / METRICS_FILE
    if not all((out / name).exists() for name in (METRICS_FILE, TRUTH_FILE, "ribbons.png")):
        return None
    if read_json_object(path).get("identity_sha256") != identity:
        return None
    found = read_evaluation(path)
    return None if found.simulated is None else found


# ---------------------------------------------------------------------------------------------- numbers


def score_and_write(
    out: Path,
    truth: GroundTruth,
    probabilities: Mapping[str, Mapping[str, NDArray[np.float32]]],
    tool_logits: Mapping[str, NDArray[np.float32]],
    *,
    majority: int | None = None,
    thresholds: Mapping[str, float] | None = None,
    identity_sha256: str | None = None,
    encoder: Mapping[str, Any] | None = None,
    joint: JointDetails | None = None,
) -> Evaluation:
    """Metrics of every head and of the tools, written to `out` with truth, predictions and ribbons of `temporal`.

    `probabilities` is {head: {video: (T, C)}}, `tool_logits` {video: (T, K)} of the videos with a trained tool head.
    `majority` is the most frequent phase of the training videos, scored as a head that predicts it everywhere. Tools
    are scored at `thresholds` too. The rest is recorded. Raises UserError if the folder cannot be written.
    """
    for note in unlabelled_note(truth.phases, "are not scored"):
        say(note)
    predicted = {
        head: {name: values.argmax(axis=1).astype(np.int8) for name, values in videos.items()}
        for head, videos in probabilities.items()
    }
    if majority is not None:
        tracks = {name: np.full(len(video.frame_index), majority, np.int8) for name, video in truth.videos.items()}
        predicted["majority"] = tracks
    spec, without = truth.index.dataset, truth.without_labels
    labels, tools = truth.phases, tool_results(truth, tool_logits, thresholds)
    evaluation = Evaluation(
        split=truth.split,
        fps=truth.fps,
        simulated=is_simulated(spec, truth.root),
        videos=list(truth.videos),
        scored={
            "phases": [name for name in truth.videos if labels and predicted and name not in without["phases"]],
            "tools": [] if tools is None else [name for name in truth.videos if name in tools.per_video],
        },
        videos_without_labels=without if spec.tools else {**without, "tools": []},
        left_out=truth.index.left_out_records(),
        convention=MAIN_CONVENTION,
        phases={
            head: evaluate_phases(labels, videos, spec.phases, truth.fps, split=truth.split, background=spec.background)
            for head, videos in predicted.items()
            if labels
        },
        tools=tools,
        identity_sha256=identity_sha256,
        encoder=encoder,
        joint=joint,
    )
    make_folder(out)
    write_truth(out / TRUTH_FILE, truth.record())
    _write_predictions(out, truth, probabilities.get(HEAD, {}), predicted, tool_logits)
    write_json(out / METRICS_FILE, evaluation.to_json())
    return evaluation


def _probabilities(
    config: Config,
    temporal: Path,
    videos: Mapping[str, VideoFeatures],
    inference: Inference | None,
    stop: StopRequest,
) -> dict[str, dict[str, NDArray[np.float32]]]:
    start_stage("evaluate", config, choose_device(config.device), "fp32")
    heads = {HEAD: temporal, "frame": temporal / "frame"}
    found = {}
    for head, folder in heads.items():
        if (folder / "best.pt").exists():
            model, about = load_temporal(folder)
            found[head] = predict_phases(
                model,
                videos,
                inference or about.inference,
                about.frames,
                device=config.device,
                stop=stop,
                tool_logits=bool(about.tool_inputs),
            )
    return found


def _tool_logits(videos: Mapping[str, VideoFeatures]) -> dict[str, NDArray[np.float32]]:
    """Tool logits of the videos whose features were made with a trained tool head."""
    found = {name: video.tool_logits for name, video in videos.items()}
    return {name: logits for name, logits in found.items() if logits.size and np.isfinite(logits).all()}


def tool_results(
    truth: GroundTruth, logits: Mapping[str, NDArray[np.float32]], thresholds: Mapping[str, float] | None = None
) -> ToolResults | None:
    """Tool scores at `thresholds`; None if there was no tool head or no labels."""
    labels = {name: truth.videos[name].tools for name in logits}
    if not any((tools >= 0).any() for tools in labels.values()):
        return None
    scores = {name: sigmoid(values) for name, values in logits.items()}
    names = truth.index.dataset.tools
    return evaluate_tools(labels, scores, names, threshold=thresholds, split=truth.split, fps=truth.fps)


def validation_thresholds(
    labels: Mapping[str, NDArray[np.int8]], logits: Mapping[str, NDArray[np.float32]], tools: Sequence[str]
) -> dict[str, float] | None:
    """Thresholds (K,) chosen on validation videos with tool labels (T, K) and logits (T, K); None if there are none."""
    names = [name for name, known in labels.items() if name in logits and (known >= 0).any()]
    scores = {name: sigmoid(logits[name]) for name in names}
    return choose_thresholds({name: labels[name] for name in names}, scores, tools) if names else None


def _thresholds(folder: Path, index: Index) -> Mapping[str, float] | None:
    """Thresholds (K,) chosen on the validation videos; None if none has features and tool labels."""
    ids = [entry.id for entry in index.by_split("val")]
    if not ids or not all(feature_path(folder, video_id).exists() for video_id in ids):
        return None
    videos = load_feature_set(folder, ids, in_memory=False)
    labels = {name: video.tools for name, video in videos.items()}
    return validation_thresholds(labels, _tool_logits(videos), index.dataset.tools)


# ---------------------------------------------------------------------------------------------- what is written


def _write_predictions(
    out: Path,
    truth: GroundTruth,
    probabilities: Mapping[str, NDArray[np.float32]],
    predicted: Mapping[str, Mapping[str, NDArray[np.int8]]],
    tool_logits: Mapping[str, NDArray[np.float32]],
) -> None:
    """Predictions of `temporal` as CSV, and ribbons of it and of `frame`; of a tool-only net, CSV files only."""
    spec = truth.index.dataset
    phases = predicted.get(HEAD, {})
    for name in truth.videos if phases else tool_logits:
        video, path = truth.videos[name], out / ("predictions" if phases else TOOLS_ALONE) / f"{file_stem(name)}.csv"
        prediction = PredictionFile(
            video.frame_index,
            video.time_s,
            phases.get(name, np.full(len(video.phase), -1, np.int8)),
            probabilities.get(name, np.zeros((len(video.phase), 0), np.float32)),
            sigmoid(tool_logits[name]).astype(np.float32) if name in tool_logits else None,
        )
        write_prediction_csv(path, prediction, spec)
    if not phases:
        return
    heads = [head for head in (HEAD, "frame") if head in predicted]
    drawn = [(name, v.phase, {head: predicted[head][name] for head in heads}) for name, v in truth.videos.items()]
    title = f"{spec.title or spec.name}, split {truth.split}: truth and predictions"
    times_s = {name: video.time_s for name, video in truth.videos.items()}
    phase_ribbons(out / "ribbons.png", drawn, truth.fps, spec.phases, title, times_s)


def print_evaluation(evaluation: Evaluation) -> None:
    """Tables of phases and tools."""
    console = Console()
    if evaluation.phases:
        console.print(comparison_table(evaluation.phases))
        if HEAD in evaluation.phases:
            console.print(phase_table(evaluation.phases[HEAD]))
    else:
        say("note: no phase labels in these videos, so no phase metrics")
    if evaluation.tools:
        console.print(tool_table(evaluation.tools))
    else:
        say("note: no tool labels or no trained tool head, so no tool metrics")


def _left_out_of_stage_one(run: Path, known: Sequence[str]) -> list[dict[str, Any]]:
    """Videos that train-cnn could not read, but extract could."""
    result = run / "cnn" / RESULT_FILE
    videos = read_json_object(result).get("left_out", []) if result.exists() else []
    return [{**video, "reason": f"train-cnn: {video['reason']}"} for video in videos if video["id"] not in known]


def summary_of(run: Path, truth: GroundTruth, evaluation: Evaluation) -> dict[str, Any]:
    """The entries of `RUN/summary.json` for an evaluation on the test videos; counts are of videos used or scored."""
    scores = {head: summarise(results, None) for head, results in evaluation.phases.items()}
    scored = {task: len(videos) for task, videos in evaluation.scored.items()}
    used, unlabelled = used_videos(truth.index, evaluation)
    left_out = [{"id": name, "reason": "no phase or tool labels", "unlabelled": True} for name in unlabelled]
    left_out += _left_out_of_stage_one(run, [video["id"] for video in evaluation.left_out])
    return {
        "name": run.name,
        "dataset": truth.index.dataset.name,
        "split": "/".join(str(len(used[part])) for part in ("train", "val", "test")),
        "fps": truth.fps,
        "test_videos": scored["phases"] or scored["tools"],
        "scored_videos": scored,
        "videos_without_labels": evaluation.videos_without_labels,
        "left_out": [*evaluation.left_out, *left_out],
        "convention": evaluation.convention,
        "tool_map": summarise(None, evaluation.tools)["tool_map"],
        **{f"phase_accuracy_{head}": value["phase_accuracy"] for head, value in scores.items()},
        **{f"phase_f1_{head}": scores[head]["phase_f1"] for head in ("frame", HEAD) if head in scores},
    }
