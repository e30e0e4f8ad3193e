"""The features that a comparison of encoders needs: of each encoder, frozen or fine-tuned, in each fold.

A frozen encoder's features are the same in every fold, so they are extracted once. A fine-tuned encoder is trained and
its features are extracted in each fold. What exists is not made again.
"""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from configs.encoder_comparison import EncoderComparison
from configs.errors import UserError
from configs.load import load_config
from configs.schema import CNN_FOLDER, Config
from engine.device import choose_device, choose_precision
from engine.files import read_json_object, sha256_json, write_json
from engine.progress import say
from engine.runs import RESULT_FILE
from engine.stopping import StopRequest
from evaluation.encoders import EncoderFacts
from features.dataset.index import Dataset, Index
from features.dataset.overlaps import pretraining_phrases
from features.dataset.splits import assign_splits
from features.dataset.trained_on import is_own_index, require_separate_split
from features.store import feature_path
from features.store_folder import with_recorded_faults
from stage1_cnn.encoders.backbone import initial_backbone, require_image_size
from stage1_cnn.encoders.layers import layers_until
from stage1_cnn.encoders.pretrained import weights_folders
from stage1_cnn.extract import ExtractReport, ExtractRequest, extract, extract_each
from stage1_cnn.model import weights_sha256
from stage1_cnn.train import require_classes, train_cnn
from stage2_temporal.train import require_arithmetic

Folders = Mapping[int, Path]  # the feature folder of each fold
_COST_FILE = "cost.json"
# Frames, and the seconds that all processes together needed for reading and for encoding them.
_COST_KEYS = ("frames", "decode_seconds", "encode_seconds")


@dataclass(frozen=True)
class Plan:
    """A comparison: its file, the `--set` of the command, and its folder, in which everything but features is kept."""

    spec: EncoderComparison
    overrides: tuple[str, ...]
    folder: Path

    def base(self) -> Config:
        """The base settings, as if there was no comparison."""
        return load_config(self.spec.base, self.overrides)

    def config(self, encoder: str, fold: int | None = None, head: str | None = None, seed: int | None = None) -> Config:
        """The settings of an encoder, in a fold or (None) for all folds; with a head, those of its training."""
        chosen = self.spec.encoders[encoder]
        changes: dict[str, object] = {
            "cnn.backbone": chosen.backbone,
            "cnn.weights": chosen.weights,
            "extract.encoder": "finetuned" if chosen.finetune else "initial",
            **chosen.settings,
        }
        if fold is not None and self.spec.folds is not None:
            changes |= {**self.spec.split_changes, "data.split.fold": fold}
        if head is not None:
            changes |= {f"temporal.head.{key}": value for key, value in self.spec.heads[head].model_dump().items()}
        try:
            found = load_config(self.spec.base, self.overrides, changes)
        except UserError as error:
            reason = str(error).removeprefix("--set").lstrip(": ")
            raise UserError(f"the settings of encoder {encoder}: {reason}") from error
        # `--set` may give other values of these: an index of all videos, and the seed of fine-tuning
        if fold is not None and self.spec.folds is not None:
            data = found.data.model_copy(update={"index": self.index_file(fold)})
            found = found.model_copy(update={"data": data})
        if head is None:
            return found
        temporal = found.temporal.model_copy(update={"baseline": False})
        return found.model_copy(update={"temporal": temporal, "seed": seed})

    def run(self, encoder: str, fold: int | None = None) -> Path:
        """The run folder of an encoder's training and extraction."""
        of_encoder = self.folder / "encoders" / encoder
        return of_encoder if fold is None else of_encoder / f"fold{fold}"

    def index_file(self, fold: int) -> Path:
        """The file of a fold's index."""
        return self.folder / "folds" / f"{fold}.json"


def check_plan(plan: Plan, trusted: bool) -> dict[str, EncoderFacts]:
    """What is known of each encoder before any work. Raises UserError for wrong settings or weights."""
    base = plan.base()
    if base.extract.checkpoint is not None:
        raise UserError(
            f"extract.checkpoint={base.extract.checkpoint}: would replace the encoders that are compared; set it to "
            "null, and give the file as weights of an encoder to compare it"
        )
    device = choose_device(base.device)
    for encoder in plan.spec.encoders:
        for head in plan.spec.heads:
            require_arithmetic(plan.config(encoder, head=head, seed=plan.spec.seeds[0]).temporal, device)
    facts: dict[str, EncoderFacts] = {}
    seen: dict[object, str] = {}
    for encoder, chosen in plan.spec.encoders.items():
        facts[encoder], digest = _facts(plan, encoder, trusted)
        same = seen.setdefault((digest, str(chosen.settings) if chosen.finetune else None), encoder)
        if same != encoder:
            raise UserError(f"encoders {same} and {encoder} have the same weights and settings; leave one out")
    return facts


