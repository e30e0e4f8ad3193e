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
from engine.files import make_folder, read_json_object, sha256_file, sha256_json, write_json
from engine.progress import say
from engine.runs import RESULT_FILE, update_summary
from engine.stopping import StopRequest
from evaluation.files.predictions import TOOLS_ALONE, write_prediction_csv, write_tool_csv
from evaluation.files.truth import TRUTH_FILE, Truth, VideoTruth, is_simulated, write_truth
from evaluation.metrics.phases import evaluate_phases
from evaluation.metrics.tools import choose_thresholds, evaluate_tools, sigmoid
from evaluation.reports.model_card import write_model_card
from evaluation.reports.paper_figures import phase_ribbons
from evaluation.reports.summary import summarise, used_videos
from evaluation.reports.tables import comparison_table, phase_table, tool_table
from features.dataset.catalogue import known_root, say_left_out
from features.dataset.index import Index
from features.dataset.labels import unlabelled_note
from features.frames.preprocess import require_features_of
from features.ids import file_stem, natural_key
from features.store import VideoFeatures, feature_path, recorded_encoder
from features.store_folder import (
    INDEX_FILE,
    find_feature_folder,
    load_feature_set,
    require_one_encoder,
    usable_index,
    with_recorded_faults,
)
from stage2_temporal.predict import Inference, chosen_inference, load_temporal, other_encoder, predict_phases

METRICS_FILE = "metrics.json"
CONVENTION = "phase_mean"
Phases = dict[str, NDArray[np.int8]]


@dataclass
class Material:
    """What is evaluated: one split's features and labels, in the order of the index; `root` where it is known."""

    folder: Path
    index: Index
    videos: dict[str, VideoFeatures]
    split: str
    root: Path | None = None

    @property
    def truth(self) -> Phases:
        """Phase labels of all videos; empty where no video has any."""
        labels = {name: video.phase for name, video in self.videos.items()}
        return labels if any((phase >= 0).any() for phase in labels.values()) else {}

    @property
    def without_labels(self) -> dict[str, list[str]]:
        """Videos without labels, by task: of this split as their labels are, of others as far as the index tells."""
        known = self.videos
        phases = [name for name, video in known.items() if not (video.phase >= 0).any()]
        tools = [name for name, video in known.items() if not (video.tools >= 0).any()]
        for entry in self.index.videos:
            if entry.split != "none" and entry.id not in known and entry.records is None:
                phases += [] if entry.phase_file else [entry.id]
                tools += [] if entry.tool_file else [entry.id]
        return {"phases": sorted(phases, key=natural_key), "tools": sorted(tools, key=natural_key)}

    @property
    def fps(self) -> float:
        """Sampling rate of the features."""
        return float(next(iter(self.videos.values())).attributes["fps"])

    @property
    def encoder(self) -> dict[str, Any]:
        """What made the features."""
        attributes = next(iter(self.videos.values())).attributes
        return {**recorded_encoder(attributes), "digest": str(attributes.get("encoder_digest"))}


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
) -> dict[str, Any]:
    """Score a run's heads and tools on one split and write what a reader needs below `RUN/evaluate/<name>/`.

    Writes `metrics.json`, `truth.json`, `predictions/<video>.csv`, `ribbons.png`, and for the run's own test videos
    the outcome into `RUN/summary.json` and `RUN/MODEL_CARD.md`; prints tables. With `index_file`, another data set
    with the same classes is evaluated; its features are extracted into the run's folder where missing. `inference`
    overrides the way of running through time that the run was trained with. Without `redo`, an evaluation of the
    same model and features is printed again, not computed. Raises UserError when the run is not trained, its
    classes differ from the data's, the features come from another encoder, or the user gave settings of pictures that
    the features do not have (`given`).
    """
    temporal = run / "temporal"
    model, about = load_temporal(temporal)
    chosen_inference(inference, about["inference"], model, temporal)
    if about.get("encoder"):
        require_features_of(about["encoder"], config, given, temporal / "best.pt")
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
    material = _load(folder, index, split, known_root(config))
    _require_same_world(about, material, temporal)
    say_left_out(index)

    majority = _majority(temporal / "result.json")
    thresholds = _thresholds(material, index.dataset.tools)
    identity = _identity(temporal, material, inference, majority, thresholds)
    if not redo and _already(out, identity):
        metrics = read_json_object(out / METRICS_FILE)
        say(f"{out}: unchanged")
    else:
        probabilities = _probabilities(config, temporal, material, inference, stop)
        more = {"identity_sha256": identity, "encoder": material.encoder}
        metrics = score_and_write(out, material, probabilities, majority, thresholds, more)
    print_metrics(metrics)
    if index_file is None and split == "test" and inference is None:
        update_summary(run, summary_of(run, material, metrics))
        write_model_card(run, "temporal", index, metrics)
    say(f"written: {out / METRICS_FILE}, predictions/, ribbons.png")
    return metrics


