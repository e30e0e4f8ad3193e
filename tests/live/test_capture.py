"""A slow receiver never gets old frames of a live source, and every frame of a stored one."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from configs.errors import UserError
from live.capture import Capture
from live.sampling import Sampler
from live.sources.base import Begin, Grabbed, Source
from live.sources.raw import RawSource

FRAMES = 40


class Counting(Source):
    """Frames at 10 per second that arrive every 2 ms; their pixels are their number. The last one has an image only."""

    def frames(self, begin: Begin, stop: threading.Event) -> Iterator[Grabbed]:
        for number in range(begin.number, FRAMES):
            if stop.wait(0.002 if self.live else 0):
                return
            yield Grabbed(number, number / 10, lambda n=number: np.full((2, 2, 3), n, np.uint8), time.perf_counter(), 0)
        if self.name == "broken":
            raise UserError("broken: frame 40 cannot be read")


def received(capture: Capture, pause_s: float) -> list[int]:
    found = []
    while not capture.ended:
        taken = capture.take(1.0)
        if taken is not None:
            assert (taken.shown.picture == taken.shown.number).all()
            found.append(taken.shown.number)
            time.sleep(pause_s)
    return found


def test_the_newest_frame_of_a_live_source_wins_and_others_are_counted() -> None:
    sampler = Sampler[Grabbed](10.0)
    capture = Capture(Counting("camera", live=True), sampler, Begin())
    found = received(capture, 0.02)
    assert found == sorted(set(found))
    assert found[-1] == FRAMES - 1
    assert capture.dropped == FRAMES - len(found) > FRAMES / 3
    assert sampler.counts.sampled == FRAMES


def test_every_frame_of_a_stored_source_is_received() -> None:
    capture = Capture(Counting("file", live=False), Sampler(10.0), Begin(3))
    assert received(capture, 0.001) == list(range(3, FRAMES))
    assert capture.dropped == 0


def test_what_was_read_before_an_error_is_received() -> None:
    capture, found = Capture(Counting("broken", live=False), Sampler(10.0), Begin()), []
    with pytest.raises(UserError, match="frame 40 cannot be read"):
        while (taken := capture.take(1.0)) is not None:
            found.append(taken.shown.number)
    assert found == list(range(FRAMES))


def test_closing_ends_the_thread_of_a_source_that_waits_for_its_receiver() -> None:
    capture = Capture(Counting("file", live=False), Sampler(10.0), Begin())
    assert capture.take(1.0) is not None
    begun = time.monotonic()
    capture.close()
    assert time.monotonic() - begun < 1.5


def test_raw_frames_are_read_from_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    reading, writing = os.pipe()
    pictures = np.random.default_rng(0).integers(0, 256, (3, 4, 6, 3), dtype=np.uint8)
    os.write(writing, pictures.tobytes() + b"rest")
    os.close(writing)
    source = RawSource("6x4@12.5", real=False, descriptor=reading)
    found = list(source.frames(Begin(), threading.Event()))
    os.close(reading)
    assert [frame.time_s for frame in found] == [0.0, 0.08, 0.16]
    for frame, expected in zip(found, pictures, strict=True):
        assert frame.picture is not None
        np.testing.assert_array_equal(frame.picture(), expected)
    assert source.end_s == pytest.approx(0.24)
    assert "ends within frame 3" in capsys.readouterr().err


@pytest.mark.parametrize("layout", ["", "6x4", "6x4@0", "0x4@25", "6x-4@25", "999999x999999@25", "6x4@1e3", "axb@c"])
def test_a_layout_that_is_none_is_refused(layout: str) -> None:
    with pytest.raises(UserError, match="expected WIDTHxHEIGHT@FPS, such as 1280x720@25"):
        RawSource(layout, real=True)
