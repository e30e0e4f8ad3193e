"""What an exported model says about itself in its metadata: classes, preprocessing, state, decoding and hashes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from configs.errors import UserError
from configs.schema import MAIN_TRACK, height_width
from engine.runs import package_version
from features.frames.preprocess import preprocess_json
from live.export.frame_net import FrameNet
from live.nets import Nets
from stage2_temporal.decoding.chosen import ChosenDecoding
from stage2_temporal.decoding.decoder import lag_frames

FORMAT = 1
IMAGE = "frame"  # the input
TOOLS, EMBEDDING = "tools", "embedding"  # outputs
USE = (
    "Frames come at `fps`. Run the model once per frame, with the state that the frame before gave; a video starts "
    "with zeros. For research only, not a medical device."
)
STEPS = (
    "RGB; cut off the black margin if there is a rule `cut_margin`; `resize`, to `resize_px`; cut out the centre of "
    "`crop_px`, with offset (resize_px - crop_px) // 2; divide by 255; subtract `mean`, divide by `std`; float32, "
    "channels first"
)


def describe(nets: Nets, net: FrameNet) -> dict[str, Any]:
    """The metadata of the model that `net` becomes, as JSON.

    Raises UserError for a decoding that needs whole videos.
    """
    if nets.decoding is not None and nets.decoding.settings.mode == "offline":
        raise UserError(
            "temporal.decoding.mode=offline needs whole videos, and an exported model gets single frames; choose "
            "--decoding filter or causal"
        )
    smoothing_s, fps = nets.tool_smoothing_s, nets.config.data.fps
    return {
        "format": FORMAT,
        "surgstage": package_version("surgstage"),
        "use": USE,
        "dataset": nets.spec.name,
        "fps": fps,
        "image": {"input": IMAGE, "shape": [1, 3, *height_width(nets.config.preprocess.crop_px)]},
        "preprocess": {"steps": STEPS, **preprocess_json(nets.config.preprocess)},
        "tracks": [
            {"track": track, "output": track_output(track), "classes": list(classes)}
            for track, classes in classes_of(nets).items()
        ],
        "tools": {"output": TOOLS, "classes": list(nets.spec.tools)} if recognises_tools(nets) else None,
        "embedding": {"output": EMBEDDING, "rounded_to": nets.parts.storage if nets.parts else None},
        "state": [
            {
                "input": f"state_{at}",
                "output": f"next_state_{at}",
                "shape": list(one.shape),
                "type": type_name(one.dtype),
            }
            for at, one in enumerate(net.zero_state)
        ],
        "inference": nets.inference,
        "clip_frames": net.clip_frames if nets.inference == "clip" else None,
        "tool_smoothing": {"time_s": smoothing_s, "keep": math.exp(-1 / (fps * smoothing_s))} if smoothing_s else None,
        "decoding": None if nets.decoding is None else decoding_json(nets.decoding, fps),
        "hashes": nets.weights,
    }


def outputs_of(about: Mapping[str, Any]) -> list[str]:
    """The names of the outputs before the state, in the order of `FrameNet`."""
    tools = [] if about["tools"] is None else [about["tools"]["output"]]
    return [*(one["output"] for one in about["tracks"]), *tools, about["embedding"]["output"]]


def recognises_tools(nets: Nets) -> bool:
    """Whether the encoder has a tool head, or there is a probe."""
    return nets.parts is not None and (nets.parts.tool_head is not None or nets.parts.probe is not None)


def classes_of(nets: Nets) -> dict[str, tuple[str, ...]]:
    """The classes of each label track, phases first."""
    return {MAIN_TRACK: nets.spec.phases, **{track: nets.spec.tracks[track].classes for track in nets.tracks}}


def track_output(track: str) -> str:
    """The name of the output with the probabilities of a label track."""
    return track if track == MAIN_TRACK else f"track_{track}"


def type_name(dtype: Any) -> str:
    """The name of a type as in NumPy: `float32`."""
    return str(dtype).removeprefix("torch.")


def decoding_json(chosen: ChosenDecoding, fps: float) -> dict[str, Any]:
    """The constants of docs/decoding.md at `fps`, by track: what was fitted, and the tables that follow from it."""
    settings, tracks = chosen.settings, {}
    for name, fitted in chosen.fitted.tracks.items():
        minimum = fitted.min_duration_s if settings.min_duration_s is None else settings.min_duration_s
        chain = fitted.graph.chain_frames(minimum, fps)
        tracks[name] = {
            "temperature": fitted.temperature,
            "graph": fitted.graph.to_json(),
            "filter": {
                "kappa": fitted.filter_kappa,
                "weight": min(1.0, fitted.filter_kappa / fps),
                "temperature": fitted.filter_temperature,
                "matrix": fitted.graph.matrix(fps).tolist(),
            },
            "viterbi": {
                "kappa": fitted.viterbi_kappa,
                "weight": min(1.0, fitted.viterbi_kappa / fps),
                "min_duration_s": minimum,
                "chain_frames": chain.tolist(),
                "leaving": fitted.graph.leaving(fps, chain).tolist(),
            },
        }
    lag = lag_frames(settings.lag_s, fps) if settings.mode == "causal" else 0
    return {"mode": settings.mode, "lag_frames": lag, "fitted_sha256": chosen.sha256, "tracks": tracks}