def _facts(plan: Plan, encoder: str, trusted: bool) -> tuple[EncoderFacts, str]:
    """The facts of an encoder, and a digest of what its features depend on before any fine-tuning."""
    chosen, config = plan.spec.encoders[encoder], plan.config(encoder)
    device = choose_device(config.device)
    choose_precision("extract.precision", config.extract.torch_precision, device, training=False)
    if chosen.finetune:
        choose_precision("cnn.precision", config.cnn.precision, device, training=True)
    try:
        backbone = initial_backbone(config, trusted=trusted)
        require_image_size(backbone, config.preprocess.crop_px)
        if chosen.finetune and config.cnn.freeze_until is not None:
            layers_until(backbone.get_submodule("net"), config.cnn.freeze_until)
    except UserError as error:
        raise UserError(f"encoder {encoder}: {error}") from error
    extract = config.extract.model_dump(include={"engine", "precision", "storage", "compile"})
    parts = [backbone.name, weights_sha256(backbone), config.preprocess.model_dump(mode="json"), extract]
    facts = EncoderFacts(
        backbone=chosen.backbone,
        weights=chosen.weights,
        finetuned=chosen.finetune,
        crop_px=config.preprocess.crop_px,
        embedding_dim=backbone.embedding_dim,
        parameters=sum(parameter.numel() for parameter in backbone.parameters()),
    )
    return facts, sha256_json(parts)


# ---------------------------------------------------------------------------------------------- folds


def make_folds(plan: Plan, index: Index) -> dict[int, Index]:
    """The index of each fold, by the fold's number; without folds, only the base settings' own. Nothing is written.

    A fold whose test videos are all left out is left out too. Raises UserError if there is nothing to train or test on.
    """
    if plan.spec.folds is None:
        folds = {0: index}
    else:
        count = plan.spec.folds if isinstance(plan.spec.folds, int) else len(index.found_ids())
        folds = {fold: _split(plan, index, fold) for fold in range(count)}
    kept = {fold: one for fold, one in folds.items() if one.by_split("test")}
    for fold, one in kept.items():
        if not one.by_split("train"):
            raise UserError(f"{plan.base().data.index}: fold {fold} has no training videos; change folds or data.split")
    if not kept:
        raise UserError(f"{plan.base().data.index}: no video is for testing; give folds in the file, or set data.split")
    return kept


def save_folds(plan: Plan, folds: Mapping[int, Index]) -> None:
    """Write the indexes that the settings of the folds name (`Plan.config`)."""
    for fold, one in folds.items() if plan.spec.folds is not None else ():
        one.save(plan.index_file(fold))


def _split(plan: Plan, index: Index, fold: int) -> Index:
    """The index with the splits of one fold."""
    split = plan.config(next(iter(plan.spec.encoders)), fold).data.split
    parts = assign_splits(index.found_ids(), index.dataset, split)
    videos = tuple(entry.model_copy(update={"split": parts[entry.id]}) for entry in index.videos)
    left_out = tuple(one.model_copy(update={"split": parts.get(one.id, one.split)}) for one in index.left_out)
    return index.model_copy(update={"videos": videos, "left_out": left_out})


# ---------------------------------------------------------------------------------------------- encoders and videos


def with_notes(plan: Plan, facts: EncoderFacts, encoder: str, index: Index, folds: Mapping[int, Index]) -> EncoderFacts:
    """The facts with a note if the encoder has seen the videos of the data set or those that are tested.

    Raises UserError if it starts from weights that were trained on a test video of some fold, unless
    `data.allow_overlap` is set, or if it is to be fine-tuned and the data set has no classes for that.
    """
    config = plan.config(encoder)
    tested = {one.id for fold in folds.values() for one in fold.by_split("test")}
    notes = []
    try:
        if facts.finetuned:
            require_classes(config.cnn, index.dataset)
        if _trained_on(config, index, tested):
            notes.append("starts from weights that were trained on test videos, so its scores are too good")
    except UserError as error:
        raise UserError(f"encoder {encoder}: {error}") from error
    if (note := overlap_note(facts, index.dataset.name)) is not None:
        notes.append(note)
    calibrates = config.extract.precision == "int8" and not facts.finetuned
    if calibrates and any(one.id in tested for one in index.by_split("train")):  # one net for all folds
        notes.append("its int8 net was calibrated on frames (without labels) of videos that are tested in some fold")
    return replace(facts, note="; ".join(notes) or None)


def _trained_on(config: Config, index: Index, tested: Collection[str]) -> bool:
    """Whether weights that the trainings start from know `tested` videos. Raises UserError if that is not allowed."""
    videos = [one.model_copy(update={"split": "test"}) if one.id in tested else one for one in index.videos]
    all_folds = index.model_copy(update={"videos": tuple(videos)})
    head, allow, found = config.temporal.start_from, config.data.allow_overlap, False
    for folder in (*weights_folders(config.cnn, config.runs), *([] if head is None else [head.parent])):
        found |= require_separate_split(folder, all_folds, "test", allow, own=is_own_index(folder, all_folds))
    return found


# ---------------------------------------------------------------------------------------------- features


