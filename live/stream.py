"""Recognition while a source runs: read, recognise, write, and keep what a restart needs."""

from __future__ import annotations

import os
import sys
import time
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from configs.errors import UserError, one_line
from engine.checkpoints import load_checkpoint, save_checkpoint
from engine.files import write_json
from engine.progress import say
from engine.stopping import Stopped, StopRequest
from features.video.base import ReaderError
from live.capture import Capture, Taken
from live.latency import Latencies
from live.nets import Nets
from live.outputs import InputFile, LineFile, frame_of_json, frame_of_row, header_row, to_line, to_row
from live.recogniser import PARTS, PhaseRecogniser, Recognition
from live.recording import Recording
from live.sampling import Counts
from live.sources.base import Begin, Source, SourceLost

KIND = "stream"
SAVE_EVERY_S = 10.0
_WAIT_S = 0.2  # how long a signal may have to wait
_LONGEST_GAP_S = 7 * 86400.0  # a machine whose clock was set wrong must not make times absurd


@dataclass(frozen=True)
class StreamFiles:
    """The files of a stream, each None if it is not wanted."""

    jsonl: Path | None = None
    csv: Path | None = None
    record: Path | None = None
    dump_input: Path | None = None
    state: Path | None = None
    report: Path | None = None


@dataclass
class StreamReport:
    """What happened in a stream, and how long each part took."""

    source: str
    counts: Counts = field(default_factory=Counts)
    recognised: int = 0
    dropped: int = 0
    lost: str | None = None
    faults: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    latencies: Latencies = field(default_factory=lambda: Latencies(("capture", "decode", *PARTS, "total")))

    def to_json(self) -> dict[str, Any]:
        found = {"source": self.source, **self.counts.to_json(), "recognised": self.recognised, "dropped": self.dropped}
        return {**found, **self.faults, "seconds": round(self.seconds, 3), "latency": self.latencies.to_json()}

    def sentence(self) -> str:
        """The outcome in one line."""
        others = {**self.counts.to_json(), "dropped": self.dropped, **self.faults}
        shown = ("late", "repeated", "missed", "dropped", "damaged", "reconnects", "clock_leaps")
        more = "".join(f", {others[name]} {name.replace('_', ' ')}" for name in shown if others.get(name))
        return f"{self.recognised} of {self.counts.frames} frames recognised{more} in {self.seconds:.1f} s"


class _Outputs:
    """What is written while a stream runs: a line per recognition, to standard output and files, and nets' input."""

    def __init__(self, nets: Nets, files: StreamFiles, resumes: bool, stack: ExitStack) -> None:
        for path in (files.record, files.dump_input):
            if path is not None and path.exists():
                raise UserError(f"{path}: exists; name another file")
        self._spec, self._files = nets.spec, list[tuple[LineFile, bool]]()  # whether it has lines of JSON
        if files.jsonl is not None:
            self._files.append((LineFile(files.jsonl, frame_of_json, resumes), True))
        if files.csv is not None:
            self._files.append((LineFile(files.csv, frame_of_row, resumes, header_row(nets.spec, nets.tools)), False))
        for one, _ in self._files:
            stack.enter_context(closing(one))
        preprocess = nets.config.preprocess
        self._inputs = None if files.dump_input is None else InputFile(files.dump_input, preprocess)
        if self._inputs is not None:
            stack.enter_context(closing(self._inputs))
        fps = nets.config.data.fps
        self._recording = None if files.record is None else Recording(files.record, nets.spec, fps)
        if self._recording is not None:
            stack.enter_context(closing(self._recording))

    @property
    def last_frame(self) -> int:
        """The last frame that a continued file has; -1 if there is none."""
        return max((one.last_frame for one, _ in self._files), default=-1)

    def write_input(self, resized: Tensor) -> None:
        """Write the frames (N, R, R, 3) that the nets get."""
        if self._inputs is not None:
            self._inputs.write(resized)

    def write(self, one: Recognition, delay_s: float) -> None:
        """Write a recognition. Raises UserError if standard output has been closed by its reader."""
        line = to_line(one, self._spec, delay_s)
        try:
            sys.stdout.write(line)
            sys.stdout.flush()
        except BrokenPipeError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing is written at exit either
            raise UserError("standard output: its reader has gone, so the stream ends") from error
        for file, is_json in self._files:
            file.write(one.frame, line if is_json else to_row(one))
        if self._recording is not None:
            self._recording.recognised(one)

    def record(self, frame: NDArray[np.uint8], time_s: float) -> None:
        """Record a frame with what is known now."""
        if self._recording is not None:
            self._recording.add(frame, time_s)


