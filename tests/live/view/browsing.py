"""The viewer in a real headless Chromium: what a person presses, drags and sees."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from live.view.app import Material
from live.view.serve import PageServer
from tests.videos import frame_number

LIMIT_S = 120.0  # the machine may be busy

# The picture as pixels, once it is that of the playhead.
_PIXELS = """() => {
    const { player } = surgstage;
    if (player.loading || !player._isShown() || player.picture.hidden) return null;
    const canvas = document.createElement("canvas");
    canvas.width = player.picture.naturalWidth;
    canvas.height = player.picture.naturalHeight;
    const context = canvas.getContext("2d");
    context.drawImage(player.picture, 0, 0);
    const { data } = context.getImageData(0, 0, canvas.width, canvas.height);
    return [canvas.height, canvas.width, btoa(String.fromCharCode(...data))];
}"""


class Tab:
    """A tab with the viewer. `complaints` are errors in the console, `strangers` requests to other servers."""

    def __init__(self, context: Any, server: PageServer, width_px: int = 1280, height_px: int = 900) -> None:
        self.complaints: list[str] = []
        self.strangers: list[str] = []
        self.page = context.new_page()
        self.page.set_viewport_size({"width": width_px, "height": height_px})
        self.page.set_default_timeout(1000 * LIMIT_S)
        self.page.on("console", lambda message: self._said(message.type, message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        own = server.address.partition("?")[0]
        allowed = (own, "blob:", "data:")
        self.page.on("request", lambda asked: asked.url.startswith(allowed) or self.strangers.append(asked.url))
        self.page.goto(server.address)
        self.ready()

    def _said(self, kind: str, text: str) -> None:
        if kind in ("error", "warning") and "status of 409" not in text:
            self.complaints.append(text)

    def until(self, holds: Callable[[], Any]) -> Any:
        """Wait until something holds, and return it. (The page's policy forbids Playwright's own waiting.)"""
        limit = time.monotonic() + LIMIT_S
        while not (found := holds()):
            assert time.monotonic() < limit, f"still waiting; {self.complaints}"
            self.page.wait_for_timeout(10)
        return found

    def ready(self) -> None:
        """Wait for the video, or for the file that is followed."""
        self.until(lambda: self.page.evaluate("Boolean(window.surgstage?.clock || window.surgstage?.live)"))

    def press(self, *keys: str) -> None:
        """Press keys one after another."""
        for key in keys:
            self.page.keyboard.press(key)

    def go(self, frame: int) -> None:
        """Go to a frame."""
        self.page.evaluate("frame => surgstage.goTo(frame)", frame)

    @property
    def frame(self) -> int:
        """The frame at the playhead."""
        found: int = self.page.evaluate("surgstage.frame")
        return found

    def picture(self) -> int:
        """The number that is painted on the picture."""
        import base64

        height, width, pixels = self.until(lambda: self.page.evaluate(_PIXELS))
        rgba = np.frombuffer(base64.b64decode(pixels), np.uint8).reshape(height, width, 4)
        return frame_number(rgba[..., :3])

    @property
    def labels(self) -> list[tuple[str, float, float]]:
        """One's own labels of the current track."""
        found = self.page.evaluate("surgstage.intervals.filter((one) => one.track === surgstage.track)")
        return [(one["label"], round(one["start"], 3), round(one["end"], 3)) for one in found]

    def saved(self) -> None:
        """Wait until every change is on the disk."""
        self.until(lambda: self.page.evaluate("!surgstage.editor.dirty && !surgstage.editor.saving"))

    def place(self, time_s: float, row: int = 0) -> tuple[float, float]:
        """Where a time of one of one's own rows is on the page."""
        x, y = self.page.evaluate(
            """([time, number]) => {
                const { timeline } = surgstage;
                timeline._draw();
                const place = timeline.places.filter((one) => one.row.own)[number];
                const box = timeline.canvas.getBoundingClientRect();
                return [box.left + timeline.x(time), box.top + (place.top + place.bottom) / 2];
            }""",
            [time_s, row],
        )
        return x, y

    def drag(self, start_s: float, end_s: float, drop: bool = True) -> None:
        """Drag from one time to another in one's own labels."""
        mouse = self.page.mouse
        mouse.move(*self.place(start_s))
        mouse.down()
        mouse.move(*self.place((start_s + end_s) / 2))
        mouse.move(*self.place(end_s))
        if drop:
            mouse.up()


def server_of(opened: Material) -> PageServer:
    """A server of this material on any port, to be used as a context."""
    return PageServer(opened)
