"""Metric logs: one JSON object a line, and the same scalars as TensorBoard events."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.files import atomic_path, read_bounded

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

METRICS_FILE = "metrics.jsonl"
MAX_METRICS_BYTES = 1 << 30  # a step is some 200 bytes


class MetricLog:
    """Appends to `metrics.jsonl` and to TensorBoard events in `folder`.

    A resumed run first drops the lines after its checkpoint (`rewind`), so that the file reads as if nothing had
    happened. TensorBoard is imported when there is something to write for it: it costs about a second, which the first
    training step should not wait for.
    """

    def __init__(self, folder: Path, enabled: bool = True) -> None:
        self.folder, self.path, self.enabled = folder, folder / METRICS_FILE, enabled
        self._writer: SummaryWriter | None = None
        self._purge_step: int | None = None
        self._waiting: list[dict[str, Any]] = []

    def rewind(self, global_step: int) -> None:
        """Forget every line of a step after `global_step`."""
        if not self.enabled or not self.path.exists():
            return
        kept = [line for line in _lines(self.path) if _step_of(line) <= global_step]
        with atomic_path(self.path) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        self._purge_step = global_step + 1

    def log(self, kind: str, global_step: int, values: dict[str, Any]) -> None:
        """Write one line: `kind` (step or epoch), the step, the values (None for a number that does not exist)."""
        if not self.enabled:
            return
        row = {"kind": kind, "global_step": global_step, **values}
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row, allow_nan=False) + "\n")
            stream.flush()
        self._waiting.append(row)
        if kind == "epoch":
            self._send_events()

    def close(self) -> None:
        """Bring everything logged so far to the disk."""
        if not self.enabled:
            return
        self._send_events()
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        if self.path.exists():
            with self.path.open("rb") as stream:
                os.fsync(stream.fileno())

    def _send_events(self) -> None:
        if not self._waiting:
            return
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.folder / "events"), purge_step=self._purge_step)
        for row in self._waiting:
            for name, value in row.items():
                if isinstance(value, int | float) and not isinstance(value, bool) and name != "global_step":
                    self._writer.add_scalar(f"{row['kind']}/{name}", value, row["global_step"])
        self._waiting.clear()


def read_metrics(path: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """Rows of a `metrics.jsonl`, of one kind or all; lines that a crash or a bad disk left broken are left out.

    Raises UserError when the file cannot be read.
    """
    rows = [json.loads(line) for line in _lines(path) if _step_of(line) < _BROKEN]
    return [row for row in rows if kind is None or row["kind"] == kind]


def _lines(path: Path) -> list[str]:
    return read_bounded(path, MAX_METRICS_BYTES).decode("utf-8", "replace").splitlines()


_BROKEN = 1 << 62


def _step_of(line: str) -> int:
    try:
        row = json.loads(line)
        return int(row["global_step"]) if isinstance(row["kind"], str) else _BROKEN
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return _BROKEN
