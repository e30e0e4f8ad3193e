"""Score the predictions of a run against labels, and write, print and summarise the results."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from configs.errors import UserError
from configs.schema import CNN_FOLDER, JOINT_FOLDER, MAIN_TRACK, TEMPORAL_FOLDER, Inference
from engine.files import make_folder, read_json_object, write_json
from engine.progress import say
from engine.runs import RESULT_FILE
from evaluation.files.predictions import PHASE, TOOLS_ALONE, PredictionFile, write_prediction_csv
from evaluation.files.truth import TRUTH_FILE, Truth, VideoTruth, is_simulated, write_truth
from evaluation.metrics.conventions import MAIN_CONVENTION
from evaluation.metrics.phases import evaluate_phases
from evaluation.metrics.results import (
    HEAD,
    METRICS_FILE,
    UNDECODED,
    Evaluation,
    JointDetails,
    PhaseResults,
    ToolResults,
    decoding_mark,
)
from evaluation.metrics.tools import choose_thresholds, evaluate_tools, sigmoid
from evaluation.reports.model_card import write_model_card
from evaluation.reports.paper_figures import phase_ribbons
from evaluation.reports.summary import summarise, summarise_tracks, update_summary, used_videos
from evaluation.reports.tables import comparison_table, events_table, phase_table, tool_table
from features.dataset.index import Index
from features.dataset.labels import unlabelled_note
from features.ids import file_stem, natural_key
from features.video_labels import VideoLabels


@dataclass(frozen=True)
class GroundTruth:
    """The labels against which predictions are scored: the videos of one split at `fps`, in the order of the index.

    `root` is the data root, if it is known.
    """

    index: Index
    split: str
    fps: float
    videos: Mapping[str, VideoLabels]
    root: Path | None = None
    tracks: Sequence[str] = ()  # the additional label tracks that are scored

    def of_track(self, name: str) -> GroundTruth:
        """The labels of an additional track in place of the phases, without tools."""
        index = self.index.model_copy(update={"dataset": self.index.dataset.as_track(name)})
        videos = {
            video_id: VideoLabels(v.frame_index, v.time_s, v.tracks[name], np.zeros((len(v.phase), 0), np.int8))
            for video_id, v in self.videos.items()
        }
        return replace(self, index=index, videos=videos, tracks=())

    @property
    def phases(self) -> dict[str, NDArray[np.int8]]:
        """The phase labels of all videos; empty if no video has any."""
        labels = {name: video.phase for name, video in self.videos.items()}
        return labels if any((phase >= 0).any() for phase in labels.values()) else {}

    @property
    def without_labels(self) -> dict[str, list[str]]:
        """The videos without labels, for each task.

        A video of this split has none if all its frames are unlabelled; a video of another split, if the index names no
        annotation file for it.
        """
        known = self.videos
        without = {
            "phases": [name for name, video in known.items() if not (video.phase >= 0).any()],
            "tools": [name for name, video in known.items() if not (video.tools >= 0).any()],
            **{track: [n for n, v in known.items() if not (v.tracks[track] >= 0).any()] for track in self.tracks},
        }
        for entry in self.index.videos:
            if entry.split != "none" and entry.id not in known and entry.records is None:
                files = {"phases": entry.phase_file, "tools": entry.tool_file, **entry.track_files}
                for task, ids in without.items():
                    ids += [] if files.get(task) else [entry.id]
        return {task: sorted(ids, key=natural_key) for task, ids in without.items()}

    def record(self) -> Truth:
        """The content of `truth.json`."""
        hashes = {name: self.index.entry(name).sha256_ends for name in self.videos}
        videos = {
            name: VideoTruth(v.phase, v.tools, hashes[name], {track: v.tracks[track] for track in self.tracks})
            for name, v in self.videos.items()
        }
        return Truth(self.index.dataset, self.split, self.fps, videos)


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """The predictions that are scored against a `GroundTruth`.

    `probabilities` is {head: {video: (T, C)}}. `tool_logits` is {video: (T, K)}, for the videos whose encoder has a
    trained tool head. `majority` is the most frequent phase of the training videos; it is scored like a head that
    always predicts this phase. `thresholds` holds a threshold per tool, at which tools are scored as well. `tracks` has
    the predictions of additional label tracks by name, in the form of those of the phases. `labels` has the predicted
    phases {head: {video: (T,)}} of heads that are decoded; those of the others are the most probable ones.
    """

    probabilities: Mapping[str, Mapping[str, NDArray[np.float32]]]
    tool_logits: Mapping[str, NDArray[np.float32]]
    majority: int | None = None
    thresholds: Mapping[str, float] | None = None
    tracks: Mapping[str, Predicted] = field(default_factory=dict)
    labels: Mapping[str, Mapping[str, NDArray[np.int8]]] = field(default_factory=dict)

    def phases(self, truth: GroundTruth) -> dict[str, Mapping[str, NDArray[np.int8]]]:
        """The predicted phases {head: {video: (T,)}}, which include a head "majority" if `majority` is given."""
        found: dict[str, Mapping[str, NDArray[np.int8]]] = {
            head: self.labels.get(head)
            or {name: values.argmax(axis=1).astype(np.int8) for name, values in videos.items()}
            for head, videos in self.probabilities.items()
        }
        if self.majority is not None:
            lengths = {name: len(video.frame_index) for name, video in truth.videos.items()}
            found["majority"] = {name: np.full(length, self.majority, np.int8) for name, length in lengths.items()}
        return found


def recorded_majority(result: Path, required: bool = False) -> int | None:
    """The most frequent phase of the training videos, as recorded in the training's `result.json`.

    None if none is recorded, as for imported nets and tool-only nets. Raises UserError if the file is damaged, or if
    the phase is `required` and missing.
    """
    found = read_json_object(result).get("majority_phase") if required or result.exists() else None
    if type(found) is not int and (required or found is not None):
        raise UserError(f"{result}: damaged: records no majority phase; delete it and run the training again")
    return found


def majority_of_tracks(result: Path, tracks: Sequence[str]) -> dict[str, int]:
    """The most frequent class of each additional label track in the training videos, as recorded in `result.json`.

    Raises UserError if the file does not record it.
    """
    found = read_json_object(result).get("majority_tracks") if tracks else {}
    if not isinstance(found, dict) or any(type(found.get(track)) is not int for track in tracks):
        raise UserError(f"{result}: damaged: records no majority class of each track; delete it and train again")
    return {track: found[track] for track in tracks}


def tool_results(
    truth: GroundTruth, logits: Mapping[str, NDArray[np.float32]], thresholds: Mapping[str, float] | None = None
) -> ToolResults | None:
    """The metrics of the tools; `thresholds` decide whether a tool counts as present.

    None if there are no logits or no labels.
    """
    labels = {name: truth.videos[name].tools for name in logits}
    if not any((tools >= 0).any() for tools in labels.values()):
        return None
    scores = {name: sigmoid(values) for name, values in logits.items()}
    names = truth.index.dataset.tools
    return evaluate_tools(labels, scores, names, thresholds=thresholds, split=truth.split, fps=truth.fps)


def validation_thresholds(
    labels: Mapping[str, NDArray[np.int8]], logits: Mapping[str, NDArray[np.float32]], tools: Sequence[str]
) -> dict[str, float] | None:
    """A threshold per tool, chosen on the validation videos that have both tool labels (T, K) and logits (T, K).

    None if there is no such video.
    """
    names = [name for name, known in labels.items() if name in logits and (known >= 0).any()]
    scores = {name: sigmoid(logits[name]) for name in names}
    return choose_thresholds({name: labels[name] for name in names}, scores, tools) if names else None


def score_and_write(
    out: Path,
    truth: GroundTruth,
    predicted: Predicted,
    *,
    identity_sha256: str | None = None,
    encoder: Mapping[str, Any] | None = None,
    joint: JointDetails | None = None,
    mapping: Mapping[str, Any] | None = None,
    tool_probe: Mapping[str, Any] | None = None,
    offline: Collection[str] = (),
    decoding: Mapping[str, Any] | None = None,
    tool_smoothing_s: float | None = None,
) -> Evaluation:
    """Compute the metrics of every head and of the tools, and write them to `out`.

    The truth, and the predictions and ribbons of the head `temporal`, are written there too. The keyword arguments
    (`offline`: the heads that look into the future) are only recorded in `metrics.json`. Raises UserError if the
    folder cannot be written.
    """
    for note in unlabelled_note(truth.phases, "are not scored"):
        say(note)
    phases = predicted.phases(truth)
    others = {name: (truth.of_track(name), one) for name, one in predicted.tracks.items()}
    for name, (own, _) in others.items():
        for note in unlabelled_note(own.phases, "are not scored", f"{name} label"):
            say(note)
    spec, without, looks = truth.index.dataset, truth.without_labels, (offline, decoding_mark(decoding))
    labels, tools = truth.phases, tool_results(truth, predicted.tool_logits, predicted.thresholds)
    evaluation = Evaluation(
        split=truth.split,
        fps=truth.fps,
        simulated=is_simulated(spec, truth.root),
        videos=list(truth.videos),
        scored={
            "phases": [name for name in truth.videos if labels and phases and name not in without["phases"]],
            "tools": [] if tools is None else [name for name in truth.videos if name in tools.per_video],
            **{track: [name for name in truth.videos if name not in without[track]] for track in others},
        },
        videos_without_labels=without if spec.tools else {**without, "tools": []},
        tracks={n: _phase_results(own, one, one.phases(own), *looks) for n, (own, one) in others.items()} or None,
        left_out=truth.index.left_out_records(),
        convention=MAIN_CONVENTION,
        phases=_phase_results(truth, predicted, phases, *looks),
        tools=tools,
        identity_sha256=identity_sha256,
        encoder=encoder,
        mapping=mapping,
        tool_probe=tool_probe,
        decoding=decoding,
        tool_smoothing_s=tool_smoothing_s,
        joint=joint,
    )
    make_folder(out)
    write_truth(out / TRUTH_FILE, truth.record())
    _write_predictions(out, truth, predicted, phases)
    for name, (own, one) in others.items():
        _write_predictions(out, own, one, one.phases(own), name)
    write_json(out / METRICS_FILE, evaluation.to_json())
    return evaluation


def _phase_results(
    truth: GroundTruth,
    predicted: Predicted,
    phases: Mapping[str, Mapping[str, NDArray[np.int8]]],
    offline: Collection[str],
    decoding: str | None,
) -> dict[str, dict[str, PhaseResults]]:
    """The results of each head under each convention, given its `phases`; empty if no video has labels."""
    spec, labels = truth.index.dataset, truth.phases
    return {
        head: evaluate_phases(
            labels,
            videos,
            spec.phases,
            truth.fps,
            split=truth.split,
            background=spec.background,
            scores=predicted.probabilities.get(head),
            offline=head in offline,
            decoding=decoding if head == HEAD else None,
        )
        for head, videos in phases.items()
        if labels
    }


def _write_predictions(
    out: Path,
    truth: GroundTruth,
    predicted: Predicted,
    phases: Mapping[str, Mapping[str, NDArray[np.int8]]],
    track: str = PHASE,
) -> None:
    """Write the predictions of the head `temporal` as CSV files, and draw ribbons of it and of the head `frame`.

    For a net that recognises tools only, there are CSV files only. With `track`, the files are those of an additional
    label track, whose `truth` and predictions are given in place of those of the phases.
    """
    spec = truth.index.dataset
    main = track == PHASE
    folder, ribbons = ("predictions", "ribbons.png") if main else (f"predictions/{track}", f"ribbons-{track}.png")
    own, probabilities, tool_logits = phases.get(HEAD, {}), predicted.probabilities.get(HEAD, {}), predicted.tool_logits
    for name in truth.videos if own else tool_logits:
        video, path = truth.videos[name], out / (folder if own else TOOLS_ALONE) / f"{file_stem(name)}.csv"
        prediction = PredictionFile(
            video.frame_index,
            video.time_s,
            own.get(name, np.full(len(video.phase), -1, np.int8)),
            probabilities.get(name, np.zeros((len(video.phase), 0), np.float32)),
            sigmoid(tool_logits[name]).astype(np.float32) if name in tool_logits else None,
        )
        write_prediction_csv(path, prediction, spec, track)
    if not own:
        return
    heads = [head for head in (HEAD, "frame") if head in phases]
    drawn = [(name, v.phase, {head: phases[head][name] for head in heads}) for name, v in truth.videos.items()]
    title = f"{spec.title or spec.name}, split {truth.split}: truth and predictions"
    times_s = {name: video.time_s for name, video in truth.videos.items()}
    phase_ribbons(out / ribbons, drawn, truth.fps, spec.phases, title, times_s)


def report(run: Path, out: Path, truth: GroundTruth, evaluation: Evaluation, trained_in: Path | None = None) -> None:
    """Print an evaluation that was written to `out`, and update the run's files with it.

    The files, `RUN/summary.json` and `RUN/MODEL_CARD.md`, are updated only if `out` is the evaluation of the run's own
    test videos. `trained_in` is the folder in which a joint net was trained.
    """
    _print_tables(truth, evaluation)
    if out == run / "evaluate" / "test":
        update_summary(run, summary_of(run, truth, evaluation))
        stage = TEMPORAL_FOLDER if evaluation.joint is None else JOINT_FOLDER
        write_model_card(run, stage, truth.index, evaluation, trained_in=trained_in)
    files = f"{TOOLS_ALONE}/" if evaluation.tasks == "tool" else "predictions/, ribbons.png"
    files += "".join(f", predictions/{track}/, ribbons-{track}.png" for track in evaluation.tracks or ())
    say(f"written: {out / METRICS_FILE}, {files}")


def _print_tables(truth: GroundTruth, evaluation: Evaluation) -> None:
    """Print the tables of phase and tool metrics."""
    console = Console()
    if evaluation.decoding_words:
        say(f"head {HEAD}: {evaluation.decoding_words}; {UNDECODED}: the same head without")
    for track, heads in {MAIN_TRACK: evaluation.phases, **(evaluation.tracks or {})}.items():
        if heads:
            console.print(comparison_table(heads, track=track if evaluation.tracks else None))
            if HEAD in heads:
                console.print(phase_table(heads[HEAD], track=track))
            if any("transitions" in results for results in heads.values()):  # not in files of earlier versions
                console.print(events_table(heads, track=track if evaluation.tracks else None))
        else:
            what = "phase" if track == MAIN_TRACK else track
            say(f"note: no {what} labels in these videos, so no {what} metrics")
    if evaluation.tools:
        if evaluation.tool_smoothing_s:
            say(f"tools: probabilities averaged over the past, {evaluation.tool_smoothing_s:g} s (tool_smoothing_s)")
        console.print(tool_table(evaluation.tools))
    else:
        unlabelled = truth.videos.keys() <= set(truth.without_labels["tools"])
        what = "no tool labels in these videos" if unlabelled else "no trained tool head in this run"
        probe = not unlabelled and evaluation.joint is None
        say(f"note: {what}, so no tool metrics{'; train-tools trains a linear probe of the features' if probe else ''}")
    joint = evaluation.joint
    if joint and joint.mapped_tools:
        say(
            f"tools mapped from the phase branch: mAP {joint.mapped_tools.map_pooled:.1f} %; "
            f"gap to the tool branch {joint.gap_nats:.4f} nats per tool and frame"
        )


def _left_out_of_stage_one(run: Path, known: Sequence[str]) -> list[dict[str, Any]]:
    """Records of the videos that train-cnn could not read and that are not among the ids `known`."""
    result = run / CNN_FOLDER / RESULT_FILE
    videos = read_json_object(result).get("left_out", []) if result.exists() else []
    return [{**video, "reason": f"train-cnn: {video['reason']}"} for video in videos if video["id"] not in known]


def summary_of(run: Path, truth: GroundTruth, evaluation: Evaluation) -> dict[str, Any]:
    """The entries of `RUN/summary.json` for an evaluation on the test videos.

    Its numbers of videos count only videos that were used or scored.
    """
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
        "test_videos": scored["phases"] or next((count for count in scored.values() if count), 0),
        "scored_videos": scored,
        "videos_without_labels": evaluation.videos_without_labels,
        "left_out": [*evaluation.left_out, *left_out],
        "convention": evaluation.convention,
        "tool_map": summarise(None, evaluation.tools)["tool_map"],
        **{f"phase_accuracy_{head}": value["phase_accuracy"] for head, value in scores.items()},
        **{f"phase_f1_{head}": scores[head]["phase_f1"] for head in ("frame", HEAD) if head in scores},
        **({"tracks": summarise_tracks(evaluation.tracks)} if evaluation.tracks else {}),
    }


def folder_name(split: str, inference: Inference | None, other: str | None, *more: str) -> str:
    """The name of an evaluation's folder in `RUN/evaluate`.

    It consists of the name of the index or feature folder if this is not the run's own, the split, the inference mode
    if the user asked for one, and `more`.
    """
    parts = [other, split, inference, *more]
    return "-".join(part for part in parts if part)
