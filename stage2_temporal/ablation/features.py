"""The features that the trainings of an ablation share: each folder is read once, checked and put in shared memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from configs.errors import UserError
from configs.schema import Config
from engine.runs import run_folder
from features.store_folder import features_of_run, find_feature_folder
from features.video_labels import NO_LABEL
from stage2_temporal.data import TrainingData, read_training_data

Settings = Mapping[str, Any]  # dotted key -> changed value


@dataclass(frozen=True)
class SharedFeatures:
    """The data of each feature folder, with and without tool logits as needed; pickling does not copy the features."""

    base: Path
    tables: dict[tuple[Path, bool], TrainingData]

    def of(self, folder: Path, tool_logits: bool) -> TrainingData:
        """The data for a training on a folder."""
        return self.tables.get((folder, tool_logits)) or self.tables[folder, False]

    def digest(self, folder: Path) -> str:
        """The digest of the encoder that made a folder's features."""
        return self.tables[folder, False].encoder_digest

    def is_base(self, folder: Path) -> bool:
        """Whether a folder's features come from the same encoder as those of the base settings."""
        return self.digest(folder) == self.digest(self.base)

    @property
    def others(self) -> dict[str, str]:
        """The encoder digests of all folders except the base settings' one, by folder."""
        folders = dict.fromkeys(folder for folder, _ in self.tables)
        return {str(folder): self.digest(folder) for folder in folders if folder != self.base}


def folder_of(changes: Settings, base: Path, config: Config) -> Path:
    """The feature folder that a setting names, or `base` if it names none.

    Raises UserError if it names a run that has no features.
    """
    if "features" in changes:
        return find_feature_folder(Path(changes["features"]), base, config.extract.store)
    if "features_of_run" in changes:
        return features_of_run(run_folder(config, changes["features_of_run"]), config.extract.store)
    return base


def share_features(base: Path, wanted: Mapping[tuple[Path, bool], object], config: Config) -> SharedFeatures:
    """Read every feature folder once and put the features into shared memory.

    The keys of `wanted` are pairs of a folder and whether its tool logits are needed. With `temporal.features=stream`
    in `config`, features stay in their files. If folders were sampled at different times, validation counts only frames
    that are in all of them. Raises UserError for a folder that has no validation videos or lacks tool logits that are
    needed, and for two folders that cannot be compared.
    """
    folders = dict.fromkeys([base, *(folder for folder, _ in wanted)])
    where, tracks = config.temporal.features, config.data.tracks
    found = {folder: read_training_data(folder, where, config.device, tracks) for folder in folders}
    for folder, data in found.items():
        if not data.val:
            raise UserError(f"{folder}: no validation videos, so settings cannot be compared; index with another split")
        if folder != base:
            _require_comparable(found[base], data)
    for folder, data in found.items():
        found[folder] = replace(data, scored=_common_moments(data, list(found.values())))
    tables = {(folder, False): data for folder, data in found.items()}
    tables |= {(folder, True): found[folder].with_tool_logits() for folder, logits in wanted if logits}
    for data in tables.values():
        data.bank.features.share_memory_()
        data.bank.labels.share_memory_()
    return SharedFeatures(base, tables)


def _require_comparable(base: TrainingData, other: TrainingData) -> None:
    """Raise UserError unless two folders have the same videos, splits, classes and labels."""
    for what, mine, theirs in (
        *((name, base.classes[name], other.classes[name]) for name in base.tracks),
        ("training videos", base.split["train"], other.split["train"]),
        ("validation videos", base.split["val"], other.split["val"]),
    ):
        if sorted(mine) != sorted(theirs) or (what in base.tracks and mine != theirs):
            differing = sorted(set(mine) ^ set(theirs)) or list(theirs)
            raise UserError(
                f"{other.folder}: its {what} differ from those of {base.folder} ({', '.join(differing[:4])}); settings "
                "are compared on the same videos only: extract both from one index"
            )
    for video_id in base.split["train"] + base.split["val"]:
        rows, other_rows = base.bank.span_of(video_id).rows, other.bank.span_of(video_id).rows
        frames, other_frames = base.frame_index[rows].numpy(), other.frame_index[other_rows].numpy()
        shared, at, other_at = np.intersect1d(frames, other_frames, return_indices=True)
        if not len(shared):
            raise UserError(
                f"{other.folder}: has no frame of {video_id} that is also in {base.folder}, so settings "
                "cannot be compared; extract both at the same data.fps"
            )
        labels, other_labels = base.bank.labels[:, rows].numpy(), other.bank.labels[:, other_rows].numpy()
        differing_rows = shared[(labels[:, at] != other_labels[:, other_at]).any(axis=0)]
        if len(differing_rows):
            what = "phase" if len(base.tracks) == 1 else "label"
            raise UserError(
                f"{other.folder}: {video_id} has another {what} at frame {differing_rows[0]} than in {base.folder}; "
                "run extract for both, which updates labels"
            )


def _common_moments(data: TrainingData, everyone: list[TrainingData]) -> torch.Tensor | None:
    """A mask (N,) of the rows whose frames are in every folder; None if all labelled validation frames are."""
    scored = torch.zeros(len(data.bank.features), dtype=torch.bool)
    for video_id, span in zip(data.split["val"], data.val, strict=True):
        frames = data.frame_index[span.rows].numpy()
        scored[span.rows] = True
        for other in everyone:
            present = np.isin(frames, other.frame_index[other.bank.span_of(video_id).rows].numpy())
            scored[span.rows] &= torch.from_numpy(present)
    labelled = ((data.bank.labels_of(span) != NO_LABEL).any(dim=0) for span in data.val)
    complete = all(bool(scored[span.rows][rows].all()) for span, rows in zip(data.val, labelled, strict=True))
    return None if complete else scored
