"""Open a page in a real browser, and collect its requests, errors and warnings."""

from __future__ import annotations

from pathlib import Path
from typing import Any


class Visit:
    """A page of a file. `requests` are all addresses asked for but the file itself and data inside it; `complaints`
    are console errors and warnings (a broken security policy is one) and uncaught exceptions."""

    def __init__(self, browser: Any, path: Path, width_px: int = 1280, height_px: int = 900) -> None:
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.page = browser.new_page(viewport={"width": width_px, "height": height_px}, reduced_motion="reduce")
        self.page.set_default_timeout(20_000)
        self.page.on("request", self._asked)
        self.page.on("console", self._said)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self._address = path.resolve().as_uri()

    def __enter__(self) -> Visit:
        self.page.goto(self._address)
        return self

    def __exit__(self, *error: object) -> None:
        self.page.close()

    def _asked(self, request: Any) -> None:
        if request.url.partition("#")[0] != self._address and not request.url.startswith("data:"):
            self.requests.append(request.url)

    def _said(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    def show(self, selector: str) -> Any:
        """The first such figure, scrolled into view and drawn."""
        box = self.page.locator(selector).first
        box.scroll_into_view_if_needed()
        self.page.wait_for_function("box => box.dataset.drawn", arg=box.element_handle())
        return box

    def walk_through(self) -> None:
        """Open everything that can be opened and bring every figure into view."""
        self.page.eval_on_selector_all("details", "all => all.forEach(one => one.open = true)")
        for number in range(self.page.locator(".figure").count()):
            if self.page.locator(".figure").nth(number).is_visible():
                self.show(f".figure >> nth={number}")
