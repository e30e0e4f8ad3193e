"""Write predictions as files of annotation tools, so that people correct labels instead of making them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from configs.dataset_spec import DataSetSpec
from configs.errors import UserError
from engine.files import write_text
from features.annotation_files.eaf import eaf_text
from features.annotation_files.intervals import DEFAULT_TRACK, Interval, Losses, VideoAnnotations
from features.annotation_files.label_studio import label_studio_config, label_studio_tasks
from features.annotation_files.table import csv_text
from features.run_lengths import runs

# What follows the video's name in that of its file, by format. `.csv` and `.json` are other files of a prediction.
ENDINGS = {"csv": "intervals.csv", "eaf": "eaf", "labelstudio": "labelstudio.json"}
CONFIG_FILE = "labelstudio.xml"


def predicted_intervals(
    phase: NDArray[np.int8],
    probabilities: NDArray[np.float32],
    edges_s: NDArray[np.float64],
    names: Sequence[str],
    annotator: str | None = None,
    track: str = DEFAULT_TRACK,
) -> tuple[Interval, ...]:
    """Return the runs of equal predictions `phase` (T,) of the classes `names` as intervals.

    An interval's confidence is the mean probability (T, C) of its class. `edges_s` (T + 1,) are the times at which
    samples begin, and the end of the last one.
    """
    found = []
    for start, end, value in runs(phase):
        confidence = min(max(float(probabilities[start:end, value].mean(dtype=np.float64)), 0.0), 1.0)
        found.append(
            Interval(track, names[value], float(edges_s[start]), float(edges_s[end]), round(confidence, 4), annotator)
        )
    return tuple(found)


def pre_annotation_text(kind: str, video: VideoAnnotations) -> str:
    """Return the text of a file of format `kind` (a key of `ENDINGS`) with a video's intervals."""
    if kind == "eaf":
        return eaf_text(video, Losses())
    if kind == "csv":
        return csv_text([video], Losses())
    tasks = label_studio_tasks([video], lambda name: video.fps, Losses())
    return json.dumps(tasks, indent=1, ensure_ascii=False) + "\n"


def write_labelling_config(folder: Path, spec: DataSetSpec, tracks: Sequence[str] = ()) -> None:
    """Write Label Studio's labelling configuration beside the tasks. Raises UserError if another one is there.

    `tracks` names the additional label tracks to be labelled as well.
    """
    classes = [(DEFAULT_TRACK, spec.phases), *((name, spec.tracks[name].classes) for name in tracks)]
    path, text = folder / CONFIG_FILE, label_studio_config(classes)
    if path.exists() and path.read_bytes() != text.encode():
        raise UserError(f"{path}: exists with other content; choose another folder with --out")
    write_text(path, text)
