"""A small labelled video with predictions, opened as `view` opens it, and a client that has the server's secret."""

from __future__ import annotations

import atexit
from fractions import Fraction
from pathlib import Path
from typing import Any

from starlette.testclient import TestClient

from live.view.access import Guard
from live.view.app import Material, build_app
from live.view.serve import open_material
from tests.videos import VideoSpec, repeat_video, write_video

SECRET, COOKIE = "correct-secret", "view-cookie"
HOST = "http://127.0.0.1:8000"
FRAMES = 250  # ten seconds

LABELS = """video,track,label,start,end
case,phase,Preparation,0,4
case,phase,CalotTriangleDissection,4,10
"""


def write_case(folder: Path, count: int = FRAMES, **more: Any) -> Path:
    """A video called `case` whose frames show their numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    return write_video(folder / "case.mp4", VideoSpec(count=count, **more))


def material(*videos: Path, **ask: Any) -> Material:
    """What `view` opens with these videos and options. Its files are closed at the end."""
    given: dict[str, Any] = {"split": "test", "shown": (), "labels": None, "annotator": None, "dataset": None}
    opened = open_material(videos, ask.pop("runs", ()), **{**given, "live": None, **ask})
    for video in opened.videos:
        atexit.register(video.close)
    return opened


def client(opened: Material, secret: str | None = SECRET) -> TestClient:
    """A browser that has been to the page with `secret`, or never."""
    app, _ = build_app(opened)
    found = TestClient(Guard(app, SECRET, COOKIE), base_url=HOST, raise_server_exceptions=True)
    if secret is not None:
        found.cookies.set(COOKIE, secret)
    return found


def repeated_video(path: Path, fps: int, hours: float) -> tuple[Path, int]:
    """A video of so many hours, in which 60 frames follow each other again and again; and its number of frames."""
    times = round(hours * 3600 * fps / 60)
    short = write_video(path.with_name(f"short-{path.name}"), VideoSpec(count=60, fps=Fraction(fps), b_frames=0))
    repeat_video(short, path, times)
    short.unlink()
    return path, 60 * times
