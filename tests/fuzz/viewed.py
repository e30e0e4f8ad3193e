"""What the viewer reads: the lines of `stream`, the history of labels, and labels that its page sends."""

from __future__ import annotations

import json
from pathlib import Path


def read_lines(path: Path) -> object:
    """Follow a file to its end; what it gives can be sent to the page."""
    from live.view.following import Follower

    follower, found = Follower(path), []
    while (news := follower.read()) is not None:
        found.append(json.dumps(news.to_json(), allow_nan=False))
    return found


def line_seeds() -> list[bytes]:
    """Lines as `stream` writes them."""
    step = {"class": 0, "name": "s", "probabilities": {"s": 1.0}}
    lines = [
        {
            "frame": 25 * k,
            "time_s": float(k),
            "phase": k % 2,
            "phase_name": "AB"[k % 2],
            "since_s": float(k),
            "probabilities": {"A": 0.75, "B": 0.25},
            "tools": {"Hook": 0.5},
            "delay_s": 0.01,
            "tracks": {"steps": step},
        }
        for k in range(6)
    ]
    return ["".join(json.dumps(one) + "\n" for one in lines).encode()]


def read_history(path: Path) -> object:
    """Read a history, and save labels to it."""
    from features.annotation_files.intervals import Interval
    from live.view.labels import HISTORY, NO_FILE, LabelFolder

    content = path.read_bytes()
    folder = LabelFolder(path.parent / "labels")
    (folder.folder / HISTORY).mkdir(parents=True, exist_ok=True)
    (folder.folder / HISTORY / "op.jsonl").write_bytes(content)
    (folder.folder / "op.csv").unlink(missing_ok=True)
    before = len(folder.history("op"))
    folder.save("op", NO_FILE, None, [Interval("phase", "A", 0, 1)])
    assert len(folder.history("op")) == before + 1
    return before


def history_seeds() -> list[bytes]:
    """A history with two states."""
    one = {"track": "phase", "label": "A", "start": 0.0, "end": 1.5}
    entries = [{"saved": "2026-11-28T10:00:00+00:00", "state": "ab", "intervals": [one] * k} for k in (1, 2)]
    return ["\n".join(json.dumps(entry) for entry in entries).encode()]


def read_sent(path: Path) -> object:
    """Labels as the page sends them."""
    from configs.errors import UserError
    from live.view.labels import intervals_of

    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError("labels: not JSON") from error
    return intervals_of(value, "anna")


def sent_seeds() -> list[bytes]:
    """A list of intervals."""
    one = {"track": "phase", "label": "A", "start": 0.0, "end": 1.5, "confidence": 0.5, "annotator": "ben"}
    return [json.dumps([one, {**one, "label": "B"}]).encode()]
