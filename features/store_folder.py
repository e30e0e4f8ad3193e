"""Read and write feature folders `<store>/<encoder>-<digest12>/`, which contain all that stage two needs.

A feature folder contains one feature file per video (`features.store`), the `index.json` from which they were made,
`encoder.json`, and for each video without features a file `videoNN.left_out.json` with the reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from configs.errors import UserError, listed
from configs.schema import EXTRACT_FOLDER
from engine.files import make_folder, read_json_object, remove_stale_temporaries, require_free_bytes, write_json
from engine.runs import RESULT_FILE
from features.dataset.index import Index
from features.ids import id_of_stem
from features.store import EncoderSpec, FeatureFileError, VideoFeatures, feature_path, read_every_chunk, read_features

INDEX_FILE = "index.json"
ENCODER_FILE = "encoder.json"
_FAULT_SUFFIX = ".left_out.json"
_DESCRIBED = ("backbone", "weights_sha256", "fps", "precision", "storage", "preprocess", "encoder_digest")


def _fault_path(folder: Path, video_id: str) -> Path:
    return feature_path(folder, video_id).with_suffix(_FAULT_SUFFIX)


def record_fault(folder: Path, video_id: str, source: str, reason: str) -> None:
    """Record in a feature folder why a video has no features; `source` is the hash of the video's ends.

    Each video has its own file, so that two shards never write to the same file.
    """
    write_json(_fault_path(folder, video_id), {"id": video_id, "reason": reason, "source_sha256_ends": source})


def clear_fault(folder: Path, video_id: str) -> None:
    """Delete the record that a video has no features, if there is one."""
    _fault_path(folder, video_id).unlink(missing_ok=True)


def _recorded_fault(folder: Path, video_id: str, source: str) -> str | None:
    """Return why this source has no features; None if extract has not failed on it, or has not tried it yet."""
    path = _fault_path(folder, video_id)
    found = read_json_object(path) if path.exists() else {}
    return str(found.get("reason")) if found.get("source_sha256_ends") == source else None


def recorded_faults(folder: Path) -> list[tuple[str, str]]:
    """Return the ids of the videos that extract could not read, each with the reason, sorted by file name."""
    records = [read_json_object(path) for path in sorted(folder.glob(f"*{_FAULT_SUFFIX}"))]
    return [(str(record.get("id")), str(record.get("reason"))) for record in records]


def feature_files(folder: Path) -> list[Path]:
    """Return the feature files of a folder, sorted by name. Raises UserError if there is none."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such feature folder; run extract, or name another folder")
    files = sorted(path for path in folder.glob("*.h5") if not path.name.startswith("."))
    if not files:
        inside = sorted(path.parent for path in folder.glob("*/*.h5"))
        instead = f"but {inside[0]} does: name that folder" if inside else "run extract first"
        raise UserError(f"{folder}: contains no feature files; {instead}")
    return files


def load_feature_set(folder: Path, video_ids: Sequence[str], in_memory: bool = True) -> dict[str, VideoFeatures]:
    """Load and verify the features of the named videos, by video id.

    With `in_memory`, all features are read now, otherwise when they are used. Raises UserError naming the videos whose
    features are missing, and FeatureFileError if a file is damaged or the files come from different encoders.
    """
    missing = [video_id for video_id in video_ids if not feature_path(folder, video_id).is_file()]
    if missing:
        raise UserError(f"{folder}: no features of {listed(missing, 5)}; run extract to make them")
    loaded = {video_id: read_features(feature_path(folder, video_id), in_memory) for video_id in video_ids}
    require_one_encoder({feature_path(folder, name): video.attributes for name, video in loaded.items()})
    return loaded


def require_one_encoder(attributes: Mapping[Path, Mapping[str, Any]]) -> str | None:
    """Return the encoder digest that all feature files have in common, or None if there are no files.

    `attributes` are those of the files, by path. Raises FeatureFileError naming two files with different encoders.
    """
    digests = {path: str(found.get("encoder_digest")) for path, found in attributes.items()}
    first = next(iter(digests), None)
    for path, digest in digests.items():
        if first is not None and digest != digests[first]:
            raise FeatureFileError(
                f"{path}: made by encoder {digest[:12]}, but {first.name} by {digests[first][:12]}; "
                "features of two encoders cannot be combined: delete those of one, or run extract again"
            )
    return digests[first] if first else None


