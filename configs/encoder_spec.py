"""Descriptions of encoders: what each network is, how its training images were prepared, and where its weights are.

One YAML file per named encoder, `configs/encoders/NAME.yaml`, read without importing torch. The networks themselves are
built by the families in `stage1_cnn/encoders/networks/`.

An encoder's name may end in `@token`, `@mean` or `@both`, which chooses how the outputs of a transformer become one
embedding (`split_pooling`).
"""

from __future__ import annotations

import functools
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field

DESCRIPTIONS = Path(__file__).resolve().parent / "encoders"
TIMM = "timm:"  # prefix of the names of timm's networks
Pooling = Literal["token", "mean", "both"]
POOLINGS: tuple[Pooling, ...] = ("token", "mean", "both")
_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]*")
_TIMM_NAME = re.compile(r"[A-Za-z0-9]\w*(\.[\w-]+)?", re.ASCII)  # no path and no `hf-hub:`, which timm would download
# timm's modules of networks whose tokens, after the class token, can be pooled in other ways
_WITH_TOKENS = ("vision_transformer", "deit", "eva", "vision_transformer_hybrid", "beit", "cait", "convit", "xcit")
# and of those that interpolate their position embeddings
_INTERPOLATING = ("vision_transformer", "deit", "eva", "vision_transformer_hybrid")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class WeightsDescription(_Strict):
    """A release of weights. `sha256` is the hash of the file, or its first digits; None if no one has published it."""

    file: str = Field(description="name of the file in the release")
    url: str
    licence: str
    sha256: str | None = None
    package: str | None = None  # Python package that contains the file
    note: str = ""  # for example how to unpack the file


class EncoderDescription(_Strict):
    """An encoder with a name of its own.

    `family` is the file in `stage1_cnn/encoders/networks/` that builds `network`. `embedding_dim` belongs to the first
    of the `poolings`, which is the release's own. `preprocess` contains values of the settings `preprocess.*`.
    """

    title: str
    family: str
    network: str
    embedding_dim: int | None = None  # None: known when the network is built
    parameters: int | None = None
    poolings: tuple[Pooling, ...] = ()
    preprocess: dict[str, Any] = {}
    preprocess_from: str = ""  # which document of the release states it, or that none does
    weights: WeightsDescription | None = None
    pretrained_on: dict[str, str] = {}  # data sets, by name in `configs/datasets`, with the videos used in pretraining
    source: str = ""  # repository and commit, or paper, that defines the network
    notes: tuple[str, ...] = ()


def split_pooling(name: str) -> tuple[str, Pooling | None]:
    """Return an encoder's name without its pooling, and the pooling: `dinov2_vits14@mean` -> (dinov2_vits14, mean)."""
    base, _, suffix = name.rpartition("@")
    for pooling in POOLINGS:
        if base and suffix == pooling:
            return base, pooling
    return name, None


def described_encoders() -> list[str]:
    """Return the names of the described encoders, sorted."""
    return sorted(path.stem for path in DESCRIPTIONS.glob("*.yaml"))


@functools.cache
def find_description(name: str) -> EncoderDescription | None:
    """Return the description of the encoder `name` (with or without a pooling), or None if there is none.

    A description of one of timm's networks is made from timm's own; None if timm is not installed or has no such
    network.
    """
    base, _ = split_pooling(name)
    if base.startswith(TIMM):
        return _of_timm(base.removeprefix(TIMM))
    path = DESCRIPTIONS / f"{base}.yaml"
    if not _NAME.fullmatch(base) or not path.is_file():
        return None
    return EncoderDescription.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))


def own_preprocess(name: str) -> dict[str, Any]:
    """Return how the frames of an encoder are prepared, as values of `preprocess.*`; empty if it does not say."""
    description = find_description(name)
    return {} if description is None else dict(description.preprocess)


def needs_missing_timm(name: str) -> bool:
    """Whether nothing is known about an encoder because timm, whose network it is, is not installed."""
    return name.startswith(TIMM) and find_spec("timm") is None


def _of_timm(network: str) -> EncoderDescription | None:
    """The description of timm's network `NAME` or `NAME.TAG`, whose tag stands for one release of weights."""
    try:
        from timm.models import get_pretrained_cfg, is_model, is_model_in_modules
    except ImportError:
        return None
    if not _TIMM_NAME.fullmatch(network):
        return None
    try:
        config = get_pretrained_cfg(network, allow_unregistered=False)
    except RuntimeError:  # there is no such tag
        return None
    if config is None or not is_model(network):
        return None
    return EncoderDescription(
        title=f"{network} of timm",
        family="timm",
        network=network,
        poolings=POOLINGS if is_model_in_modules(network, _WITH_TOKENS) else (),
        preprocess=_preprocess_of_timm(config),
        preprocess_from="timm's configuration of these weights"
        + (", without its padding" if config.crop_mode == "border" or config.crop_pct > 1 else ""),
        source=str(config.paper_name or "timm"),
        notes=_notes_of_timm(config, is_model_in_modules(network, _INTERPOLATING)),
    )


def _notes_of_timm(config: Any, interpolating: bool) -> tuple[str, ...]:
    size = "x".join(map(str, config.input_size[1:]))
    if not config.fixed_input_size:
        return ()
    if interpolating:
        return (f"position embeddings, if it has them, are those of {size} pixels and interpolated to other sizes",)
    return (f"made for images of {size} pixels",)


def _preprocess_of_timm(config: Any) -> dict[str, Any]:
    """timm's preprocessing of evaluation images: its `create_transform`, with Pillow."""
    _, height, width = config.input_size
    crop: int | tuple[int, int] = height if height == width else (height, width)
    found: dict[str, Any] = {"crop_px": crop, "mean": tuple(config.mean), "std": tuple(config.std)}
    found["interpolation"] = "bilinear" if config.interpolation == "bilinear" else "bicubic"
    if config.crop_mode == "squash" or height != width:
        resized = [int(side / config.crop_pct) for side in (height, width)]
        return {**found, "resize_px": resized[0] if resized[0] == resized[1] else tuple(resized)}
    short = int(height / min(config.crop_pct, 1))  # above 1, timm pads the frame, which is not possible here
    # the stored centre has the crop's parity, so that both centres are the same
    return {**found, "short_side_px": short, "resize_px": short - (short - height) % 2}
