"""Find the files of features in a folder of another program, and which video each belongs to."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from configs.dataset_spec import DataSetSpec
from configs.errors import UserError, listed
from features.dataset.discover import id_of_name, sorted_entries
from features.dataset.index import Index
from features.ids import id_key, id_problem, natural_key, normal_id
from interop.feature_files import mstcn
from interop.feature_files.arrays import SUFFIXES

PROGRAMS: Mapping[str, str] = {"tecno": "TeCNO", "mstcn": "MS-TCN"}
_RATE = re.compile(r"_(?P<fps>\d{1,4}(?:\.\d{1,6})?)fps$")  # TeCNO: video_1_25.0fps.pkl


@dataclass(frozen=True)
class FeatureFile:
    """One video's file of features; `stem` is its name without the ending, and without a rate as TeCNO adds it."""

    path: Path
    stem: str
    fps: float | None = None


@dataclass(frozen=True)
class Found:
    """The files of features of one format below `root`. `layout` is `mstcn`, or else the format of the files."""

    root: Path
    layout: str
    format: str
    files: tuple[FeatureFile, ...]

    @property
    def mapping(self) -> Path | None:
        """The file with the class names, if there is one."""
        path = self.root / mstcn.MAPPING
        return path if self.layout == "mstcn" and path.is_file() else None

    @property
    def bundles(self) -> Path | None:
        """The folder with the division into training and test, if there is one."""
        path = self.root / mstcn.SPLITS
        return path if self.layout == "mstcn" and path.is_dir() else None

    def truth_of(self, file: FeatureFile) -> Path | None:
        """The file with the labels of a video, if there is one."""
        path = self.root / mstcn.TRUTH / f"{file.path.stem}.txt"
        return path if self.layout == "mstcn" and path.is_file() else None


def find_features(place: Path, layout: str | None = None) -> Found:
    """Find the files of features at `place`, which is a folder or a single file.

    `layout` is `mstcn` or one of `SUFFIXES`; with None it follows from what is there. Raises UserError if there is no
    such file, or files of several formats.
    """
    if place.is_file():
        kinds = [kind for kind in SUFFIXES if place.suffix.casefold() in SUFFIXES[kind]]
        kind = layout if layout in SUFFIXES else next(iter(kinds), None)
        if kind is None:
            raise UserError(f"{place}: its ending is none of {_endings()}; name its format with --format")
        return Found(place.parent, kind, kind, (_file(place),))
    if not place.is_dir():
        raise UserError(f"{place}: no such file or folder")
    if layout == "mstcn" or (layout is None and (place / mstcn.FEATURES).is_dir()):
        folder = place / mstcn.FEATURES
        if not folder.is_dir():
            raise UserError(f"{place}: has no folder {mstcn.FEATURES}/, so it is not a folder of MS-TCN")
        files = _in_folder(folder, SUFFIXES["npy"])
        if not files:
            raise UserError(f"{folder}: holds no .npy file")
        return Found(place, "mstcn", "npy", tuple(map(_file, files)))
    wanted = SUFFIXES if layout is None else {layout: SUFFIXES[layout]}
    held = {kind: _in_folder(place, endings) for kind, endings in wanted.items()}
    kinds = [kind for kind, paths in held.items() if paths]
    if len(kinds) > 1:
        raise UserError(f"{place}: holds files of several formats; choose one with --format: {', '.join(kinds)}")
    if not kinds:
        below = [path.name for path in place.iterdir() if path.is_dir() and not path.name.startswith(".")]
        inside = f"; its folders are {listed(sorted(below), 4)}" if below else ""
        raise UserError(f"{place}: holds no file with an ending of {_endings(wanted)}{inside}")
    return Found(place, kinds[0], kinds[0], tuple(map(_file, held[kinds[0]])))


def _endings(wanted: Mapping[str, object] = SUFFIXES) -> str:
    return ", ".join(ending for kind in wanted for ending in SUFFIXES[kind])


def _in_folder(folder: Path, endings: Sequence[str]) -> list[Path]:
    names = [entry.name for entry in sorted_entries(folder) if not entry.name.startswith(".") and entry.is_file()]
    kept = [name for name in names if Path(name).suffix.casefold() in endings]
    return [folder / name for name in sorted(kept, key=natural_key)]


def _file(path: Path) -> FeatureFile:
    rate = _RATE.search(path.stem)
    return FeatureFile(path, path.stem[: rate.start()], float(rate["fps"])) if rate else FeatureFile(path, path.stem)


def ids_of_files(
    found: Found, spec: DataSetSpec, index: Index | None, names: Mapping[str, str]
) -> tuple[dict[str, FeatureFile], list[str]]:
    """Return the file of each video by its id, and the names of files that belong to no video of the index.

    A name is the id of the index or of `names`, or has the form of a video's name in the data set's description, or
    else is the id itself. Raises UserError if two files belong to one video, or if none belongs to a video.
    """
    known = {id_key(entry.id): entry.id for entry in index.videos} if index else {}
    files: dict[str, FeatureFile] = {}
    strangers: list[str] = []
    for file in found.files:
        video_id = names.get(file.path.stem) or known.get(id_key(file.stem)) or id_of_name(file.stem, spec)
        video_id = normal_id(video_id or file.stem)
        if problem := id_problem(video_id):
            raise UserError(f"{file.path}: the video id {video_id!r} {problem}; rename the file")
        if index is not None and id_key(video_id) not in known:
            strangers.append(file.path.name)
            continue
        video_id = known.get(id_key(video_id), video_id)
        if video_id in files:
            raise UserError(f"{files[video_id].path} and {file.path}: both are features of {video_id}; keep one")
        files[video_id] = file
    if not files:
        raise UserError(f"{found.root}: none of its files is named like a video of the index ({listed(strangers)})")
    return dict(sorted(files.items(), key=lambda item: natural_key(item[0]))), strangers