def _require_own_index(config: Config, given: GivenKeys, index: Index, folder: Path) -> None:
    """Raise UserError where `--set` names an index of other videos or splits than the features are of."""
    named = config.data.index
    if "data.index" not in given.by_set or not named.is_file():
        return
    known, asked = ({v.id: (v.split, v.sha256_ends) for v in one.videos} for one in (index, Index.load(named)))
    if any(asked.get(name) != video for name, video in known.items()):
        raise UserError(
            f"data.index={named}: has other videos or splits than the features in {folder}; name it with --index, and "
            "features are extracted from it"
        )


def _load(folder: Path, index: Index, split: str, root: Path | None) -> Material:
    ids = [
        entry.id
        for entry in index.entries_of(split, folder / INDEX_FILE)
        if entry.split != "none" or feature_path(folder, entry.id).exists()  # those of the others are not needed
    ]
    return Material(folder, index, load_feature_set(folder, ids), split, root)


def _other_features(
    config: Config, run: Path, index_file: Path, out: Path, features: Path | None, stop: StopRequest
) -> tuple[Path, Index]:
    """The feature folder of another index, extracted with the run's own encoder where files are missing."""
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


def _require_same_world(about: Mapping[str, Any], material: Material, temporal: Path) -> None:
    """Classes, their order and the encoder of the data are those the model was trained with."""
    spec = material.index.dataset
    if tuple(about["phases"]) != spec.phases:
        raise UserError(
            f"{temporal}: trained on phases {', '.join(about['phases'])}; "
            f"{material.folder / INDEX_FILE} has {', '.join(spec.phases)}"
        )
    if about["tool_inputs"] and tuple(about["tool_inputs"]) != spec.tools:
        raise UserError(
            f"{temporal}: reads the logits of the tools {', '.join(about['tool_inputs'])}; "
            f"{material.folder / INDEX_FILE} has {', '.join(spec.tools) or 'none'}"
        )
    found = require_one_encoder({material.folder / f"{n}.h5": v.attributes for n, v in material.videos.items()})
    if found == about["encoder_digest"]:
        return
    trained = about.get("encoder")
    difference = other_encoder(trained, material.encoder) if trained else "best.pt does not say how"
    if difference:
        raise UserError(
            f"{material.folder}: features of encoder {str(found)[:12]}, but {temporal} was trained on those of "
            f"{about['encoder_digest'][:12]} ({difference}); name the right folder with --features"
        )


def _identity(
    temporal: Path,
    material: Material,
    inference: Inference | None,
    majority: int,
    thresholds: Mapping[str, float] | None,
) -> str:
    """What an evaluation says depends on: both heads' weights, the features' encoder and sources, labels, the majority
    phase of training, thresholds (and through them the validation videos), and which videos are left out and why."""
    weights = [sha256_file(path) for path in (temporal / "best.pt", temporal / "frame" / "best.pt") if path.exists()]
    videos = {
        name: [
            video.attributes["encoder_digest"],
            video.attributes.get("source_sha256_ends"),
            sha256_json([video.phase.tolist(), video.tools.tolist()]),
        ]
        for name, video in material.videos.items()
    }
    return sha256_json(
        {
            "weights": weights,
            "videos": videos,
            "split": material.split,
            "inference": inference,
            "majority": majority,
            "thresholds": thresholds,
            "left_out": material.index.left_out_records(),
        }
    )


def _majority(result: Path) -> int:
    """The training videos' longest phase, as the run noted it. Raises UserError where it did not."""
    found = read_json_object(result).get("majority_phase")
    if type(found) is not int:
        raise UserError(f"{result}: damaged: says no majority phase; delete it and run train-temporal again")
    return found


