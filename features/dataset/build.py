"""Build an index: find the videos, measure them, fit their annotations to them, and assign splits."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from configs.dataset_spec import DataSetSpec
from configs.errors import UserError, listed, printable
from configs.schema import DataConfig
from engine.files import below_root, inside
from engine.progress import BAR_AFTER_S, progress_bar
from engine.sniff import recognise_file
from features.dataset.annotations import LabelTrack
from features.dataset.described.labels import read_described
from features.dataset.discover import Discovery, FoundVideo, find_videos
from features.dataset.frame_folders import LabelEnd, infer_layout, require_one_base, require_one_rate, scan_folder
from features.dataset.index import Dataset, Index, LeftOut, VideoEntry, exclusions, first_fault
from features.dataset.labels import (
    Annotation,
    FittedTracks,
    Role,
    extent_of,
    fit_annotations,
    join_fitted,
    labelled_fractions,
    read_annotation,
)
from features.dataset.parts import joined_entry
from features.dataset.phase_order import parse_phase_order
from features.dataset.published import published_lists
from features.dataset.row_numbers import Extent, infer_numberings
from features.dataset.sources import SourceFacts, folder_facts, record_facts, video_facts
from features.dataset.splits import Split, assign_splits, usual_split_problem, with_lists
from features.dataset.tfrecord import require_one_numbering
from features.ids import id_key, natural_key


def build_index(
    root: Path,
    spec: DataSetSpec,
    data: DataConfig,
    only: Collection[str] | None = None,
    leave_out: bool = False,
) -> Index:
    """Build the index of the data set below `root`, or only of the videos `only`. Nothing is written.

    With `leave_out`, a video is left out if it or its annotations cannot be read; all other videos keep the splits that
    they would have if it were present. Videos named in `data.exclude` are left out in the same way, without being read.

    If `data.split` is not set and the data set's usual split does not fit the videos found, every video gets split
    "none", and a note says so. Raises UserError naming the file and row that are wrong. If several videos are wrong,
    the message describes the problem of the first and names the others.
    """
    if spec.unverified and not data.unverified:
        raise UserError(
            f"data set {spec.name}: its description is unverified: {spec.unverified}; compare it with your copy, then "
            "use it with `index --unverified` or data.unverified=true"
        )
    found = find_videos(root, spec, data, leave_out)
    paths = {printable(path): printable(reason) for path, reason in found.passed_over}
    named = exclusions([printable(name) for name in found.ids], data.exclude, tuple(paths))
    if only is not None:
        found, paths = _kept(found, only.__contains__), {}
    ids = [printable(name) for name in found.ids]
    excluded = {name: reason for name, reason in named.items() if name in ids}
    found = _kept(found, lambda name: printable(name) not in excluded)
    if not found.ids:
        raise UserError(f"{root}: data.exclude leaves out all {len(excluded)} videos; keep some")
    entries, notes, faults = _build_entries(root, found, spec, data, leave_out)
    passed_over = tuple(
        LeftOut(id=path, reason=named.get(path, reason), excluded=path in named) for path, reason in paths.items()
    )
    reasons = {printable(name): below_root(str(error), root) for name, error in faults} | excluded
    ids = [*(entry.id for entry in entries), *reasons]
    places = {entry.id: sorted(entry.paths) for entry in entries}
    lists = published_lists(root, spec, data.split, places, ids, notes)
    splits = _splits(ids, with_lists(spec, lists), data, passed_over, notes)
    return Index(
        dataset=spec,
        videos=tuple(entry.model_copy(update={"split": splits[entry.id]}) for entry in entries),
        notes=tuple(map(printable, notes)),  # file names in notes may contain bytes that are not text
        left_out=tuple(
            LeftOut(id=name, reason=reason, split=splits[name], excluded=name in excluded)
            for name, reason in reasons.items()
        ),
        passed_over=passed_over,
        published=lists,
    )


def dataset_of_source(path: Path, spec: DataSetSpec, data: DataConfig) -> Dataset:
    """Build the data set of a single video file or folder of frames with any name, without annotations.

    The id is the file's name without its extension. Raises UserError naming the file if it is missing or neither.
    """
    if not path.exists():
        raise UserError(f"{path}: no such video or folder of frames")
    place = path.resolve()
    kind: Literal["video", "frames"] = "frames" if place.is_dir() else "video"
    found = FoundVideo(path.name if kind == "frames" else path.stem, kind, place.name)
    facts, notes = _measure(place.parent, found, spec, data, (), [])
    try:
        entry = VideoEntry(id=found.id, kind=kind, source=found.source, split="none", **vars(facts))
    except ValidationError as error:
        raise UserError(f"{path}: {first_fault(error)}; rename it") from error
    return Dataset(Index(dataset=spec, videos=(entry,), notes=tuple(map(printable, notes))), place.parent)


def _kept(found: Discovery, keep: Callable[[str], bool]) -> Discovery:
    """Return a copy of `found` with only the videos for whose ids `keep` is true."""
    return replace(
        found,
        videos=tuple(video for video in found.videos if keep(video.id)),
        faults=tuple(fault for fault in found.faults if keep(fault[0])),
    )


def _build_entries(
    root: Path, found: Discovery, spec: DataSetSpec, data: DataConfig, leave_out: bool
) -> tuple[list[VideoEntry], list[str], list[tuple[str, UserError]]]:
    """Return entries without a split, notes, and the videos with errors. Raises UserError as `build_index` does."""
    order = _phase_order(root, found, spec, data)
    entries: list[VideoEntry] = []
    notes, faults = list(found.notes), list(found.faults)
    if spec.unverified:
        notes.append(f"the description of {spec.name} is unverified: {spec.unverified}")
    with progress_bar(None, "index", "video", iterable=found.videos, delay=BAR_AFTER_S) as videos:
        for video in videos:
            try:
                entry, entry_notes = _build_entry(root, video, found.shared, spec, data, order, leave_out)
            except UserError as error:
                faults.append((video.id, error))
                continue
            entries.append(entry)
            notes += entry_notes
    if faults and not (leave_out and entries):
        others = f" (also at fault: {', '.join(video_id for video_id, _ in faults[1:])})" if faults[1:] else ""
        raise UserError(f"{faults[0][1]}{others}") from faults[0][1]
    notes += _without_records(root, found, spec, entries)
    folders = [(str(root / entry.source), entry.frames) for entry in entries if entry.frames]
    require_one_base(folders, data)
    require_one_rate(folders, spec, data)
    require_one_numbering([(str(root / entry.source), entry.records) for entry in entries if entry.records])
    return entries, notes, faults


def _without_records(root: Path, found: Discovery, spec: DataSetSpec, entries: Sequence[VideoEntry]) -> list[str]:
    """Return notes on videos of which files with the labels of several videos have none."""
    notes = []
    for role, files in found.shared.items():
        source = spec.label_source(role)
        bare = [one.id for one in entries if role not in one.files_by_role and one.kind != "tfrecord"]
        if source and bare and files:
            named = [str(key) for one in files for key in read_described(inside(root, one), source, spec)[0]]
            notes.append(
                f"{len(bare)} video(s) without {role} labels ({listed(bare, 10)}) in {listed(files)}, which has labels "
                f"of {listed(sorted(named))}"
            )
    return notes


def _splits(
    ids: Sequence[str], spec: DataSetSpec, data: DataConfig, passed_over: Sequence[LeftOut], notes: list[str]
) -> dict[str, Split]:
    """Return the split of each video, and add a note if the data set's usual split does not fit.

    Raises UserError if the split that the settings ask for does not fit.
    """
    ids = sorted(ids, key=natural_key)
    if problem := usual_split_problem(ids, spec, data.split):
        notes.append(f"no splits assigned, since the usual one of {spec.name} does not fit: {problem}")
    try:
        return assign_splits(ids, spec, data.split)
    except UserError as error:
        lost = next((f"; passed over: {one.id}: {one.reason}" for one in passed_over if not one.excluded), "")
        raise UserError(f"{error}{lost}") from error


def _phase_order(root: Path, found: Discovery, spec: DataSetSpec, data: DataConfig) -> tuple[str, ...]:
    """Return the phase that each number in TFRecord files stands for; empty if there are no such files."""
    sources = [video.source for video in found.videos if video.kind == "tfrecord"]
    if not sources:
        return ()
    try:
        return parse_phase_order(data.tfrecord_phase_order, spec, str(root / sources[0]))
    except UserError as error:
        raise UserError(f"{error} (the setting data.tfrecord_phase_order)") from error


def _read_annotations(
    root: Path, video: FoundVideo, shared: Mapping[str, Sequence[str]], spec: DataSetSpec, data: DataConfig
) -> dict[Role, Annotation]:
    """Read a video's own files of labels, and its records in files of several videos.

    Raises UserError if two files have labels of the video, or if settings contradict the description.
    """
    paths = dict(video.labels)
    for role, files in shared.items():
        source = spec.label_source(role)
        if source is None or video.kind == "tfrecord":
            continue
        having = [one for one in files if id_key(video.id) in read_described(inside(root, one), source, spec)[0]]
        if len(having) > 1:
            raise UserError(f"{root / having[0]} and {root / having[1]}: both have {role} labels of {video.id}")
        if having:
            paths[role] = having[0]
    read = {role: read_annotation(root, paths[role], role, spec, video.id) for role in spec.roles if role in paths}
    stated = [role for role, one in read.items() if one.source is not None]
    if stated and (data.row_fps, data.row_base) != ("auto", "auto"):
        raise UserError(
            f"data.row_fps and data.row_base: the description of {spec.name} says what the numbers of {stated[0]} "
            "labels count; leave these settings out, or change `labels` in a copy of the description"
        )
    return read


def _build_entry(
    root: Path,
    video: FoundVideo,
    shared: Mapping[str, Sequence[str]],
    spec: DataSetSpec,
    data: DataConfig,
    order: tuple[str, ...],
    leave_out: bool,
) -> tuple[VideoEntry, list[str]]:
    """Return one video's entry, without a split, and notes. With `leave_out`, too few labels raise UserError."""
    entry, fitted, notes = _labelled_entry(root, video, shared, spec, data, order)
    if leave_out:
        fractions = labelled_fractions(entry.image_frames, fitted)
        for role in entry.files_by_role.keys() & fractions.keys():
            path, described = inside(root, entry.files_by_role[role].path), spec.label_source(role) is not None
            numbers = f"unit, rate and origin in `labels` of {spec.name}" if described else "data.row_fps"
            _require_labelled(path, fractions[role], video.source, data, numbers)
    return entry, [*notes, *fitted.notes]


