"""Choose the source that an argument of `stream` names."""

from __future__ import annotations

import math
import os
import re
import stat
from pathlib import Path

from configs.errors import UserError
from live.nets import Nets
from live.sources.base import Source
from live.sources.connection import ConnectedSource, device_place, network_place
from live.sources.file import FileSource
from live.sources.raw import RawSource

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def open_source_named(name: str, nets: Nets, *, real: bool, raw: str | None, give_up_s: float) -> Source:
    """The source of this name: `-` (standard input, of the layout `raw`), an address, a device, a file or a folder.

    Raises UserError if it cannot be read, or if an option does not fit the kind of source.
    """
    if not math.isfinite(give_up_s):
        raise UserError(f"--give-up {give_up_s}: expected a number of seconds")
    if (name == "-") != (raw is not None):
        raise UserError(
            "-: standard input needs --raw WIDTHxHEIGHT@FPS" if raw is None else f"--raw: {name} states its own size"
        )
    if raw is not None:
        return RawSource(raw, real)
    is_device = not _ADDRESS.match(name) and os.path.exists(name) and stat.S_ISCHR(os.stat(name).st_mode)
    if not (is_device or _ADDRESS.match(name)):
        return FileSource(Path(name), nets.config, nets.spec, real)
    place = device_place(name) if is_device else network_place(name)
    if not real:
        raise UserError(f"--speed max: {name} has its own speed; leave it out")
    return ConnectedSource(place, give_up_s)