def _already(out: Path, identity: str) -> bool:
    path = out / METRICS_FILE
    if not all((out / name).exists() for name in (METRICS_FILE, TRUTH_FILE, "ribbons.png")):
        return False
    found = read_json_object(path)
    return "simulated" in found and found.get("identity_sha256") == identity


# ---------------------------------------------------------------------------------------------- numbers


def score_and_write(
    out: Path,
    material: Material,
    probabilities: Mapping[str, dict[str, NDArray[np.float32]]],
    majority_phase: int | None,
    thresholds: Mapping[str, float] | None,
    more: Mapping[str, Any],
) -> dict[str, Any]:
    """Metrics of every head (predictions of `temporal` are written too) and of the tools, written to `out`."""
    for note in unlabelled_note(material.truth, "are not scored"):
        say(note)
    metrics = _score(material, probabilities, majority_phase, thresholds) | dict(more)
    _write(out, material, metrics)
    metrics = {key: value for key, value in metrics.items() if key != "predictions"}
    write_json(out / METRICS_FILE, metrics)
    return metrics


def _score(
    material: Material,
    probabilities: Mapping[str, dict[str, NDArray[np.float32]]],
    majority_phase: int | None,
    thresholds: Mapping[str, float] | None,
) -> dict[str, Any]:
    """Metrics of every head and of the tools; `predictions` holds what the files are written from."""
    spec = material.index.dataset
    truth = material.truth
    predicted = {
        head: {name: values.argmax(axis=1).astype(np.int8) for name, values in videos.items()}
        for head, videos in probabilities.items()
    }
    if majority_phase is not None:  # the most frequent phase of the training videos, everywhere
        predicted["majority"] = {
            name: np.full(len(video), majority_phase, np.int8) for name, video in material.videos.items()
        }
    phases = {
        head: evaluate_phases(
            truth,
            {name: videos[name] for name in truth},
            spec.phases,
            material.fps,
            split=material.split,
            background=spec.background,
        )
        for head, videos in predicted.items()
        if truth
    }
    tools = _tools(material, thresholds)
    without = material.without_labels
    return {
        "split": material.split,
        "fps": material.fps,
        "simulated": is_simulated(spec, material.root),
        "videos": list(material.videos),
        "scored": {
            "phases": [name for name in material.videos if phases and name not in without["phases"]],
            "tools": [] if tools is None else [name for name in material.videos if name in tools["per_video"]],
        },
        "videos_without_labels": without if spec.tools else {**without, "tools": []},
        "left_out": material.index.left_out_records(),
        "convention": CONVENTION,
        "phases": phases,
        "tools": tools,
        "predictions": {"probabilities": probabilities.get("temporal"), "phases": predicted},
    }


def _probabilities(
    config: Config, temporal: Path, material: Material, inference: Inference | None, stop: StopRequest
) -> dict[str, dict[str, NDArray[np.float32]]]:
    heads = {"temporal": temporal, "frame": temporal / "frame"}
    found = {}
    for head, folder in heads.items():
        if (folder / "best.pt").exists():
            model, about = load_temporal(folder)
            found[head] = predict_phases(
                model,
                material.videos,
                inference or about["inference"],
                about["frames"],
                device=config.device,
                stop=stop,
                tool_logits=bool(about["tool_inputs"]),
            )
    return found


def _tools(material: Material, thresholds: Mapping[str, float] | None) -> dict[str, Any] | None:
    """Tool scores at `thresholds`; None where there was no tool head or no labels."""
    names = material.index.dataset.tools
    usable = {name: video for name, video in material.videos.items() if np.isfinite(video.tool_logits).all()}
    if not names or not any(_has_tools(video) for video in usable.values()):
        return None
    truth = {name: video.tools for name, video in usable.items()}
    scores = {name: sigmoid(video.tool_logits) for name, video in usable.items()}
    return evaluate_tools(truth, scores, names, threshold=thresholds, split=material.split, fps=material.fps)


def _thresholds(material: Material, names: Sequence[str]) -> Mapping[str, float] | None:
    """Chosen on the validation videos; None where there are none with features and tool labels."""
    ids = [entry.id for entry in material.index.by_split("val")]
    if not ids or not all(feature_path(material.folder, video_id).exists() for video_id in ids):
        return None
    videos = {name: video for name, video in load_feature_set(material.folder, ids).items() if _has_tools(video)}
    if not videos:
        return None
    return choose_thresholds(
        {name: video.tools for name, video in videos.items()},
        {name: sigmoid(video.tool_logits) for name, video in videos.items()},
        names,
    )