def _labelled_entry(
    root: Path,
    video: FoundVideo,
    shared: Mapping[str, Sequence[str]],
    spec: DataSetSpec,
    data: DataConfig,
    order: tuple[str, ...],
) -> tuple[VideoEntry, FittedTracks, list[str]]:
    """Return a video's entry without a split, its labels, and notes other than those on frames without labels."""
    annotation, path = next(iter(video.labels.values()), None), root / video.source
    if video.kind == "tfrecord" and annotation:
        raise UserError(
            f"{root / annotation} and {path}: both contain labels of {video.id}; keep only one of them below the data "
            "root, or use the labels in the TFRecord files with data.sources=tfrecord"
        )
    parts = [_labelled_entry(root, part, {}, spec, data, order) for part in video.parts]
    read = _read_annotations(root, video, shared, spec, data)
    try:
        if parts:
            entry, source_notes = (
                joined_entry([part for part, _, _ in parts]),
                [note for *_, of in parts for note in of],
            )
        else:
            lengths = [one.length(spec.annotation_fps) for one in read.values()]
            facts, measured = _measure(root, video, spec, data, order, lengths)
            entry = VideoEntry(id=video.id, kind=video.kind, source=video.source, split="none", **vars(facts))
            source_notes = [*measured, *_missing_images(entry)]
    except ValidationError as error:  # a damaged header may give an impossible rate or number of frames
        what = recognise_file(path) if video.kind == "video" else None
        problem = f"is {what}" if what else f"{first_fault(error)}; re-encode it or leave it out"
        raise UserError(f"{path}: {problem}") from error
    extent = extent_of(entry, spec)
    read = _numbered(read, extent, data)
    fitted = join_fitted(fit_annotations(read, extent), [labels for _, labels, _ in parts], entry)
    files: dict[str, Any] = {f"{role}_file": read[role].file for role in ("phase", "tool") if role in read}
    tracks = {role: read[role].file for role in spec.tracks if role in read}
    entry = entry.model_copy(update={**files, "track_files": {**entry.track_files, **tracks}})
    notes = [note for one in read.values() for note in one.notes_on(extent)]
    return entry, fitted, list(dict.fromkeys([*source_notes, *notes]))


