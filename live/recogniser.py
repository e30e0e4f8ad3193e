"""Phases and tools recognised frame by frame, in constant memory: the one way in which new videos are recognised."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from configs.errors import UserError, one_line
from configs.schema import MAIN_TRACK
from evaluation.metrics.tools import sigmoid
from features.frames.preprocess import Geometry
from live.margin import RunningGeometry
from live.nets import Nets
from live.plain import from_plain, to_plain
from live.sampling import Sampler, Shown
from stage2_temporal.decoding.decoder import Decision, Decoder
from stage2_temporal.decoding.tools import ToolSmoother
from stage2_temporal.predict import OnlinePredictor

Record = Callable[[str, float], None]  # takes a part of the computation, and the seconds that it took
PARTS = ("preprocess", "encoder", "head", "decoding")


class TrackRecognition(NamedTuple):
    """The class of a frame in one label track, its name, when it began, and the probabilities (C,) of all classes."""

    label: int
    name: str
    since_s: float
    probabilities: NDArray[np.float32]


@dataclass(frozen=True)
class Recognition:
    """What is recognised in one sampled frame, which has this number in its source and is shown at `time_s`.

    `tools` (K,) are probabilities; None if no net recognises tools. `delay_s` is how much later than the frame the
    newest frame was shown that had to be awaited, because of a lag of decoding or to know that the frame is sampled;
    the time of the computation is not part of it.
    """

    frame: int
    time_s: float
    main: TrackRecognition
    tools: NDArray[np.float32] | None
    delay_s: float
    tracks: dict[str, TrackRecognition]  # additional label tracks

    @property
    def phase(self) -> int:
        return self.main.label

    @property
    def phase_name(self) -> str:
        return self.main.name

    @property
    def since_s(self) -> float:
        """When the current phase began."""
        return self.main.since_s

    @property
    def probabilities(self) -> NDArray[np.float32]:
        """Those of the phases, (C,)."""
        return self.main.probabilities


class PhaseRecogniser:
    """Recognises the phases and tools of one video, frame by frame.

    `push` takes the frames of a video as they are shown, and returns what is now recognised. That concerns the sampled
    frames only, and can be an earlier one: sampling may have to await the next frame, and decoding has a lag. Then
    `finish` returns the rest. `recognise` takes frames that are sampled and resized already, and gives exactly the
    same; it encodes them together, which is faster for stored videos. Cost and memory of a frame do not depend on the
    number of frames so far, except with `temporal.decoding.mode=offline`, whose decisions are all made by `finish`.
    `fixed` cuts and resizes as for a stored video, and `record` gets the seconds of each of `PARTS`.
    """

    def __init__(self, nets: Nets, fixed: Geometry | None = None, record: Record = lambda part, seconds: None) -> None:
        self.nets, self._record = nets, record
        self._fps = nets.config.data.fps
        self._geometry = RunningGeometry(nets.config.preprocess, fixed)
        self._online = OnlinePredictor(nets.phase, nets.inference, nets.clip_frames, nets.config.device)
        tracks = {name: nets.spec.tracks[name].classes for name in nets.tracks}
        self.classes: dict[str, Sequence[str]] = {MAIN_TRACK: nets.spec.phases, **tracks}
        self.reset()

    def reset(self) -> None:
        """Start a new video: forget the frames so far."""
        decoding = self.nets.decoding
        self.sampler: Sampler[Any] = Sampler(self._fps)
        self.last: tuple[int, float] | None = None  # number and time of the last sampled frame
        self._geometry.reset()
        self._online.reset()
        self._smoother = ToolSmoother(self.nets.tool_smoothing_s, self._fps)
        self._decoders: dict[str, Decoder] = (
            {track: decoding.decoder(track, self._fps) for track in self.classes} if decoding else {}
        )
        # frames without a decision, with the probabilities (K,) of their tools
        self._undecided: deque[tuple[int, float, NDArray[np.float32] | None]] = deque()
        self._segments: dict[str, tuple[int, float]] = {}  # by track: the current class, and when it began

    def push(self, frame: NDArray[np.uint8], time_s: float, number: int | None = None) -> list[Recognition]:
        """Take a frame (H, W, 3) uint8 RGB that is shown from `time_s` on, in seconds from any fixed moment.

        `number` is its number in the source, by default counted from 0. Frames that are late or repeated change
        nothing; `counts` has their number. Raises UserError if `time_s` or a probability is not finite.
        """
        number = self.sampler.counts.frames if number is None else number
        found = self.sampler.push(number, time_s, frame)
        return [one for shown in found for one in self.take(shown, time_s)]

    def take(self, shown: Shown[NDArray[np.uint8]], now_s: float) -> list[Recognition]:
        """Take a frame that is sampled already; `now_s` is when the newest frame is shown that was awaited for it."""
        return self.recognise(self.resize(shown.picture), [shown.number], [shown.time_s], now_s)

    def resize(self, frame: NDArray[np.uint8]) -> Tensor:
        """Cut and resize the next sampled frame, (H, W, 3) -> (1, R, R, 3) uint8, as `recognise` takes it."""
        with self._timed("preprocess"):
            return torch.from_numpy(self._geometry.resize(frame))[None]

    def recognise(
        self, frames: Tensor, numbers: Iterable[int], times_s: Iterable[float], now_s: float | None = None
    ) -> list[Recognition]:
        """Take sampled frames (N, R, R, 3) uint8, resized, with their numbers in the source and times."""
        with self._timed("encoder"):
            embedding, logits = self.nets.encode(frames)  # (N, D), (N, K)
        with self._timed("head"):
            probabilities = [self._online.step(one) for one in embedding]
        with self._timed("decoding"):
            tools = [None] * len(probabilities) if logits is None else list(self._smoother.step(sigmoid(logits)))
            found = []
            for number, time_s, values, of_tools in zip(numbers, times_s, probabilities, tools, strict=True):
                kept = None if of_tools is None else of_tools.astype(np.float32)
                self._undecided.append((number, time_s, kept))
                self.last = (number, time_s)
                found += self._decided(self._decisions(values), time_s if now_s is None else now_s)
        return found

    def finish(self, end_s: float | None = None) -> list[Recognition]:
        """The rest, at the end of the video. The last frame is shown until `end_s` (None: not beyond its own time)."""
        found = [one for shown in self.sampler.finish(end_s) for one in self.take(shown, shown.time_s)]
        if self.last is not None:
            with self._timed("decoding"):
                found += self._decided(self._remaining(), self.last[1])
        return found

    def _remaining(self) -> list[tuple[Decision, ...]]:
        """The decisions, one per track, of the frames that have none yet, at the end of the video."""
        return list(zip(*(decoder.finish() for decoder in self._decoders.values()), strict=True))

    def _decisions(self, values: NDArray[np.float32]) -> list[tuple[Decision, ...]]:
        """The decisions, one per track, that are final with the next frame's probabilities (C,) of all tracks."""
        parts = [part[0] for part in self.nets.by_track(values[None])]
        if not self._decoders:
            return [tuple(Decision(int(part.argmax()), part) for part in parts)]
        each = [decoder.step(part) for decoder, part in zip(self._decoders.values(), parts, strict=True)]
        return list(zip(*each, strict=True))

    def _decided(self, decisions: Sequence[tuple[Decision, ...]], now_s: float) -> list[Recognition]:
        found = []
        for of_tracks in decisions:
            number, time_s, tools = self._undecided.popleft()
            tracks = {}
            for (track, classes), one in zip(self.classes.items(), of_tracks, strict=True):
                label, begun_s = self._segments.get(track, (-1, time_s))
                since_s = begun_s if label == one.label else time_s
                self._segments[track] = (one.label, since_s)
                tracks[track] = TrackRecognition(one.label, classes[one.label], since_s, one.probabilities)
            main = tracks.pop(MAIN_TRACK)
            found.append(Recognition(number, time_s, main, tools, max(now_s - time_s, 0.0), tracks))
        return found

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self._record(part, time.perf_counter() - begun)

    # ------------------------------------------------------------------------------------------ saved state

    def state(self) -> dict[str, Any]:
        """Everything that later frames need of those so far, as plain containers and tensors (`save_checkpoint`)."""
        return {
            "made_by": self.nets.identity,
            "sampler": self.sampler.state(None if self.last is None else self.last[1]),
            "last": self.last,
            **to_plain(
                {
                    "margin": self._geometry.state(),
                    "head": self._online.state(),
                    "smoother": self._smoother.state(),
                    "decoders": {track: decoder.state() for track, decoder in self._decoders.items()},
                    "undecided": list(self._undecided),
                    "segments": dict(self._segments),
                }
            ),
        }

    def restore(self, state: dict[str, Any], where: str) -> None:
        """Continue after the last frame of `state`; `where` names it in errors.

        Raises UserError if the state is damaged or of other nets or settings; this recogniser is then reset.
        """
        if state.get("made_by") != self.nets.identity:
            raise UserError(f"{where}: saved with another net or other settings; use those again, or delete it")
        try:
            self._restore(state)
            self._restore(self._tried(state))
        except Exception as error:  # whatever a damaged state may contain
            self.reset()
            raise UserError(f"{where}: damaged ({one_line(error)}); delete it to begin anew") from error

    def _restore(self, state: dict[str, Any]) -> None:
        self.reset()
        self.sampler.restore(state["sampler"])
        last = state["last"]
        self.last = None if last is None else (int(last[0]), float(last[1]))
        found = from_plain({name: state[name] for name in state if name not in ("made_by", "sampler", "last")})
        self._geometry.restore(found["margin"])
        self._online.restore({name: _tensors(values) for name, values in found["head"].items()})
        self._smoother.restore(found["smoother"])
        for track, decoder in self._decoders.items():
            decoder.restore(found["decoders"][track])
        self._undecided = deque((int(number), float(time_s), tools) for number, time_s, tools in found["undecided"])
        self._segments = {track: (int(label), float(begun_s)) for track, (label, begun_s) in found["segments"].items()}

    def _tried(self, state: dict[str, Any]) -> dict[str, Any]:
        """The same state, after a step from it has been tried, which fails if shapes or values are impossible."""
        width = len(self.nets.phase.standardise.mean)
        values = self._online.step(torch.zeros(width))
        if not np.isfinite(values).all():
            raise ValueError("the head's state is not finite")
        tools = None if not self._undecided else self._undecided[-1][2]
        self._undecided.append((0, 0.0, tools))
        if tools is not None:
            self._smoother.step(np.zeros((1, len(tools))))
        self.last = (0, 0.0)
        self._decided(self._decisions(values), 0.0)
        self._decided(self._remaining(), 0.0)
        if self._undecided:
            raise ValueError("there are frames that no decoder awaits")
        return state


def _tensors(values: Any) -> Any:
    """Arrays as tensors, in the containers of `OnlinePredictor.state`."""
    if isinstance(values, np.ndarray):
        return torch.from_numpy(values)
    return tuple(map(_tensors, values)) if isinstance(values, (list, tuple)) else values
