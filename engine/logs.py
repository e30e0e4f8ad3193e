"""Metric logs: one JSON object a line, and the same scalars as TensorBoard events."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.files import as_user_error, atomic_path

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

METRICS_FILE = "metrics.jsonl"


class MetricLog:
    """Appends to `metrics.jsonl` and to TensorBoard events in `folder`.

    A resumed run first drops the lines after its checkpoint (`rewind`), so that the file reads as if nothing had
    happened; what lies before a checkpoint must be on the disk first (`sync`). Every method raises UserError when the
    disk is full, and the log takes nothing more then. TensorBoard is imported when there is something to write for it: it costs about a second, which the first
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
        kept = [line for line in self.path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= global_step]
        with atomic_path(self.path) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        self._purge_step = global_step + 1

    def log(self, kind: str, global_step: int, values: dict[str, Any]) -> None:
        """Write one line: `kind` (step or epoch), the step, the values (None for a number that does not exist)."""
        if not self.enabled:
            return
        row = {"kind": kind, "global_step": global_step, **values}
        with self._writing(self.path), self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row, allow_nan=False) + "\n")
            stream.flush()
        self._waiting.append(row)

    def sync(self) -> None:
        """Bring everything logged so far to the disk."""
        if not self.enabled or not self._waiting:
            return
        with self._writing(self.path), self.path.open("rb") as stream:
            os.fsync(stream.fileno())
        with self._writing(self.folder / "events"):
            self._send_events()

    def close(self) -> None:
        """Bring everything logged so far to the disk, and take nothing more."""
        self.sync()
        if self._writer is not None:
            with self._writing(self.folder / "events"):
                self._writer.close()
        self._writer = None

    @contextmanager
    def _writing(self, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.enabled, self._writer = False, None  # whatever came next would fail again, and hide this
            raise as_user_error(error, path) from error

    def _send_events(self) -> None:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.folder / "events"), purge_step=self._purge_step)
        for row in self._waiting:
            for name, value in row.items():
                if isinstance(value, int | float) and not isinstance(value, bool) and name != "global_step":
                    self._writer.add_scalar(f"{row['kind']}/{name}", value, row["global_step"])
        self._writer.flush()
        self._waiting.clear()


def read_metrics(path: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """Rows of a `metrics.jsonl`, of one kind or all; a last line cut short by a crash is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if _step_of(line) < _BROKEN:
            row = json.loads(line)
            if kind is None or row["kind"] == kind:
                rows.append(row)
    return rows


_BROKEN = 1 << 62


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["global_step"])
    except (ValueError, KeyError, TypeError):
        return _BROKEN
