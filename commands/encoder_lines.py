"""Describe encoders in words: what `encoders list` and `encoders info` print, and `doctor` about the encoder in use.

The described encoders are listed without importing torch.
"""

from __future__ import annotations

import textwrap
from importlib import metadata
from importlib.util import find_spec
from typing import Any

from configs.encoder_files import FOLDER_VARIABLE, find_release, release_folders, where_to_get
from configs.encoder_spec import TIMM, EncoderDescription, described_encoders, find_description, split_pooling
from configs.errors import UserError, listed, one_line

WIDTH = 110
_COLUMNS = ("name", "dim", "image", "parameters", "weights here", "licence", "has seen", "encoder")
# Networks of torchvision with auxiliary outputs, or without a linear layer at the end.
_UNUSABLE = ("googlenet", "inception_v3", "squeezenet1_0", "squeezenet1_1")
_POOLINGS = {"token": "the class token", "mean": "the mean of the patch tokens", "both": "class token, then mean"}


def encoder_records() -> list[dict[str, Any]]:
    """The described encoders as plain values, for `encoders list --json`."""
    records = []
    for name in described_encoders():
        description = find_description(name)
        if description is not None:
            here = _weights_here(description)
            records.append({"name": name, **description.model_dump(mode="json"), "weights_here": here and str(here)})
    return records


def encoder_rows() -> list[tuple[str, ...]]:
    """A table of the described encoders: a header, and one row for each."""
    rows: list[tuple[str, ...]] = [
        ("name", "dim", "image", "parameters", "weights here", "licence", "has seen", "encoder")
    ]
    for name in described_encoders():
        description = find_description(name)
        if description is not None:
            crop = description.preprocess.get("crop_px", "")
            weights = description.weights
            rows.append(
                (
                    name,
                    str(description.embedding_dim or ""),
                    "x".join(map(str, crop)) if isinstance(crop, list | tuple) else str(crop),
                    f"{description.parameters / 1e6:.1f} M" if description.parameters else "",
                    "yes" if _weights_here(description) else "no",
                    _short(weights.licence, 24) if weights is not None else "",
                    listed(list(description.pretrained_on), 1),
                    _short(description.title, 60),
                )
            )
    return rows


def _short(text: str, width: int) -> str:
    return textwrap.shorten(text, width, placeholder=" ...")


def other_encoders() -> list[str]:
    """Lines about the networks that are not described one by one."""
    lines = [
        "Also: torchvision's classification networks, under their names there (resnet50, convnext_tiny, ...), but not "
        f"{', '.join(_UNUSABLE)};"
    ]
    if find_spec("timm") is None:
        lines.append(f"and {TIMM}NAME for every network of timm, which is not installed (pip install -e '.[timm]').")
    else:
        version = metadata.version("timm")
        lines.append(f"and {TIMM}NAME or {TIMM}NAME.TAG for every network of timm {version}.")
    lines.append("`encoders info NAME` shows what is known about any of them.")
    return lines


def encoder_lines(name: str) -> list[str]:
    """Everything that is known about an encoder, in lines of at most WIDTH columns.

    Raises UserError if there is no such encoder, or a package that it needs is missing.
    """
    from stage1_cnn.encoders.registry import find_encoder

    entry = find_encoder(name)  # raises UserError naming the nearest name
    description = find_description(name)
    built = _built(name)
    title = description.title if description is not None else "a network of torchvision or of a plug-in"
    lines = [f"{name}: {title}"]
    lines += _section("", built)
    if description is not None:
        lines += _section("frames", _frames(description))
        lines += _section("weights", _weights(name, description, entry.pretrained is not None))
        lines += _section(
            "pretrained on data sets known here", [f"{k}: {v}" for k, v in description.pretrained_on.items()]
        )
        lines += _section("source", [description.source] if description.source else [])
        lines += _section("notes", list(description.notes))
    else:
        lines += _section("frames", ["as preprocess.* says; the encoder states no preparation of its own"])
        lines += _section("weights", _published(name))
    return lines


def _section(title: str, texts: list[str]) -> list[str]:
    """A title and its indented texts, after an empty line; nothing if there are no texts."""
    lines = ["", title] if title and texts else []
    for text in texts:
        lines += textwrap.wrap(
            text,
            WIDTH,
            initial_indent="  ",
            subsequent_indent="    ",
            break_long_words=False,
            break_on_hyphens=False,
        )
    return lines


def _weights_here(description: EncoderDescription) -> Any:
    return find_release(description.weights) if description.weights is not None else None


def _built(name: str) -> list[str]:
    """The dimension, parameters and poolings of a network, which is built without memory to count them."""
    import torch

    from stage1_cnn.encoders.backbone import bare_backbone

    description = find_description(name)
    texts = [f"name in settings and in --encoder: {name}"]
    try:
        with torch.device("meta"):
            backbone = bare_backbone(name)
    except UserError as error:
        texts.append(f"cannot be built here: {one_line(error, most=None)}")
    except NotImplementedError:  # a network that copies weights while it is built
        texts.append("dimension and parameters are known once it is built")
    else:
        count = sum(one.numel() for one in backbone.parameters())
        texts.append(f"embeddings of dimension {backbone.embedding_dim}; {count / 1e6:.2f} million parameters")
    if description is not None and description.poolings:
        base, chosen = split_pooling(name)
        first = None if base.startswith(TIMM) else description.poolings[0]
        texts += [] if first else [f"{base}: timm's own pooling (default)"]
        for one in description.poolings:
            state = " (default)" * (one == first) + " (chosen)" * (one == chosen)
            texts.append(f"{base}@{one}: {_POOLINGS[one]}{state}")
    return texts


def _frames(description: EncoderDescription) -> list[str]:
    if not description.preprocess:
        return ["as preprocess.* says; the encoder states no preparation of its own"]
    from configs.schema import PreprocessConfig
    from features.frames.settings_match import preprocess_words

    texts = [preprocess_words(PreprocessConfig.model_validate(description.preprocess))]
    texts += [f"stated by: {description.preprocess_from}"] if description.preprocess_from else []
    return [*texts, "these are the values of preprocess.* unless the settings give others"]


def _weights(name: str, description: EncoderDescription, has_published: bool) -> list[str]:
    weights = description.weights
    if weights is None:
        return _published(name) if has_published else ["no release is known; cnn.weights=FILE or random"]
    here = _weights_here(description)
    texts = [f"{weights.file}, licence: {weights.licence}", f"from {weights.url}"]
    texts += [f"in the package {weights.package}"] if weights.package else []
    texts += (
        [f"SHA-256 {weights.sha256}{'' if len(weights.sha256) == 64 else '... (first digits)'}"]
        if weights.sha256
        else []
    )
    texts += [weights.note] if weights.note else []
    if here is not None:
        return [*texts, f"on this machine: {here}"]
    if weights.package:
        return [*texts, f"not on this machine: {where_to_get(name, description)}"]
    folders = " or ".join(map(str, release_folders()))
    looked = f"not on this machine: put it into {folders} ({FOLDER_VARIABLE} names another folder)"
    return [*texts, f"{looked}, or name it: cnn.weights=FILE, in extract --weights FILE"]


def _published(name: str) -> list[str]:
    """Where published weights of a network that is not described are, and which images they were trained on."""
    from stage1_cnn.encoders.pretrained import published_weights

    try:
        published = published_weights(name)
    except UserError as error:
        return [one_line(error, most=None)]
    state = (
        "on this machine" if published.path.is_file() else "not on this machine, downloaded when they are first needed"
    )
    return [f"{published.path}: {state}", *([f"from {published.url}"] if published.url else []), published.trained_on]
