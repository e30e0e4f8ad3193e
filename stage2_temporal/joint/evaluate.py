"""Evaluate a joint net on frames: tables and files as for two stages, and the tools mapped from its phase branch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from configs.errors import UserError
from configs.load import NO_KEYS, GivenKeys, load_config
from configs.schema import Config, DataConfig
from engine.device import choose_device, choose_precision, lower_precision, start_stage
from engine.files import read_json_object
from engine.memory import needs_gpu_memory
from engine.progress import say
from engine.runs import IDENTITY_FILE, RESULT_FILE, require_same_classes, update_summary
from engine.stopping import StopRequest
from evaluation.metrics.results import HEAD, METRICS_FILE, Evaluation, JointDetails, ToolResults
from evaluation.reports.model_card import write_model_card
from features.dataset.catalogue import say_left_out
from features.dataset.index import Index, VideoEntry
from features.dataset.labels import sampled_labels
from features.frames.settings_match import require_preprocess_of
from features.frames.training_cache import frames_identity, recorded_faults
from stage2_temporal.evaluate import (
    GroundTruth,
    print_evaluation,
    recorded_majority,
    score_and_write,
    summary_of,
    tool_results,
    validation_thresholds,
)
from stage2_temporal.joint.net import IMPORTED, JointAbout, joint_checkpoint, load_joint
from stage2_temporal.joint.predict import Prediction, gap_nats, predict_videos
from stage2_temporal.predict import Inference, chosen_inference


@needs_gpu_memory("extract.batch_frames")
def evaluate_joint(
    config: Config,
    run: Path,
    index: Index,
    root: Path,
    *,
    split: str = "test",
    inference: Inference | None = None,
    other: bool = False,
    stop: StopRequest,
    given: GivenKeys = NO_KEYS,
) -> Evaluation:
    """Score a run's joint net on one split of the index.

    Writes into `RUN/evaluate/`, and for the test split a summary into `RUN/summary.json` and `RUN/MODEL_CARD.md`. For
    another index than the run's (`other`, or another file in `data.index`) it writes only into a folder whose name
    begins with that of the index. Videos that cannot be read are left out and reported. Images are preprocessed as in
    training, regardless of the preset; crops are `joint.crops`.
    Raises UserError if the user gave another preparation (`given`) and if the net's classes or sampling rate are
    not the data's, Stopped when asked to stop.
    """
    path = joint_checkpoint(run)
    net, about = load_joint(path)
    _require_compatible(path, about, index, config.data.fps)
    require_preprocess_of(about.preprocess, config, given, path, backbone=about.backbone)
    config = config.model_copy(update={"preprocess": about.preprocess})
    index = index.without(recorded_faults(path.parent, index))
    other = other or _is_another(path.parent, config, index)
    entries = index.entries_of(split, config.data.index)
    mode = chosen_inference(inference, about.inference, net.phase, path)
    device = choose_device(config.device)
    precision = choose_precision("extract.precision", config.extract.torch_precision, device, training=False)
    start_stage("evaluate", config, device, precision)
    faults: list[tuple[str, str]] = []  # videos that could not be read, and why
    predict = partial(
        predict_videos,
        net.to(device, memory_format=torch.channels_last),  # type: ignore[call-overload]
        config,
        root=root,
        index=index,
        inference=mode,
        frames=about.frames,
        check_stop=stop.raise_if_set,
        autocast=partial(lower_precision, device, precision),
        faults=faults,
    )
    labels = {entry.id: sampled_labels(entry, root, index, config.data) for entry in entries}
    found = predict(entries)
    thresholds = _thresholds(predict, index, root, config.data)
    index = index.without(faults)
    index.entries_of(split, config.data.index)
    say_left_out(index)
    probabilities = {name: one.phase for name, one in found.items() if one.phase is not None}
    imported = (net.imported_from or path.name) if about.step == IMPORTED else None
    name = _folder_name(split, inference, config)
    out = run / "evaluate" / (f"{config.data.index.stem}-{name}" if other else name)
    truth = GroundTruth(index, split, config.data.fps, {name: labels[name] for name in found}, root)
    evaluation = score_and_write(
        out,
        truth,
        {HEAD: probabilities} if probabilities else {},
        {name: one.tools for name, one in found.items() if one.tools is not None},
        majority=recorded_majority(path.parent / RESULT_FILE),
        thresholds=thresholds,
        joint=JointDetails(
            checkpoint=str(path),
            tasks=net.net_config.tasks,
            imported=imported,
            fine_tuned_from=net.imported_from if imported is None else None,
            inference=mode,
            crops=config.joint.crops,
            precision=precision,
            mapped_tools=_mapped_tools(truth, found),
            gap_nats=gap_nats(found.values()),
        ),
    )
    print_evaluation(evaluation)
    _say_mapped(evaluation.joint)
    if split == "test" and out.name == "test":
        update_summary(run, summary_of(run, truth, evaluation))
        write_model_card(run, "joint", index, evaluation, trained_in=path.parent)
    say(f"written: {out / METRICS_FILE}" + (", predictions/, ribbons.png" if probabilities else ", tool_predictions/"))
    return evaluation


def _say_mapped(joint: JointDetails | None) -> None:
    if joint and joint.mapped_tools:
        say(
            f"tools mapped from the phase branch: mAP {joint.mapped_tools.map_pooled:.1f} %; "
            f"gap to the tool branch {joint.gap_nats:.4f} nats per tool and frame"
        )


def _is_another(trained_in: Path, config: Config, index: Index) -> bool:
    """Whether `data.index` is another file than the net was trained with, and has other training videos."""
    identity, settings = trained_in / IDENTITY_FILE, trained_in / "config.yaml"
    if not (identity.is_file() and settings.is_file()):
        return False
    known = read_json_object(identity).get("videos_sha256")  # an imported net was not trained on these videos
    if known is None or load_config(settings).data.index == config.data.index:
        return False
    return bool(known != frames_identity(config, index)["videos_sha256"])


def _folder_name(split: str, inference: str | None, config: Config) -> str:
    parts = [split, inference, config.joint.crops if config.joint.crops != "centre" else None]
    return "-".join(part for part in parts if part)


def _require_compatible(path: Path, about: JointAbout, index: Index, fps: float) -> None:
    spec = index.dataset
    require_same_classes(path, "phases", about.phases, spec.phases)
    require_same_classes(path, "tools", about.tools, spec.tools)
    if about.fps != fps:
        raise UserError(f"{path}: trained at {about.fps:g} frames per second; set data.fps={about.fps:g}")


def _mapped_tools(truth: GroundTruth, found: Mapping[str, Prediction]) -> ToolResults | None:
    mapped = {name: one.mapped for name, one in found.items() if one.mapped is not None}
    labelled = {name: logits for name, logits in mapped.items() if (truth.videos[name].tools >= 0).any()}
    return tool_results(truth, labelled)


def _thresholds(
    predict: Callable[[Sequence[VideoEntry]], dict[str, Prediction]], index: Index, root: Path, data: DataConfig
) -> Mapping[str, float] | None:
    """Thresholds (K,) chosen on the validation videos; None if none has tool labels, or the net has no tool branch."""
    val = index.by_split("val")
    labels = {entry.id: sampled_labels(entry, root, index, data).tools for entry in val}
    labels = {name: tools for name, tools in labels.items() if (tools >= 0).any()}
    found = predict([entry for entry in val if entry.id in labels]) if labels else {}
    logits = {name: one.tools for name, one in found.items() if one.tools is not None}
    return validation_thresholds(labels, logits, index.dataset.tools)
