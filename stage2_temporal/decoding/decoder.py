"""Decode a video's probabilities frame by frame, or as a whole by the same steps."""

from __future__ import annotations

import math
from collections import deque
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from configs.errors import UserError
from configs.schema import DecodingConfig
from evaluation.metrics.counts import FloatArray
from stage2_temporal.decoding.calibration import log_probabilities, scaled
from stage2_temporal.decoding.fitted import TrackDecoding
from stage2_temporal.decoding.inference import Chains, ForwardFilter, Viterbi, smoothed


class Decision(NamedTuple):
    """The class of one frame, and the calibrated probabilities (C,) fp32 of all classes."""

    label: int
    probabilities: NDArray[np.float32]


class Decoder:
    """The decoder of one label track and one video.

    `step` takes the head's probabilities of the next frame and returns the decisions that are now final, in the order
    of the frames; `finish` returns the rest, and afterwards there are as many decisions as frames. With `mode=filter` a
    decision depends on the frame and those before it, and the class is the most probable one. With `mode=causal` the
    class depends on the `lag_s` seconds after the frame too, and the probabilities on nothing later than the frame.
    With `mode=offline` all decisions are made by `finish`, from the whole video. `settings.mode` is not `none`.
    """

    def __init__(self, fitted: TrackDecoding, settings: DecodingConfig, fps: float) -> None:
        self._fitted, self._fps, self._offline = fitted, fps, settings.mode == "offline"
        self._frames = 0
        self._filter = None if settings.mode == "calibrated" else ForwardFilter(fitted.graph, fps)
        self._viterbi: Viterbi | None = None
        if settings.mode in ("causal", "offline"):
            minimum = fitted.min_duration_s if settings.min_duration_s is None else settings.min_duration_s
            lag = None if self._offline else lag_frames(settings.lag_s, fps)
            self._viterbi = Viterbi(Chains.of(fitted.graph, fps, minimum), lag)
        self._posteriors: deque[FloatArray] = deque()  # of the frames without a decision, each (1, C)
        self._emissions: list[FloatArray] = []  # only offline

    def step(self, probabilities: ArrayLike) -> list[Decision]:
        """The decisions that are final with this frame, whose probabilities are (C,).

        Raises UserError if they are not finite, which would spoil all later decisions.
        """
        given = np.asarray(probabilities)
        if not np.isfinite(given).all():
            raise UserError(
                f"sampled frame {self._frames}: the net gave a probability that is not finite, so it has diverged, or "
                "its input is damaged"
            )
        self._frames += 1
        fitted, log_p = self._fitted, log_probabilities(given)[None]
        if self._filter is None:
            return [_most_probable(log_p, fitted.temperature)]
        emission = fitted.emissions(log_p, self._fps, fitted.filter_kappa)
        posterior = self._filter.step(emission)
        if self._viterbi is None:
            return [_most_probable(log_probabilities(posterior), fitted.filter_temperature)]
        self._posteriors.append(posterior)
        if self._offline:
            self._emissions.append(emission)
        decided = self._viterbi.step(fitted.emissions(log_p, self._fps, fitted.viterbi_kappa))
        return [] if decided is None else [self._decision(int(decided[0]), fitted.filter_temperature)]

    def finish(self) -> list[Decision]:
        """The decisions of the remaining frames, at the end of the video."""
        if self._viterbi is None:
            return []
        temperature = self._fitted.filter_temperature
        if self._emissions:
            past = np.stack(list(self._posteriors))
            self._posteriors = deque(smoothed(self._fitted.graph, self._fps, np.stack(self._emissions), past))
            temperature = self._fitted.smoother_temperature
        return [self._decision(int(one[0]), temperature) for one in self._viterbi.finish()]

    def state(self) -> dict[str, Any]:
        """What the decoder remembers of the frames so far, as plain containers and arrays."""
        return {
            "frames": self._frames,
            "filter": self._filter and self._filter.state(),
            "viterbi": self._viterbi and self._viterbi.state(),
            "posteriors": list(self._posteriors),
            "emissions": list(self._emissions),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from `state`, which a decoder with the same parameters, settings and rate returned."""
        self._frames = state["frames"]
        self._posteriors, self._emissions = deque(state["posteriors"]), list(state["emissions"])
        if self._filter is not None:
            self._filter.restore(state["filter"])
        if self._viterbi is not None:
            self._viterbi.restore(state["viterbi"])

    def _decision(self, label: int, temperature: float) -> Decision:
        posterior = self._posteriors.popleft()[0]
        return Decision(label, scaled(log_probabilities(posterior), temperature).astype(np.float32))


def lag_frames(lag_s: float, fps: float) -> int:
    """How many frames at `fps` a lag has: never more than `lag_s` seconds."""
    return math.floor(lag_s * fps + 1e-9)


def _most_probable(log_p: FloatArray, temperature: float) -> Decision:
    """The most probable class of log-probabilities (1, C), and the probabilities at a temperature."""
    found = scaled(log_p, temperature)[0]
    return Decision(int(found.argmax()), found.astype(np.float32))


def decode(
    fitted: TrackDecoding, settings: DecodingConfig, fps: float, probabilities: NDArray[np.floating]
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Labels (T,) and probabilities (T, C) of a whole video, of which the head's probabilities are (T, C)."""
    decoder = Decoder(fitted, settings, fps)
    found = [decision for frame in probabilities for decision in decoder.step(frame)] + decoder.finish()
    labels = np.array([one.label for one in found], dtype=np.int8)
    values = [one.probabilities for one in found]
    return labels, np.stack(values) if values else np.zeros(probabilities.shape, np.float32)
