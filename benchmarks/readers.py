"""The speed of the readers on sampled frames, on which the choice of `reader=auto` is based.

    python benchmarks/readers.py --json FILE [--repeat N]

The project's readers read every 25th frame of each video as full-size RGB, with one thread. Opening, the scan of the
packets and every check are included. Both readers run in each round. The figures are medians over rounds:

- `pyav_fps`, `decord_fps`: frames per second of wall time; `*_processor_fps`: per second of processor time, which is
  more reliable on a busy machine. `pyav_over_decord` is the ratio of the latter.
- `same_bytes`: whether both gave the same frames in the first round.

If decord is not installed (it has wheels for x86-64 only), its keys are missing. The input is the real clips
(SURGSTAGE_SHARED, by default `shared` beside the checkout) or, if there are none, one simulated video; `input` says
which.
"""

from __future__ import annotations

import hashlib
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from command import PROJECT, options, say
from extract import source_videos

sys.path.insert(0, str(PROJECT))
EVERY = 25
READERS: tuple[Literal["pyav", "decord"], ...] = ("pyav", "decord")


def main() -> None:
    """Parse the options, measure, and print and write the figures."""
    given = options(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        videos, kind = source_videos(Path(folder))
        figures = {**measure(videos, given.repeat), "every": EVERY, "input": kind}
    say(figures, given.json)


def measure(videos: Sequence[Path], repeat: int) -> dict[str, object]:
    """Measure all figures."""
    rounds: dict[str, list[float]] = {}
    digests = {}
    names = [name for name in READERS if name != "decord" or has_decord()]
    for name in names:  # imports and the comparison happen here and are not timed
        digests[name] = read_all(videos, name, hashed=True)[2]
    for _ in range(repeat):
        for name in names:
            by_clock, by_processor, _ = read_all(videos, name)
            rounds.setdefault(f"{name}_fps", []).append(by_clock)
            rounds.setdefault(f"{name}_processor_fps", []).append(by_processor)
    figures: dict[str, object] = {key: round(statistics.median(values), 2) for key, values in rounds.items()}
    if len(names) == 2:
        pyav, decord = (statistics.median(rounds[f"{name}_processor_fps"]) for name in names)
        figures.update(pyav_over_decord=round(pyav / decord, 3), same_bytes=len(set(digests.values())) == 1)
    return figures


def has_decord() -> bool:
    try:
        import decord  # noqa: F401
    except ImportError:
        return False
    return True


def read_all(videos: Sequence[Path], name: Literal["pyav", "decord"], hashed: bool = False) -> tuple[float, float, str]:
    """Frames per second of wall time and of processor time, and with `hashed` a hash of all frames.

    Hashing takes time, so such a call is not for timing.
    """
    from features.video.open import open_video

    digest, count = hashlib.sha256(), 0
    started, before = time.perf_counter(), time.process_time()
    for video in videos:
        with open_video(video, name) as reader:
            for frame in reader.read(range(0, reader.frame_count, EVERY)):
                count += 1
                if hashed:
                    digest.update(frame.tobytes())
    return count / (time.perf_counter() - started), count / (time.process_time() - before), digest.hexdigest()


if __name__ == "__main__":
    main()
