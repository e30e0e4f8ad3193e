"""Hostile files of labels whose form a description states, and hostile descriptions of sound files of labels."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from configs.dataset_spec import DataSetSpec
from configs.errors import UserError
from configs.load import load_dataset
from configs.schema import DataConfig

NAMES = ("Preparation", "Clipping & cutting", "Closure")
TOOLS = ("Grasper", "Hook")
_PATTERNS = {"video": r"case_(?P<id>\d+)\.{video}", "frames": r"case_(?P<id>\d+)"}
_COLUMNS = {"start": "start", "label": "label"}
_BOUNDS = {**_COLUMNS, "end": "end"}
Forms = Mapping[str, dict[str, Any]]

TABLES: Forms = {
    "phases": {"columns": _COLUMNS, "unit": "source"},
    "auto": {"columns": _COLUMNS, "origin": "auto"},
    "starts": {"columns": _COLUMNS, "unit": "clock", "form": "starts", "gaps": NAMES[0]},
    "seconds": {"columns": _COLUMNS, "unit": "second", "offset_s": -0.5},
    "intervals": {
        "columns": {"start": 1, "end": 2, "label": 3},
        "header": False,
        "delimiter": "comma",
        "form": "intervals",
        "unit": "millisecond",
        "end": "inclusive",
        "overlaps": "inner",
        "numbers_from": 0,
    },
    "gestures": {
        "columns": {"start": 1, "end": 2, "label": 3},
        "header": False,
        "delimiter": "blank",
        "form": "intervals",
        "unit": "source",
        "origin": 1,
        "meaning": {"G1": NAMES[1]},
    },
    "all": {"columns": {**_COLUMNS, "video": "case"}, "delimiter": "semicolon", "form": "starts", "unit": "source"},
    "tools": {"columns": {"start": "start"}, "unit": "sample", "rate": 1},
    "lists": {"columns": _COLUMNS, "separator": "|", "unit": "sample", "rate": 1},
}
TREES: Forms = {
    "phases": {"records": "phases", "columns": _BOUNDS, "form": "intervals", "unit": "millisecond"},
    "vectors": {
        "records": "annotations.{frame}.*",
        "columns": {"start": "frame", "label": 3},
        "unit": "sample",
        "rate": 1,
        "numbers_from": 0,
    },
    "coco": {
        "records": "annotations",
        "join": {"records": "images", "by": "image_id"},
        "categories": {"records": "categories"},
        "columns": {"video": "video_name", "start": "frame_num", "label": "phases"},
        "unit": "second",
    },
    "tools": {"records": "frames", "columns": {"start": "t", "label": "tools"}, "unit": "second"},
}


def description(form: str, options: Mapping[str, Any], **more: Any) -> DataSetSpec:
    key = "tools" if form in ("tools", "lists") else "phases"
    files = r"all\.\w+" if "video" in options["columns"] else r"case_(?P<id>\d+)\.\w+"
    fields = {"name": "own", "annotation_fps": 25, "phases": NAMES, "tools": TOOLS, "patterns": _PATTERNS}
    return DataSetSpec.model_validate({**fields, "labels": {key: {"files": files, **options, **more}}})


def read_labels(forms: Forms, **more: Any) -> Callable[[Path], None]:
    """Return a function that reads a file in all of these forms, and fits the labels to videos of both kinds."""
    specs = [description(form, options, **more) for form, options in forms.items()]

    def read(path: Path) -> None:
        content = path.read_bytes()
        refusals = [
            _refusal(partial(_read_one, content, path, "tool" if "tools" in spec.labels else "phase", spec))
            for spec in specs
        ]
        if None not in refusals and refusals[0]:
            raise refusals[0]

    return read


def _read_one(content: bytes, path: Path, role: str, spec: DataSetSpec) -> None:
    from features.dataset.described.labels import parse_described, records_by_video

    source = next(iter(spec.labels.values()))
    for records in records_by_video(content, path, source, spec).values():
        records.digest(path)
        track = parse_described(records, path, source, role, spec)
        for times_s in (None, np.cumsum(np.arange(100) % 7 * 0.02)):
            _refusal(partial(_fit, path, track, role, spec, times_s))


def _fit(path: Path, track: Any, role: str, spec: DataSetSpec, times_s: np.ndarray | None) -> None:
    from features.dataset.annotations import LabelTrack
    from features.dataset.index import AnnotationFile
    from features.dataset.labels import Annotation, fit_annotations, sample_labels
    from features.dataset.row_numbers import Extent, infer_numberings

    extent = Extent("case_1.mp4", 100, 25.0, 25.0, times_s=times_s)
    source, data = next(iter(spec.labels.values())), DataConfig()
    read = Annotation(path, AnnotationFile(path="a", sha256="ab" * 32, rows=1), track, source)
    read.length(25.0)
    if isinstance(track, LabelTrack):
        read = read.with_numbering(infer_numberings([(path, track)], extent, data, [read.numbered_by(data)])[0])
    fitted = fit_annotations({role: read}, extent)
    sample_labels(np.arange(100), fitted.phase, fitted.tools, "mask", len(spec.tools))


def _refusal(step: Callable[[], None]) -> UserError | None:
    """Return the error with which a step refuses its input, or None."""
    try:
        step()
    except UserError as error:
        if not str(error).isprintable():
            raise AssertionError(f"not printable: {str(error)!r}") from error
        return error
    return None


def table_seeds() -> list[bytes]:
    rows = [(at, NAMES[at // 34]) for at in range(100)]
    head = "start\tlabel\n"
    texts = [head + "".join(f"{at}\t{name}\n" for at, name in rows)]
    texts.append(head + "00:00:00.000\tPreparation\n00:00:01.240\tClosure\n00:00:03.9\tclipping-and-cutting\n")
    texts.append(head + "".join(f"{at / 25:.3f}\t{name}\n" for at, name in rows))
    texts.append("0,1000,0\r\n1000,2500,2\r\n1500,1700,1\r\n")
    texts.append("1 50 G1\n51 99 Closure\n")
    texts.append("case;start;label\n1;0;Closure\n1;30;Preparation\ncase_2;0;Closure\n")
    texts.append("start\tGrasper\tHook\n0\t1\t0\n1\t0\t\n2\t-1\t1\n")
    texts.append('start\tlabel\n0\tGrasper|Hook\n1\t"[""Hook""]"\n2\t\n3\tHook\n')
    return [text.encode() for text in texts]


def tree_seeds() -> list[bytes]:
    vectors = {str(frame): [[1, 2, frame % 3]] * frame for frame in range(4)}
    images = [{"id": at, "video_name": "case_1", "frame_num": at} for at in range(4)]
    labels = [{"id": 9, "image_id": at, "phases": at % 3} for at in range(4)]
    kinds = [{"id": at, "name": name} for at, name in enumerate(NAMES)]
    trees: list[Any] = [
        {"phases": [{"start": 0, "end": 1500, "label": "Closure"}, {"start": 1500, "end": 4000.5, "label": "-1"}]},
        {"annotations": vectors},
        {"images": images, "annotations": labels, "categories": kinds},
        {"frames": [{"t": 0, "tools": ["Hook"]}, {"t": 1.0, "tools": []}, {"t": 2, "tools": "Grasper"}]},
        {"annotations": {"0": [[1, 2, 0], {"label": 1}, 5]}, "frames": [{"t": 0, "tools": ["Hook"]}]},
    ]
    return [json.dumps(tree).encode() for tree in trees]


def read_description(folder: Path) -> Callable[[Path], None]:
    """Return a function that reads a description and makes an index of a folder with files of several forms."""
    from PIL import Image

    for name in ("01", "case_2", "SBP01", "VID01"):
        (folder / name).mkdir(exist_ok=True)
        for number in range(0, 100, 25):
            Image.new("RGB", (8, 8)).save(folder / name / f"{number:06d}.png")
    (folder / "annotations.csv").write_text("VideoID;FrameNo;Phase\n2;0;3\n2;30;5\n")
    (folder / "label_01.txt").write_text("Frame\tPhase\n1\t1\n2\t1\n3\t2\n4\t7\n")
    phases = [{"start": 0, "end": 4000, "label_name": "preparation"}]
    steps = [{"start": 0, "end": 4000, "label_name": "s0_null_step"}]
    (folder / "SBP01.mp4.json").write_text(json.dumps({"phases": phases, "steps": steps}))
    vector = [0, 1, 1, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 2]
    (folder / "VID01.json").write_text(json.dumps({"annotations": {str(at): [vector] for at in range(4)}}))

    def read(path: Path) -> None:
        from features.dataset.build import build_index
        from features.dataset.index import Dataset
        from features.dataset.labels import load_tracks

        spec = load_dataset(str(path))
        index = build_index(path.parent, spec, DataConfig(unverified=True, frame_numbering="source"), leave_out=True)
        for entry in index.videos:
            load_tracks(Dataset(index, path.parent), entry)

    return read


def description_seeds() -> Iterator[bytes]:
    folder = Path(__file__).resolve().parents[2] / "configs" / "datasets"
    for name in ("autolaparo", "cataract-101", "strasbypass70", "cholect50"):
        yield (folder / f"{name}.yaml").read_bytes()


TABLE_WORDS = (*NAMES, *TOOLS, "start", "label", "case", "end", "G1", "case_1", "00:00:01.5", "0.04", "[]", '["Hook"]')
TREE_WORDS = (
    "{", "}", "[", "]", '"phases": ', '"annotations": ', '"images": ', '"frames": ', '"categories": ', '"start": 1',
    '"end": 2', '"label": "Closure"', '"id": 1', '"image_id": 1', '"0": ', "null", "true", '"tools": ["Hook"]', "1.5",
)  # fmt: skip
DESCRIPTION_WORDS = (
    "labels", "phases", "tools", "tracks", "files", "format", "json", "table", "records", "columns", "start", "label",
    "form", "intervals", "starts", "rows", "unit", "source", "second", "rate", "origin", "auto", "gaps", "overlaps",
    "inner", "where", "meaning", "no_label", "separator", "join", "parse", "categories", "numbers_from", "offset_s",
    "zero", "container", "(?P<id>a+)+", "'(?P<id>\\d+).*'", "- ", "[1, 2]", "{a: 1}", "&a ", "*a",
)  # fmt: skip
