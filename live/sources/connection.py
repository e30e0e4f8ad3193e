"""A device or a network address as a source, through PyAV: connected again when it is lost."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from configs.errors import UserError, one_line
from engine.progress import say
from features.video.base import MAX_PIXELS, ReaderError
from features.video.container import import_av, video_stream
from features.video.pyav import upright
from live.sources.base import Begin, Grabbed, Source, SourceLost
from live.sources.clock import StreamClock

# The protocols that an address may use itself; a stream cannot make FFmpeg open others.
PROTOCOLS = {"udp": "udp", "tcp": "tcp", "rtsp": "rtsp,rtp,udp,tcp", "rtsps": "rtsp,rtp,udp,tcp,tls"}
_OPTIONS = {
    "udp": {"overrun_nonfatal": "1", "fifo_size": "50000"},
    "rtsp": {"rtsp_transport": "tcp"},
    "rtsps": {"rtsp_transport": "tcp"},
}
OPEN_S, READ_S = 10.0, 5.0  # how long a connection may take, and a frame may stay away, before it counts as lost
FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 15.0
_LONGEST_DAMAGE_S = 10.0


class Place(NamedTuple):
    """What PyAV opens: an address or a device, the kind of device (None: found by FFmpeg), and options."""

    address: str
    device: str | None
    options: dict[str, str]


def network_place(address: str) -> Place:
    """The place of an address. Raises UserError for a protocol that is not in `PROTOCOLS`."""
    scheme = urlsplit(address).scheme
    if scheme not in PROTOCOLS:
        raise UserError(f"{shown_address(address)}: not a source; addresses begin with {', '.join(PROTOCOLS)}")
    options = {"protocol_whitelist": PROTOCOLS[scheme], "analyzeduration": "2000000"}
    return Place(address, None, {**options, **_OPTIONS.get(scheme, {})})


def device_place(path: str) -> Place:
    """The place of a video device of Linux (V4L2), such as /dev/video0."""
    return Place(path, "v4l2", {})


def shown_address(address: str) -> str:
    """The address without user name and password."""
    before, mark, rest = address.partition("://")
    host, slash, path = rest.partition("/")
    return f"{before}{mark}{host.rpartition('@')[2]}{slash}{path}"


class ConnectedSource(Source):
    """The frames of a device or an address, as they arrive.

    When the connection is lost or no frame arrives for `READ_S`, it is made again, after pauses that double. The source
    is lost if no frame arrives for `give_up_s`. Damaged frames are counted and left out.
    """

    def __init__(self, place: Place, give_up_s: float) -> None:
        self._place, self._give_up_s = place, give_up_s
        super().__init__(shown_address(place.address), live=True, endless=True)

    def frames(self, begin: Begin, stop: threading.Event) -> Iterator[Grabbed]:
        clock, number, latest, wait_s = StreamClock(begin.time_s), begin.number, time.monotonic(), FIRST_WAIT_S
        while not stop.is_set():
            reason = "has ended"
            try:
                for frame, picture, arrived, decode_s in self._connected(stop):
                    latest, wait_s = time.monotonic(), FIRST_WAIT_S
                    stamp_s = None if frame.pts is None else float(frame.pts * frame.time_base)
                    time_s = clock.time_s(stamp_s, latest)
                    self.faults.clock_leaps = clock.leaps
                    yield Grabbed(number, time_s, picture, arrived, decode_s)
                    number += 1
            except (import_av().error.FFmpegError, OSError, ReaderError, ValueError) as error:
                reason = _reason(error)
            if stop.is_set():
                return
            if (quiet_s := time.monotonic() - latest) + wait_s > self._give_up_s:
                raise SourceLost(f"{self.name}: no frame for {quiet_s:.0f} s ({reason})", number == begin.number)
            say(f"{self.name}: {reason}; trying again in {wait_s:g} s")
            stop.wait(wait_s)
            wait_s = min(2 * wait_s, _LONGEST_WAIT_S)
            self.faults.reconnects += 1
            clock.connect()

    def _connected(self, stop: threading.Event) -> Iterator[tuple[Any, Any, float, float]]:
        """Each frame of one connection, the function that converts it, when its data arrived, seconds of decoding."""
        av = import_av()
        address, device, options = self._place
        open_s = min(OPEN_S, self._give_up_s)
        with av.open(address, format=device, options=options, timeout=(open_s, min(READ_S, self._give_up_s))) as found:
            stream = video_stream(found, self.name)
            usable = _Usable()
            for packet in found.demux(stream):
                if stop.is_set():
                    return
                arrived = time.perf_counter()
                try:
                    frames = packet.decode()
                except av.error.InvalidDataError:
                    frames = []
                    self.faults.damaged += 1
                    usable.damage()
                if packet.is_corrupt:
                    usable.damage()
                decode_s = time.perf_counter() - arrived
                for frame in frames:
                    if usable.take(frame):
                        yield frame, partial(upright, frame, stream), arrived, decode_s
                    else:
                        self.faults.damaged += 1


class _Usable:
    """Whether a frame shows what was filmed: after damage, frames are left out until one that refers to no other.

    A stream that has no such frames is used again after `_LONGEST_DAMAGE_S`.
    """

    def __init__(self) -> None:
        self._damaged_at: float | None = None

    def damage(self) -> None:
        """Frames from now on may refer to something that is missing."""
        self._damaged_at = time.monotonic()

    def take(self, frame: Any) -> bool:
        """Whether the decoder's next frame can be used."""
        if frame.is_corrupt:
            self.damage()
            return False
        since = self._damaged_at
        if since is not None and (frame.key_frame or time.monotonic() - since > _LONGEST_DAMAGE_S):
            self._damaged_at = None
        return self._damaged_at is None and frame.width * frame.height <= MAX_PIXELS


def _reason(error: Exception) -> str:
    """Why a connection was lost, in a few words; FFmpeg reports a timeout as an exit that was asked for."""
    if isinstance(error, import_av().error.ExitError):
        return "no data arrive"
    return str(getattr(error, "strerror", None) or one_line(error))
