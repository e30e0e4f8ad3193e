"""Find the files of features in a folder of another program, and which video each belongs to."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from configs.dataset_spec import DataSetSpec
from configs.errors import UserError, listed
from features.dataset.discover import id_of_name, sorted_entries
from features.dataset.index import Index
from features.ids import id_key, id_problem, natural_key, normal_id
from interop.feature_files import mstcn
from interop.feature_files.arrays import SUFFIXES, open_features
from interop.pickled_videos import PickledVideo, read_pickled_index

PROGRAMS: Mapping[str, str] = {"tecno": "TeCNO", "mstcn": "MS-TCN", "transsvnet": "Trans-SVNet"}
BOUNDARIES = "train_val_paths_labels1.pkl"  # Trans-SVNet: paths, labels and frames per video of each part
_PART = re.compile(r"g_LFB\d*_(?P<part>train|val|test)\d*\.pkl")  # Trans-SVNet: g_LFB50_train.pkl
_RATE = re.compile(r"_(?P<fps>\d{1,4}(?:\.\d{1,6})?)fps$")  # TeCNO: video_1_25.0fps.pkl


@dataclass(frozen=True)
class FeatureFile:
    """One video's file of features; `stem` is its name without the ending, and without a rate as TeCNO adds it.

    In a file of several videos, `rows` are this one's, and `pickled` has its labels and its part of the split.
    """

    path: Path
    stem: str
    fps: float | None = None
    rows: slice | None = None
    pickled: PickledVideo | None = None


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
    parts = [path for path in _in_folder(place, SUFFIXES["tecno"]) if _PART.fullmatch(path.name)]
    if layout == "transsvnet" or (layout is None and parts):
        if not parts:
            raise UserError(f"{place}: holds no g_LFB50_train.pkl, g_LFB50_val.pkl or g_LFB50_test.pkl")
        return Found(place, "transsvnet", "lfb", tuple(map(_file, parts)))
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


def divided(found: Found, spec: DataSetSpec) -> Found:
    """Return the files with one entry per video, for Trans-SVNet, whose files hold all videos of a part.

    The pickle that says where videos begin is beside the files or in the folder above. Raises UserError if there is
    none, or if it does not have as many frames as a file has rows.
    """
    if found.layout != "transsvnet":
        return found
    places = (found.root / BOUNDARIES, found.root.resolve().parent / BOUNDARIES)
    where = next((path for path in places if path.is_file()), None)
    if where is None:
        raise UserError(f"{found.root}: {BOUNDARIES}, which says where each video begins, must be in it or beside it")
    videos = read_pickled_index(where, spec)
    files: dict[str, FeatureFile] = {}
    for file in found.files:
        part = _PART.fullmatch(file.path.name)
        own = [video for video in videos if part and video.split == part["part"]]
        with open_features(file.path, found.format) as content:
            held, wanted = len(content.features), sum(len(video.phase) for video in own)
        if held != wanted:
            raise UserError(f"{file.path}: has {held} rows, but {where} lists {wanted} frames in {len(own)} videos")
        ends = itertools.accumulate(len(video.phase) for video in own)
        for video, end in zip(own, ends, strict=True):
            rows = slice(end - len(video.phase), end)
            if video.folder not in files or video.split == "test":  # the validation videos may be among those for test
                files[video.folder] = FeatureFile(file.path, video.folder, None, rows, video)
    return replace(found, files=tuple(files.values()))


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
            raise UserError(f"{files[video_id].path} and {file.path}: both have features of {video_id}; keep one")
        files[video_id] = file
    if not files:
        raise UserError(f"{found.root}: none of its files is named like a video of the index ({listed(strangers)})")
    return dict(sorted(files.items(), key=lambda item: natural_key(item[0]))), strangers