def verify_folder(folder: Path) -> Iterator[tuple[Path, str | None]]:
    """Verify each feature file, and yield it with its problem, or None.

    It is also a problem if a file was made by another encoder than the first intact file.
    """
    expected: str | None = None
    for path in feature_files(folder):
        try:
            digest = str(read_every_chunk(path)["encoder_digest"])
        except FeatureFileError as error:
            yield path, str(error).removeprefix(f"{path}: ")
            continue
        expected = expected or digest
        other = f"made by another encoder ({digest[:12]}, the first file's is {expected[:12]})"
        yield path, None if digest == expected else other


def estimate_bytes(lengths: Iterable[int], encoder: EncoderSpec) -> int:
    """Return an upper bound on the bytes of the feature files of videos with `lengths` sampled frames."""
    item = np.dtype(encoder.storage).itemsize
    return sum(length * (encoder.embedding_dim * item + 64) + 64_000 for length in lengths)


def prepare_folder(folder: Path, missing_lengths: Sequence[int], encoder: EncoderSpec) -> None:
    """Create the folder, and delete temporary files that killed writers have left in it.

    `missing_lengths` are the numbers of sampled frames of the videos that are still to be written. Raises UserError if
    the folder cannot be created or the disk has no room for their features.
    """
    make_folder(folder)
    remove_stale_temporaries(folder)
    require_free_bytes(folder, estimate_bytes(missing_lengths, encoder), "the features")


def find_feature_folder(named: Path | None, run: Path, store: Path) -> Path:
    """Return the feature folder to use.

    It is the one that was `named`, or the one that the run's `extract` made, or else the store's only one. Raises
    UserError naming the choices if there is no such folder, or if the store has several.
    """
    pointer = run / EXTRACT_FOLDER / RESULT_FILE
    if named is None and pointer.exists():
        recorded = read_json_object(pointer).get("folder")
        if not isinstance(recorded, str):
            raise UserError(f"{pointer}: contains no feature folder; run extract again, or add --features DIR")
        named = Path(recorded)
    if named is not None:
        feature_files(named)
        return named
    found = sorted(path.parent for path in store.glob(f"*/{INDEX_FILE}")) if store.is_dir() else []
    if not found:
        raise UserError(f"{store}: contains no features; run extract first, or give a folder with --features DIR")
    if len(found) > 1:
        shown = ", ".join(str(path) for path in found[:4])
        raise UserError(f"{store}: contains features of several encoders ({shown}); choose one with --features DIR")
    return found[0]


def features_of_run(run: Path, store: Path) -> Path:
    """Return the feature folder that the run's `extract` made. Raises UserError if there is none."""
    if not (run / EXTRACT_FOLDER / RESULT_FILE).is_file():
        raise UserError(f"{run}: no features of this run; make them with `extract --name {run.name}`")
    return find_feature_folder(None, run, store)


def describe_folder(folder: Path) -> list[str]:
    """Return the lines that `features info` prints: the encoder, then one line per video, damaged files included."""
    lines: list[str] = []
    total = 0
    for path in feature_files(folder):
        try:
            video = read_features(path, with_features=False)
        except FeatureFileError as error:
            lines.append(str(error))
            continue
        if not total:
            lines[:0] = [str(folder), *(f"  {name}: {video.attributes.get(name)}" for name in _DESCRIBED)]
        total += len(video)
        labelled = int((video.phase >= 0).sum())
        with_tools = int((video.tools >= 0).any(axis=1).sum()) if video.tools.size else 0
        counts = f"{len(video)} frames, {labelled} with a phase, {with_tools} with tools"
        counts += "".join(f", {int((labels >= 0).sum())} with {name}" for name, labels in video.tracks.items())
        lines.append(f"{id_of_stem(path.stem)}: {counts}")
    return [*lines, f"{total} frames in all"]


def usable_index(folder: Path) -> Index:
    """Return the index of a feature folder, without the videos that extract could not read.

    Videos that have not been extracted yet are kept. Raises UserError if there is no index.
    """
    where = folder / INDEX_FILE
    if not where.is_file():
        raise UserError(f"{folder}: contains no {INDEX_FILE}; give a folder that extract wrote with --features DIR")
    return with_recorded_faults(Index.load(where), folder)


def with_recorded_faults(index: Index, folder: Path) -> Index:
    """Return the index without the videos for which this feature folder records that extract could not read them."""
    reasons = ((entry.id, _recorded_fault(folder, entry.id, entry.sha256_ends)) for entry in index.videos)
    return index.without((video_id, reason) for video_id, reason in reasons if reason is not None)