def _numbered(read: Mapping[Role, Annotation], extent: Extent, data: DataConfig) -> dict[Role, Annotation]:
    """Return the annotations with what the numbers of their rows count, as far as they have numbered rows."""
    numbered = {role: one for role, one in read.items() if isinstance(one.track, LabelTrack)}
    numberings = infer_numberings(
        [(one.path, one.track) for one in numbered.values() if isinstance(one.track, LabelTrack)],
        extent,
        data,
        [one.numbered_by(data) for one in numbered.values()],
    )
    ways = zip(numbered.items(), numberings, strict=True)
    return {**read, **{role: one.with_numbering(way) for (role, one), way in ways}}


def _measure(
    root: Path,
    video: FoundVideo,
    spec: DataSetSpec,
    data: DataConfig,
    order: tuple[str, ...],
    lengths: Sequence[LabelEnd],
) -> tuple[SourceFacts, tuple[str, ...]]:
    """Measure a source of any kind; returns its facts and notes on it. `lengths` are those of its labels."""
    if video.kind == "video":
        return video_facts(root, video.source, data.full_hash, spec.counts_from_container)
    if spec.counts_from_container and lengths:
        raise UserError(
            f"{root / video.source}: its labels count from the start of a video's container (`zero: container` in "
            f"`labels` of {spec.name}), which is unknown here; index the video files, or leave `zero` out and shift "
            "the times with `offset_s`"
        )
    if video.kind == "tfrecord":
        return record_facts(root, video.source, video.id, spec, order, data.full_hash), ()
    scan = scan_folder(root, video.source, spec)
    layout = infer_layout(scan, spec, data, LabelEnd.longest(lengths))
    return folder_facts(scan, layout, spec, data.full_hash), ()


def _require_labelled(path: Path, labelled: float, source: str, data: DataConfig, numbers: str) -> None:
    """Raise UserError if a file labels a smaller fraction of a video than `data.min_labelled`.

    `numbers` names the setting of what its numbers count.
    """
    if labelled < data.min_labelled:
        raise UserError(
            f"{path}: has labels for {labelled:.1%} of {source}, less than data.min_labelled={data.min_labelled:g}; "
            f"complete them, set {numbers} if the rows' numbers were misunderstood, or lower data.min_labelled"
        )


def _missing_images(entry: VideoEntry) -> list[str]:
    """Return a note if images are missing in a folder of frames, otherwise nothing."""
    if entry.frames is None or not entry.frames.missing:
        return []
    start = entry.frames.missing[0][0]
    unit = entry.frames.stride if entry.frames.numbering == "sample" else 1
    first = (entry.frames.first + start * entry.frames.stride) // unit + entry.frames.base
    lost = entry.frames.count - len(entry.image_frames)
    return [f"{entry.source}: {lost} of {entry.frames.count} images are missing, the first of them number {first}"]
