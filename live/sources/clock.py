"""The times of a live source's frames."""

from __future__ import annotations

# A stamp that differs from what this machine's clock makes likely by more is one of another clock.
LEAP_S = 10.0
# A frame that is shown this much before the latest one was delayed on its way; an even earlier one is a new beginning.
BACK_S = 1.0


class StreamClock:
    """Turns a source's time stamps into seconds that never leap.

    Stamps are used as they are, from `origin_s` on, so that frames keep their distance whatever their way here. Where
    they leap back by more than `BACK_S`, or ahead of this machine's clock by more than `LEAP_S`, or after a connection
    was made anew, they continue from the time that this machine's clock shows.
    """

    def __init__(self, origin_s: float) -> None:
        self._latest_s, self._at = origin_s, None  # type: float, float | None
        self._offset_s: float | None = None
        self.leaps = 0

    def connect(self) -> None:
        """The next stamp is the first one of another clock."""
        self._offset_s = None

    def time_s(self, stamp_s: float | None, now: float) -> float:
        """The time of a frame with this stamp (None: it has none) that arrives at `now`, of a steady clock."""
        likely_s = self._latest_s + (0.0 if self._at is None else max(now - self._at, 0.0))
        time_s = likely_s
        if stamp_s is not None:
            if self._offset_s is not None:
                time_s = stamp_s + self._offset_s
            if self._offset_s is None or not self._latest_s - BACK_S <= time_s <= likely_s + LEAP_S:
                self.leaps += self._offset_s is not None
                self._offset_s, time_s = likely_s - stamp_s, likely_s
        if time_s > self._latest_s or self._at is None:
            self._latest_s, self._at = time_s, now
        return time_s
