"""Evaluate a joint net on frames.

Tables and files are those of the two stages; the tools that the mapping predicts from the phase branch are added.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from configs.dataset_spec import DataSetSpec
from configs.errors import UserError
from configs.load import NO_KEYS, GivenKeys, load_config
from configs.schema import Config, DataConfig, Inference
from engine.device import choose_device, choose_precision, lower_precision, start_stage
from engine.files import read_json_object
from engine.memory import needs_gpu_memory
from engine.runs import IDENTITY_FILE, RESULT_FILE, require_same_classes
from engine.stopping import StopRequest
from evaluation.metrics.results import HEAD, Evaluation, JointDetails, ToolResults
from features.dataset.catalogue import say_left_out
from features.dataset.index import Dataset, Index, VideoEntry
from features.dataset.labels import sampled_labels
from features.dataset.trained_on import is_own_index, require_separate_split
from features.frames.settings_match import require_preprocess_of
from features.frames.training_cache import frames_identity, recorded_faults
from stage2_temporal.decoding.chosen import require_none
from stage2_temporal.joint.net import IMPORTED, JointAbout, JointNet, joint_checkpoint, load_joint
from stage2_temporal.joint.predict import Prediction, gap_nats, predict_videos
from stage2_temporal.mapped import PhaseMapping
from stage2_temporal.predict import chosen_inference
from stage2_temporal.scoring import (
    GroundTruth,
    Predicted,
    folder_name,
    recorded_majority,
    report,
    score_and_write,
    tool_results,
    validation_thresholds,
)

Predictor = Callable[[Sequence[VideoEntry]], dict[str, Prediction]]


@needs_gpu_memory("extract.batch_frames")
def evaluate_joint(
    config: Config,
    run: Path,
    dataset: Dataset,
    *,
    split: str = "test",
    inference: Inference | None = None,
    other: bool = False,
    stop: StopRequest,
    given: GivenKeys = NO_KEYS,
    mapping: Path | None = None,
) -> Evaluation:
    """Score a run's joint net on one split of the index, and write the results into `RUN/evaluate/`.

    For the run's own test videos, `RUN/summary.json` and `RUN/MODEL_CARD.md` are written as well. If the index is not
    the run's own (`other`, or another file in `data.index`), the results go only into a folder whose name begins with
    that of the index. Videos that cannot be read are left out and reported. Images are preprocessed as in
    training, whatever the preset says, and cropped as in `joint.crops`. Raises UserError if the user gave other image
    settings (`given`), or if the data have other classes or another sampling rate than the net; raises Stopped when
    asked to stop.
    """
    require_none(config, run)
    joint = _open(run, config, None if mapping else dataset.spec, inference, given)
    common = PhaseMapping.read(mapping, joint.about.dataset, joint.about.phases, dataset.index) if mapping else None
    config, trained_in = joint.config, joint.path.parent
    dataset = dataset.without(recorded_faults(trained_in, dataset.index))
    other = other or _is_another(trained_in, config, dataset.index)
    entries = dataset.index.entries_of(split, config.data.index)
    require_separate_split(trained_in, dataset.index, split, config.data.allow_overlap, own=not other)
    start_stage("evaluate", config, joint.device, joint.precision)
    faults: list[tuple[str, str]] = []
    predict = joint.predictor(dataset, stop, faults)
    labels = {entry.id: sampled_labels(dataset, entry, config.data) for entry in entries}
    found = predict(entries)
    thresholds = None if common else _thresholds(predict, dataset, config.data)
    index = dataset.index.without(faults)
    index.entries_of(split, config.data.index)
    say_left_out(index)
    truth = GroundTruth(index, split, config.data.fps, {name: labels[name] for name in found}, dataset.root)
    predicted = _predicted(found, recorded_majority(trained_in / RESULT_FILE), thresholds)
    crops = [config.joint.crops] if config.joint.crops != "centre" else []
    if common:
        truth, predicted = common.of_truth(truth), common.of_predicted(predicted)
    more = [*crops, *([mapping.stem] if mapping else [])]
    out = run / "evaluate" / folder_name(split, inference, config.data.index.stem if other else None, *more)
    evaluation = score_and_write(
        out,
        truth,
        predicted,
        joint=joint.details(truth, found),
        mapping=common.to_json() if common else None,
    )
    report(run, out, truth, evaluation, trained_in)
    return evaluation


@dataclass(frozen=True)
class _Joint:
    """A run's joint net and the settings of its inference; `config` has the preprocessing of the training."""

    path: Path
    net: JointNet
    about: JointAbout
    config: Config
    inference: Inference
    device: torch.device
    precision: str

    def predictor(self, dataset: Dataset, stop: StopRequest, faults: list[tuple[str, str]]) -> Predictor:
        """A function that predicts videos of `dataset` and adds those that cannot be read to `faults` (id, reason)."""
        return partial(
            predict_videos,
            self.net.to(self.device, memory_format=torch.channels_last),  # type: ignore[call-overload]
            self.config,
            dataset,
            inference=self.inference,
            frames=self.about.frames,
            check_stop=stop.raise_if_set,
            autocast=partial(lower_precision, self.device, self.precision),
            faults=faults,
        )

    def details(self, truth: GroundTruth, found: Mapping[str, Prediction]) -> JointDetails:
        """What `metrics.json` records about the joint net and its predictions."""
        original = self.net.imported_from
        imported = (original or self.path.name) if self.about.step == IMPORTED else None
        return JointDetails(
            checkpoint=str(self.path),
            tasks=self.net.net_config.tasks,
            imported=imported,
            fine_tuned_from=original if imported is None else None,
            inference=self.inference,
            crops=self.config.joint.crops,
            precision=self.precision,
            mapped_tools=_mapped_tools(truth, found),
            gap_nats=gap_nats(found.values()),
        )