class _Stream:
    """One run of a stream, from its source to its end or a signal."""

    def __init__(self, nets: Nets, source: Source, files: StreamFiles, stop: StopRequest) -> None:
        self._source, self._files, self._stop = source, files, stop
        self.report = StreamReport(source.name)
        self._recogniser = PhaseRecogniser(nets, source.geometry, self.report.latencies.add)
        self._nets, self._saved_at = nets, time.monotonic()
        self._clock_s = time.time()  # when the last frame was recognised

    def run(self) -> StreamReport:
        """Recognise until the source ends, is lost, or a signal arrives."""
        begun = time.monotonic()
        begin, resumes = self._begin()
        with ExitStack() as stack:
            self._outputs = _Outputs(self._nets, self._files, resumes, stack)
            if self._source.endless:
                begin = begin._replace(number=max(begin.number, self._outputs.last_frame + 1))
            self._save()  # so that files which exist can be continued from the beginning, too
            capture = Capture(self._source, self._recogniser.sampler, begin)
            try:
                self._until_the_end(capture)
            finally:
                capture.close()
                self.report.counts = self._recogniser.sampler.counts
                self.report.dropped += capture.dropped
                self.report.faults = asdict(self._source.faults)
                self.report.seconds = time.monotonic() - begun
                if self._files.report is not None:
                    write_json(self._files.report, self.report.to_json())
        return self.report

    def _until_the_end(self, capture: Capture) -> None:
        try:
            while self._stop.poll() is None and not capture.ended:
                taken = capture.take(_WAIT_S)
                if taken is not None:
                    self._process(taken)
                if time.monotonic() - self._saved_at > SAVE_EVERY_S:
                    self._save()
        except SourceLost as lost:
            if lost.never:
                raise
            self.report.lost = str(lost)
        except ReaderError:
            self._save()
            raise
        goes_on = self.report.lost is not None or self._stop.number is not None
        if not (goes_on and self._files.state is not None):
            for one in self._recogniser.finish():
                self._write(one, one.delay_s)
        self._save(ended=not goes_on)

    def _process(self, taken: Taken) -> None:
        begun, add = time.perf_counter(), self.report.latencies.add
        add("decode", taken.decode_s)
        add("capture", begun - taken.ready)
        resized = self._recogniser.resize(taken.shown.picture)
        self._outputs.write_input(resized)
        number, time_s = taken.shown.number, taken.shown.time_s
        for one in self._recogniser.recognise(resized, [number], [time_s], taken.now_s):
            waited_s = time_s - one.time_s + time.perf_counter() - taken.arrived
            self._write(one, waited_s if self._source.live else one.delay_s)
        self._clock_s = time.time()
        add("total", time.perf_counter() - taken.arrived)
        self._outputs.record(taken.shown.picture, time_s)

    def _write(self, one: Recognition, delay_s: float) -> None:
        self._outputs.write(one, delay_s)
        self.report.recognised += 1

    # ------------------------------------------------------------------------------------------ saved state

    def _save(self, ended: bool = False) -> None:
        """Save what a restart needs, if a file is named for it."""
        self._saved_at = time.monotonic()
        if self._files.state is not None:
            about = {"kind": KIND, "source": self._source.identity, "ended": ended, "clock_s": self._clock_s}
            save_checkpoint(self._files.state, {**about, "recogniser": self._recogniser.state()})

    def _begin(self) -> tuple[Begin, bool]:
        """Where the source begins, and whether that is where an earlier stream was when it saved its state."""
        path = self._files.state
        if path is None or not path.exists():
            return Begin(), False
        state = load_checkpoint(path)
        if state.get("kind") != KIND or not isinstance(state.get("recogniser"), dict):
            raise UserError(f"{path}: not the state of a stream; name another file")
        if state.get("source") != self._source.identity:
            raise UserError(f"{path}: saved from another source than {self._source.name}; name another file")
        if state.get("ended"):
            raise UserError(f"{path}: {self._source.name} has been recognised to its end; delete it to begin again")
        self._recogniser.restore(state["recogniser"], str(path))
        try:
            away_s = min(max(time.time() - float(state["clock_s"]), 0.0), _LONGEST_GAP_S)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}: damaged ({one_line(error)}); delete it to begin anew") from error
        self._recogniser.sampler.counts = Counts()  # the report is about this run
        if (last := self._recogniser.last) is None:
            return Begin(), True
        say(f"{path}: continuing after frame {last[0]}, {last[1]:.1f} s")
        return Begin(last[0] + 1, last[1] + away_s), True


def run_stream(nets: Nets, source: Source, files: StreamFiles, stop: StopRequest) -> StreamReport:
    """Recognise the frames of `source`, and write lines of JSON to standard output and into `files`.

    The state is saved every `SAVE_EVERY_S` and at the end. A stream whose state was saved continues after the frame
    that it recognised last. Raises Stopped after a signal if the state is saved; without, the stream just ends. Raises
    UserError if the decoding needs whole videos, if the source cannot be read, or if a file is not to be replaced.
    """
    if nets.decoding is not None and nets.decoding.settings.mode == "offline":
        raise UserError("temporal.decoding.mode=offline needs whole videos; a running one takes causal, with lag_s")
    stream = _Stream(nets, source, files, stop)
    report = stream.run()
    for line in [report.sentence(), *report.latencies.lines()]:
        say(line)
    if stop.number is not None and files.state is not None:
        raise Stopped(stop.number)
    return report
