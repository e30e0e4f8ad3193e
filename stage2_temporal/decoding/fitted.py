"""The fitted decoding of a run, `decoding.json`: for each label track a transition graph and the parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from configs.errors import UserError, one_line
from configs.schema import Inference
from engine.files import read_json, sha256_file, write_json
from engine.records import Record
from engine.runs import BEST_FILE
from evaluation.metrics.counts import FloatArray
from stage2_temporal.decoding.calibration import log_probabilities, scaled
from stage2_temporal.decoding.graph import TransitionGraph

DECODING_FILE = "decoding.json"
MAX_MIN_DURATION_S = 600.0


@dataclass(frozen=True, kw_only=True)
class ValidationScores(Record):
    """Results on the validation videos: accuracy (percent, mean over videos) and false transitions per hour."""

    accuracy: float
    false_transitions_per_h: float


@dataclass(frozen=True, kw_only=True)
class TrackDecoding(Record):
    """The decoding of one label track.

    `temperature` is that of the head. `filter_kappa` and `viterbi_kappa` are the weights of the evidence of one second,
    and `min_duration_s` is the minimum duration of a segment of Viterbi's path. The posteriors of filter and smoother
    have temperatures of their own. `undecoded`, `filter` and `causal` are the results on the validation videos without
    decoding and with these modes; None without validation videos.
    """

    classes: tuple[str, ...]
    temperature: float = 1.0
    filter_kappa: float
    viterbi_kappa: float
    min_duration_s: float
    filter_temperature: float = 1.0
    smoother_temperature: float = 1.0
    graph: TransitionGraph
    undecoded: ValidationScores | None = None
    filter: ValidationScores | None = None
    causal: ValidationScores | None = None

    def emissions(self, log_p: FloatArray, fps: float, kappa: float) -> FloatArray:
        """The log-emissions (..., C) of the head's log-probabilities (..., C) of frames at `fps`."""
        found: FloatArray = min(1.0, kappa / fps) * log_probabilities(scaled(log_p, self.temperature))
        return found

    def check(self, classes: Sequence[str]) -> None:
        """Raise ValueError unless the values are possible and those of `classes`."""
        if self.classes != tuple(classes):
            raise ValueError(f"its classes are {', '.join(self.classes)}, not {', '.join(classes)}")
        self.graph.require_classes(len(classes))
        if not all(self.graph.mean_s):
            raise ValueError("mean_s must be positive")
        limits = {
            "temperature": (0.01, 100.0),
            "filter_temperature": (0.01, 100.0),
            "smoother_temperature": (0.01, 100.0),
            "filter_kappa": (1e-6, 1e6),
            "viterbi_kappa": (1e-6, 1e6),
            "min_duration_s": (0.0, MAX_MIN_DURATION_S),
        }
        for name, (low, high) in limits.items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} must be from {low:g} to {high:g}")


@dataclass(frozen=True, kw_only=True)
class FittedDecoding(Record):
    """The content of `decoding.json`.

    `weights_sha256` is the hash of the checkpoint whose probabilities were used. The graphs were learnt from the labels
    of the videos `train`, and the parameters fitted on those of `val`, at `fps` and with `inference` (None in files of
    earlier versions: that of the training).
    """

    weights_sha256: str
    fps: float
    train: tuple[str, ...]
    val: tuple[str, ...]
    tracks: Mapping[str, TrackDecoding]
    inference: Inference | None = None

    def write(self, folder: Path) -> None:
        """Write `decoding.json` into the folder of stage two."""
        write_json(folder / DECODING_FILE, self.to_json())


def load_decoding(folder: Path, tracks: Mapping[str, Sequence[str]]) -> FittedDecoding:
    """The fitted decoding in a folder of stage two, for a net with these classes of each track.

    Raises UserError if there is none, as in runs of earlier versions, or if it is damaged or of another checkpoint.
    """
    path = folder / DECODING_FILE
    again = "run train-temporal again with the run's settings, which only fits the decoding if the run is finished"
    if not path.is_file():
        raise UserError(f"{path}: no such file, so there is no decoding; {again}")
    try:
        content = read_json(path)
    except UserError as error:
        raise UserError(f"{error}; {again}") from error
    try:
        found = FittedDecoding.from_json(content)
        if found.to_json() != content:
            raise ValueError("a value has another type, or is not known")
        if set(found.tracks) != set(tracks):
            raise ValueError(f"its tracks are {', '.join(found.tracks)}")
        for name, classes in tracks.items():
            found.tracks[name].check(classes)
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: damaged ({one_line(error)}); {again}") from error
    if found.weights_sha256 != sha256_file(folder / BEST_FILE):
        raise UserError(f"{path}: fitted to another checkpoint than {BEST_FILE}; {again}")
    return found
