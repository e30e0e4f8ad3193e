"""Phases as a JSON list of segments in whole seconds: [[0, 95, "Access"], [95, 610, "Dissection"]].

SURGSTAGE_PLUGINS=annotation_example.py python pipeline.py index --root DIR --set data.dataset=DATA_SET.yaml
"""

import json
from pathlib import Path

import numpy as np

from configs.dataset_spec import DataSetSpec, class_ids, folded_name
from configs.errors import UserError
from features.dataset.annotations import LabelTrack, unknown_class
from features.dataset.formats.base import FORMATS, AnnotationFormat


def recognises(content: bytes, path: Path) -> bool:
    return path.suffix == ".json"


def phases(content: bytes, path: Path, spec: DataSetSpec) -> LabelTrack:
    """One row per second, which is what the data set's `annotation_fps: 1` means; -1 between segments."""
    known, segments = class_ids(spec.phases, spec.phase_aliases), json.loads(content)
    labels = np.full(segments[-1][1], -1, dtype=np.int8)
    for start, stop, name in segments:
        if folded_name(name) not in known:
            raise UserError(f"{path}: {unknown_class('phase', name, spec)}")
        labels[start:stop] = known[folded_name(name)]
    return LabelTrack(np.arange(len(labels)), labels, stride=1)


def tools(content: bytes, path: Path, spec: DataSetSpec) -> LabelTrack:
    raise UserError(f"{path}: lists of segments contain no tools; give the tools as text")


FORMATS.register("segments", AnnotationFormat(recognises, phases, tools))