def make_features(
    plan: Plan, dataset: Dataset, folds: Mapping[int, Index], stop: StopRequest, trusted: bool
) -> tuple[dict[str, Folders], list[tuple[str, str]]]:
    """Make what is missing; returns the feature folders by encoder, and the videos that failed, with the reasons.

    Raises UserError if an encoder cannot be trained or extracted, and Stopped when asked to stop.
    """
    found: dict[str, Folders] = {}
    failed: list[tuple[str, str]] = []
    for encoder, report in _extract_frozen(plan, dataset, stop, trusted).items():
        found[encoder] = dict.fromkeys(folds, report.folder)
        failed += _outcome(plan, encoder, report)
    for encoder in _names(plan, finetune=True):
        folders = {}
        for fold, index in folds.items():
            say(f"== {encoder}: fine-tuning, fold {fold}")
            config, run, own = plan.config(encoder, fold), plan.run(encoder, fold), Dataset(index, dataset.root)
            train_cnn(config, run, own, stop, trusted=trusted)
            report = extract(config, run, own, stop=stop, trusted=trusted)
            folders[fold] = report.folder
            failed += _outcome(plan, encoder, report)
        found[encoder] = folders
    return {encoder: found[encoder] for encoder in plan.spec.encoders}, list(dict.fromkeys(failed))


def _names(plan: Plan, *, finetune: bool) -> list[str]:
    return [name for name, chosen in plan.spec.encoders.items() if chosen.finetune is finetune]


def _extract_frozen(plan: Plan, dataset: Dataset, stop: StopRequest, trusted: bool) -> dict[str, ExtractReport]:
    """The features of all frozen encoders, for which each video is decoded once."""
    names = _names(plan, finetune=False)
    if names:
        say(f"== features of {', '.join(names)}")
    requests = [ExtractRequest(plan.config(encoder), plan.run(encoder)) for encoder in names]
    return dict(zip(names, extract_each(requests, dataset, stop=stop, trusted=trusted), strict=True))


def _outcome(plan: Plan, encoder: str, report: ExtractReport) -> list[tuple[str, str]]:
    """Add what an extraction cost to the encoder's cost so far; returns the videos that failed."""
    report.require_others_done()
    say(report.sentence())
    if report.frames:
        path = plan.run(encoder) / _COST_FILE
        new = (report.frames, *(s / report.processes for s in (report.decode_seconds, report.encode_seconds)))
        known = _cost(path) or (0, 0.0, 0.0)
        write_json(path, {key: round(a + b, 3) for key, a, b in zip(_COST_KEYS, known, new, strict=True)})
    return [(f"{encoder}, {video_id}", str(reason)) for video_id, reason in report.failed]


def _cost(path: Path) -> tuple[float, float, float] | None:
    """The values of `_COST_KEYS` in this comparison so far; None if it has extracted nothing."""
    if not path.is_file():
        return None
    frames, decode, encode = (read_json_object(path).get(key) for key in _COST_KEYS)
    if not all(isinstance(value, int | float) and value >= 0 for value in (frames, decode, encode)):
        raise UserError(f"{path}: damaged; delete it")
    return frames, decode, encode  # type: ignore[return-value]


def usable_everywhere(folds: Mapping[int, Index], folders: Mapping[str, Folders]) -> dict[int, Index]:
    """The indexes without videos that could not be extracted for some encoder, so that all are compared on the same."""

    def usable(index: Index) -> Index:
        for folder in dict.fromkeys(folder for of_encoder in folders.values() for folder in of_encoder.values()):
            index = with_recorded_faults(index, folder)
        return index

    return {fold: usable(index) for fold, index in folds.items()}


def with_costs(plan: Plan, facts: EncoderFacts, encoder: str, folders: Folders, index: Index) -> EncoderFacts:
    """The facts with the size of all videos' features, the speed of extraction, and the time of fine-tuning."""
    cost = _cost(plan.run(encoder) / _COST_FILE)
    sizes = [sum(feature_path(folder, one.id).stat().st_size for one in index.videos) for folder in folders.values()]
    return replace(
        facts,
        size_bytes=round(statistics.fmean(sizes)),
        frames_per_s=_rate(cost[0], cost[1] + cost[2]) if cost else None,
        encoded_per_s=_rate(cost[0], cost[2]) if cost else None,
        finetuning_s=_finetuning_s(plan, encoder, list(folders)) if facts.finetuned else None,
    )


def _rate(frames: float, seconds: float) -> float | None:
    return frames / seconds if seconds else None


def overlap_note(facts: EncoderFacts, dataset: str) -> str | None:
    """Say if the release of this encoder was pretrained on the data set, or on one that may share operations with it.

    Random weights and those of a run are not the release's.
    """
    if facts.weights == "random" or facts.weights.startswith("run:"):
        return None
    seen = pretraining_phrases(facts.backbone, dataset)
    return f"its release was {seen[0]}, so its scores may be too good" if seen else None


def _finetuning_s(plan: Plan, encoder: str, folds: Sequence[int]) -> float:
    """The seconds of an encoder's fine-tuning in all folds together."""
    results = (read_json_object(plan.run(encoder, fold) / CNN_FOLDER / RESULT_FILE) for fold in folds)
    return sum(float(result.get("seconds", 0.0)) for result in results)