def _has_tools(video: VideoFeatures) -> bool:
    return video.tools.size > 0 and bool((video.tools >= 0).any()) and bool(np.isfinite(video.tool_logits).all())


# ---------------------------------------------------------------------------------------------- what is written


def _write(out: Path, material: Material, metrics: Mapping[str, Any]) -> None:
    spec = material.index.dataset
    probabilities, phases = metrics["predictions"]["probabilities"], metrics["predictions"]["phases"]
    make_folder(out)
    write_truth(out / TRUTH_FILE, _truth(material))
    if probabilities is None:  # a net for tools alone
        for name, video in material.videos.items():
            path = out / TOOLS_ALONE / f"{file_stem(name)}.csv"
            write_tool_csv(path, video.frame_index, video.time_s, sigmoid(video.tool_logits), spec)
        return
    make_folder(out / "predictions")
    for name, video in material.videos.items():
        tools = sigmoid(video.tool_logits) if video.tools.size and np.isfinite(video.tool_logits).all() else None
        write_prediction_csv(
            out / "predictions" / f"{file_stem(name)}.csv",
            video.frame_index,
            video.time_s,
            phases["temporal"][name],
            probabilities[name],
            tools,
            spec,
        )
    drawn = [
        (name, video.phase, {head: phases[head][name] for head in ("temporal", "frame") if head in phases})
        for name, video in material.videos.items()
    ]
    title = f"{spec.title or spec.name}, split {material.split}: truth and predictions"
    times_s = {name: video.time_s for name, video in material.videos.items()}
    phase_ribbons(out / "ribbons.png", drawn, material.fps, spec.phases, title, times_s)


def _truth(material: Material) -> Truth:
    videos = {
        name: VideoTruth(video.phase, video.tools, material.index.entry(name).sha256_ends)
        for name, video in material.videos.items()
    }
    return Truth(material.index.dataset, material.split, material.fps, videos)


def print_metrics(metrics: Mapping[str, Any]) -> None:
    """Tables of phases and tools."""
    console = Console()
    if metrics["phases"]:
        console.print(comparison_table(metrics["phases"], CONVENTION))
        if "temporal" in metrics["phases"]:
            console.print(phase_table(metrics["phases"]["temporal"], CONVENTION))
    else:
        say("note: no phase labels in these videos, so no phase metrics")
    if metrics["tools"]:
        console.print(tool_table(metrics["tools"]))
    else:
        say("note: no tool labels or no trained tool head, so no tool metrics")


def _left_out_of_stage_one(run: Path, known: Sequence[str]) -> list[dict[str, Any]]:
    """What train-cnn could not read and extract could, later perhaps."""
    result = run / "cnn" / RESULT_FILE
    videos = read_json_object(result).get("left_out", []) if result.exists() else []
    return [{**video, "reason": f"train-cnn: {video['reason']}"} for video in videos if video["id"] not in known]


def summary_of(run: Path, material: Material, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """What `RUN/summary.json` says of an evaluation on the test videos; counts are of videos used or scored."""
    scores = {head: summarise(results, None) for head, results in metrics["phases"].items()}
    scored = {task: len(videos) for task, videos in metrics["scored"].items()}
    used, unlabelled = used_videos(material.index, metrics)
    left_out = [{"id": name, "reason": "no phase or tool labels", "unlabelled": True} for name in unlabelled]
    left_out += _left_out_of_stage_one(run, [video["id"] for video in metrics["left_out"]])
    return {
        "name": run.name,
        "dataset": material.index.dataset.name,
        "split": "/".join(str(len(used[part])) for part in ("train", "val", "test")),
        "fps": material.fps,
        "test_videos": scored["phases"] or scored["tools"],
        "scored_videos": scored,
        "videos_without_labels": metrics["videos_without_labels"],
        "left_out": [*metrics["left_out"], *left_out],
        "convention": CONVENTION,
        "tool_map": summarise(None, metrics["tools"])["tool_map"],
        **{f"phase_accuracy_{head}": value["phase_accuracy"] for head, value in scores.items()},
        **{f"phase_f1_{head}": scores[head]["phase_f1"] for head in ("frame", "temporal") if head in scores},
    }