def _open(run: Path, config: Config, spec: DataSetSpec | None, inference: Inference | None, given: GivenKeys) -> _Joint:
    """Load a run's joint net. Raises UserError if the data set `spec`, if given, or the settings do not fit it."""
    path = joint_checkpoint(run)
    net, about = load_joint(path)
    _require_compatible(path, about, spec, config.data.fps)
    require_preprocess_of(about.preprocess, config, given, path, backbone=about.backbone)
    config = config.model_copy(update={"preprocess": about.preprocess})
    mode = chosen_inference(inference, about.inference, net.phase, path)
    device = choose_device(config.device)
    precision = choose_precision("extract.precision", config.extract.torch_precision, device, training=False)
    return _Joint(path, net, about, config, mode, device, precision)


def _predicted(
    found: Mapping[str, Prediction], majority: int | None, thresholds: Mapping[str, float] | None
) -> Predicted:
    phases = {name: one.phase for name, one in found.items() if one.phase is not None}
    return Predicted(
        probabilities={HEAD: phases} if phases else {},
        tool_logits={name: one.tools for name, one in found.items() if one.tools is not None},
        majority=majority,
        thresholds=thresholds,
    )


def _is_another(trained_in: Path, config: Config, index: Index) -> bool:
    """Whether the index has other videos for training and validation than those with which the net was trained."""
    if not is_own_index(trained_in, index):
        return True
    identity, settings = trained_in / IDENTITY_FILE, trained_in / "config.yaml"
    if not (identity.is_file() and settings.is_file()):
        return False
    known = read_json_object(identity).get("videos_sha256")  # None for an imported net, which was trained elsewhere
    if known is None or load_config(settings).data.index == config.data.index:
        return False
    return bool(known != frames_identity(config, index)["videos_sha256"])


def _require_compatible(path: Path, about: JointAbout, spec: DataSetSpec | None, fps: float) -> None:
    if spec is not None:
        require_same_classes(path, "phases", about.phases, spec.phases)
        require_same_classes(path, "tools", about.tools, spec.tools)
    if about.fps != fps:
        raise UserError(f"{path}: trained at {about.fps:g} frames per second; set data.fps={about.fps:g}")


def _mapped_tools(truth: GroundTruth, found: Mapping[str, Prediction]) -> ToolResults | None:
    mapped = {name: one.mapped for name, one in found.items() if one.mapped is not None}
    labelled = {name: logits for name, logits in mapped.items() if (truth.videos[name].tools >= 0).any()}
    return tool_results(truth, labelled)


def _thresholds(predict: Predictor, dataset: Dataset, data: DataConfig) -> Mapping[str, float] | None:
    """A threshold per tool, chosen on the validation videos.

    None if no validation video has tool labels, or if the net has no tool branch.
    """
    val = dataset.index.by_split("val")
    labels = {entry.id: sampled_labels(dataset, entry, data).tools for entry in val}
    labels = {name: tools for name, tools in labels.items() if (tools >= 0).any()}
    found = predict([entry for entry in val if entry.id in labels]) if labels else {}
    logits = {name: one.tools for name, one in found.items() if one.tools is not None}
    return validation_thresholds(labels, logits, dataset.spec.tools)
