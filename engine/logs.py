"""Log the metrics of a training, as JSON (one object per line) and as TensorBoard events."""

from __future__ import annotations

import io
import json
import os
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from configs.errors import one_line
from engine.files import as_user_error, atomic_path, make_folder, read_bounded
from engine.progress import say

METRICS_LOG = "metrics.jsonl"
MAX_METRICS_BYTES = 1 << 30  # a step takes about 200 bytes
_LAST_STEP = 1 << 62


class MetricLog:
    """Appends to `metrics.jsonl` and to TensorBoard events in `folder`.

    A resumed run first calls `rewind`, which drops the lines written after its checkpoint, so that the file ends up
    like that of an uninterrupted run. Call `sync` before writing a checkpoint, so that all earlier lines are on the
    disk. Every method raises UserError if the disk is full; after that, nothing more is logged. TensorBoard is imported
    only at the first `sync`, so that it does not delay the first training step.
    """

    def __init__(self, folder: Path, enabled: bool = True) -> None:
        self.folder, self.path, self.enabled = folder, folder / METRICS_LOG, enabled
        self._events: _Events | None = None
        self._events_wanted = True
        self._purge_step: int | None = None
        self._waiting: list[dict[str, Any]] = []

    def rewind(self, global_step: int, epoch: int) -> None:
        """Drop the lines of all steps after `global_step`, and the `epoch` lines of `epoch` and later epochs.

        The second part matters if a run was killed after it had logged an epoch, but before the next checkpoint. It
        then resumes at the epoch's last step, which has the same number as the epoch's line.
        """
        if not self.enabled or not self.path.exists():
            return
        kept = [
            row
            for row in read_metrics(self.path)
            if row["global_step"] <= global_step and not (row["kind"] == "epoch" and row["epoch"] >= epoch)
        ]
        with atomic_path(self.path) as temporary:
            temporary.write_text("".join(f"{json.dumps(row)}\n" for row in kept), encoding="utf-8")
        self._purge_step = global_step
        # TensorBoard will also hide the events of step `global_step` itself, so these are written again.
        self._waiting = [row for row in kept if row["global_step"] == global_step]

    def log(self, kind: str, global_step: int, values: dict[str, Any]) -> None:
        """Append a line with `kind` (step or epoch), the step number and the values; a missing value is None."""
        if not self.enabled:
            return
        row = {"kind": kind, "global_step": global_step, **values}
        with self._writing(self.path), self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row, allow_nan=False) + "\n")
            stream.flush()
        self._waiting.append(row)

    def sync(self) -> None:
        """Write everything logged so far to the disk (fsync)."""
        if not self.enabled or not self._waiting:
            return
        with self._writing(self.path), self.path.open("rb") as stream:
            os.fsync(stream.fileno())
        with self._writing(self.folder / "events"):
            self._write_events()
        self._waiting.clear()

    def _write_events(self) -> None:
        if self._events is None and self._events_wanted:
            try:
                self._events = _Events(self.folder / "events", self._purge_step)
            except ImportError as error:  # these parts of TensorBoard are not public and can change
                self._events_wanted = False
                say(f"note: no TensorBoard events: this release of TensorBoard is not supported ({one_line(error)})")
        if self._events is not None:
            self._events.write(self._waiting)

    def close(self) -> None:
        """Call `sync` and close the events file; lines that are logged later go to a new one."""
        self.sync()
        if self._events is not None:
            self._events.close()
            self._events = None

    @contextmanager
    def _writing(self, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.enabled = False  # later writes would fail too, and their errors would hide this one
            raise as_user_error(error, path) from error


class _Events:
    """A TensorBoard events file that is written synchronously.

    It replaces `SummaryWriter`, which writes in a thread that prints a traceback when the disk is full, and does not
    call fsync. TensorBoard hides the events of older files from step `purge_step` on.
    """

    def __init__(self, folder: Path, purge_step: int | None) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary, self._writer = Event, Summary, RecordWriter
        make_folder(folder)
        # TensorBoard reads the files in the order of their names. Fractions of a second in the name keep this order
        # chronological even if a training is started twice within a second.
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self._stream = (folder / name).open("wb", buffering=0)
        first = [Event(wall_time=time.time(), file_version="brain.Event:2")]
        if purge_step is not None:
            start = SessionLog(status=SessionLog.START)
            first.append(Event(wall_time=time.time(), step=purge_step, session_log=start))
        self._append(first)

    def write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write the numbers of log rows as scalars named `<kind>/<name>`, and flush them to the disk."""
        events = []
        for row in rows:
            values = [
                self._summary.Value(tag=f"{row['kind']}/{name}", simple_value=value)
                for name, value in row.items()
                if isinstance(value, int | float) and not isinstance(value, bool) and name != "global_step"
            ]
            summary = self._summary(value=values)
            events.append(self._event(wall_time=time.time(), step=row["global_step"], summary=summary))
        self._append(events)

    def _append(self, events: Iterable[Any]) -> None:
        buffer = io.BytesIO()
        records = self._writer(buffer)
        for event in events:
            records.write(event.SerializeToString())
        rest = memoryview(buffer.getvalue())
        while rest:  # a nearly full disk accepts only a part, and then raises an error
            rest = rest[self._stream.write(rest) or 0 :]
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Close the file; nothing is buffered, so nothing is left to write."""
        self._stream.close()


def read_metrics(path: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """Read the rows of a `metrics.jsonl`: those of one `kind`, or all.

    Damaged lines, as left by a crash or a bad disk, are skipped. Raises UserError if the file cannot be read.
    """
    lines = read_bounded(path, MAX_METRICS_BYTES).decode("utf-8", "replace").splitlines()
    rows = [row for line in lines if (row := _row(line)) is not None]
    return [row for row in rows if kind is None or row["kind"] == kind]


def _row(line: str) -> dict[str, Any] | None:
    """Parse one line of the log; returns None if the line is damaged."""
    try:
        row: dict[str, Any] = json.loads(line)
        whole = isinstance(row["kind"], str) and (row["kind"] != "epoch" or type(row["epoch"]) is int)
        return row if whole and int(row["global_step"]) < _LAST_STEP else None
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
