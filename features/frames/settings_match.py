"""Check that frame settings given by the user agree with those that a net or a feature folder was made with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from configs.encoder_spec import own_preprocess
from configs.errors import UserError
from configs.load import GivenKeys
from configs.schema import Config, PreprocessConfig, Size, height_width
from engine.progress import bars_are_hidden, say
from features.frames.preprocess import preprocess_from_json


def require_preprocess_of(
    net: PreprocessConfig, config: Config, given: GivenKeys, path: Path, fps: float | None = None, backbone: str = ""
) -> None:
    """Raise UserError if the user gave frame settings that differ from those of the net in `path`.

    The settings compared are `preprocess.*` and, if they are given, the sampling rate `fps` and the name of the
    `backbone`.
    """
    known: dict[str, Any] = {"data.fps": fps and float(fps), "cnn.backbone": backbone}
    made = _of_preprocess(net) | {key: value for key, value in known.items() if value}
    _require_same(made, config, given, path, ("this net takes", "import or train the net with it"))


def require_features_of(encoder: Mapping[str, Any], config: Config, given: GivenKeys, path: Path) -> None:
    """Raise UserError if `--set` gives frame settings that differ from those of the features in `path`.

    If `path` contains a net, the features are those that it was trained on. `encoder` is the record of how the features
    were made. Settings in a file are not compared, since they may be meant for other stages.
    """
    if given.by_set.isdisjoint({*_of_preprocess(config.preprocess), "data.fps", "cnn.backbone"}):
        return  # there is nothing to compare, and a record of an older version may not be readable
    net = preprocess_from_json(encoder["preprocess"], str(path))
    made = _of_preprocess(net) | {"data.fps": float(encoder["fps"]), "cnn.backbone": encoder["backbone"]}
    in_set = GivenKeys(given.by_set)
    _require_same(made, config, in_set, path, ("its features were made with", "run extract with it"))


def preprocess_words(config: PreprocessConfig) -> str:
    """How frames are prepared, in words."""
    if config.short_side_px is None:
        resized = f"resized to {_sides(config.resize_px)}"
    else:
        kept = _sides(config.resize_px)
        resized = f"resized to {config.short_side_px} on the shorter side, of which the centre {kept} is kept"
    crop = f", cropped to {_sides(config.crop_px)}" if config.crop_px != config.resize_px else ""
    mean, std = (", ".join(f"{value:g}" for value in values) for values in (config.mean, config.std))
    return f"{resized} ({config.interpolation}){crop}; mean {mean}, standard deviation {std}"


def _sides(size: Size) -> str:
    height, width = height_width(size)
    return f"{height} x {width}" if height == width else f"height {height} and width {width}"


def frames_note(config: Config) -> str | None:
    """One line on how frames are prepared for a described encoder, and whether that is as it was trained, else None."""
    own = own_preprocess(config.cnn.backbone)
    if not own:
        return None
    name, used = config.cnn.backbone, config.preprocess
    stated = PreprocessConfig.model_validate({**own, "cut_margin": used.cut_margin})
    differing = [key for key in type(used).model_fields if getattr(used, key) != getattr(stated, key)]
    if not differing:
        return f"frames for {name}: {preprocess_words(used)}, as its description states"
    given = ", ".join(f"preprocess.{key}={_plain(getattr(used, key))}" for key in differing)
    theirs = ", ".join(str(_plain(getattr(stated, key))) for key in differing)
    return f"note: frames are prepared with {given}; {name} was trained with {theirs}"


def say_frames_note(*configs: Config) -> None:
    """Print `frames_note` of each encoder once."""
    if not bars_are_hidden():
        for note in dict.fromkeys(filter(None, map(frames_note, configs))):
            say(note)


def _of_preprocess(preprocess: PreprocessConfig) -> dict[str, Any]:
    return {f"preprocess.{name}": getattr(preprocess, name) for name in type(preprocess).model_fields}


def _require_same(
    made: Mapping[str, Any], config: Config, given: GivenKeys, path: Path, words: tuple[str, str]
) -> None:
    asked = _of_preprocess(config.preprocess) | {"data.fps": config.data.fps, "cnn.backbone": config.cnn.backbone}
    general = {"data.fps", "cnn.backbone"} - given.by_set  # given in a file, these may be meant for other commands
    differing = [key for key in given.any_of(*made) if key not in general and asked[key] != made[key]]
    if differing:
        values = ", ".join(f"{key}={_plain(asked[key])}" for key in differing)
        own = ", ".join(str(_plain(made[key])) for key in differing)
        raise UserError(
            f"{path}: {values} given, but {words[0]} {own}; leave it out, or {words[1]} under another --name"
        )


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return f"{value:g}"
    return list(value) if isinstance(value, tuple) else value
