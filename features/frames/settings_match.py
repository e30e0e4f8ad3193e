"""Whether the frame settings that the user gave are those that a net or a folder of features was made with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from configs.errors import UserError
from configs.load import GivenKeys
from configs.schema import Config, PreprocessConfig
from features.frames.preprocess import preprocess_from_json


def require_preprocess_of(
    net: PreprocessConfig, config: Config, given: GivenKeys, path: Path, fps: float | None = None, backbone: str = ""
) -> None:
    """Raise UserError if the user gave frame settings that differ from those of the net in `path`.

    Compared are the settings `preprocess.*` and, where known, the sampling rate `fps` and the backbone's name.
    """
    known: dict[str, Any] = {"data.fps": fps and float(fps), "cnn.backbone": backbone}
    made = _of_preprocess(net) | {key: value for key, value in known.items() if value}
    _require_same(made, config, given, path, ("this net takes", "import or train the net with it"))


def require_features_of(encoder: Mapping[str, Any], config: Config, given: GivenKeys, path: Path) -> None:
    """Raise UserError if `--set` gives frame settings that differ from those of the features in `path`, or of the
    features that its net was trained on; `encoder` is the record of how they were made. Settings in a file may be meant
    for other stages and are not compared."""
    if given.by_set.isdisjoint({*_of_preprocess(config.preprocess), "data.fps", "cnn.backbone"}):
        return  # nothing to compare, and the record may be an older one
    net = preprocess_from_json(encoder["preprocess"], str(path))
    made = _of_preprocess(net) | {"data.fps": float(encoder["fps"]), "cnn.backbone": encoder["backbone"]}
    in_set = GivenKeys(given.by_set)
    _require_same(made, config, in_set, path, ("its features were made with", "run extract with it"))


def _of_preprocess(preprocess: PreprocessConfig) -> dict[str, Any]:
    return {f"preprocess.{name}": getattr(preprocess, name) for name in type(preprocess).model_fields}


def _require_same(
    made: Mapping[str, Any], config: Config, given: GivenKeys, path: Path, words: tuple[str, str]
) -> None:
    asked = _of_preprocess(config.preprocess) | {"data.fps": config.data.fps, "cnn.backbone": config.cnn.backbone}
    general = {"data.fps", "cnn.backbone"} - given.by_set  # in a file they may be meant for other commands
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
