"""Devices and addresses: what arrives over loopback, and what a source survives."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from configs.errors import UserError
from live.sources import connection
from live.sources.base import Begin, Grabbed, SourceLost
from live.sources.connection import ConnectedSource, Place, network_place, shown_address
from tests.cli import PROJECT
from tests.live.sources.serving import free_port, tcp_server
from tests.videos import VideoSpec, frame_number, write_video

SMALL = VideoSpec(count=50, gop=5, b_frames=0)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seconds at 25 frames per second, as MPEG-TS."""
    return write_video(tmp_path_factory.mktemp("clip") / "clip.ts", SMALL)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sources that lose patience after tenths of a second."""
    monkeypatch.setattr(connection, "READ_S", 0.4)
    monkeypatch.setattr(connection, "FIRST_WAIT_S", 0.05)


def grabbed(source: ConnectedSource, most: int = 10_000) -> tuple[list[Grabbed], str]:
    """The frames until the source is lost, or as many; and why it was lost."""
    stop, found = threading.Event(), list[Grabbed]()
    try:
        for frame in source.frames(Begin(), stop):
            found.append(frame)
            if len(found) == most:
                stop.set()
    except SourceLost as lost:
        return found, str(lost)
    return found, ""


def pictures(frames: list[Grabbed]) -> list[int]:
    return [frame_number(frame.picture()) for frame in frames if frame.picture is not None]


def test_frames_that_another_process_sends_by_udp_have_its_times(clip: Path) -> None:
    port = free_port()
    arguments = [sys.executable, "-m", "tests.live.sources.serving", str(clip), str(port), "2"]
    with subprocess.Popen(arguments, cwd=PROJECT) as sender:
        source = ConnectedSource(network_place(f"udp://127.0.0.1:{port}"), 3.0)
        frames, _ = grabbed(source, 15)
        sender.kill()
    numbers = pictures(frames)
    assert [frame.number for frame in frames] == list(range(15))
    for frame, number in zip(frames, numbers, strict=True):
        assert frame.time_s == pytest.approx((number - numbers[0]) / 25, abs=1e-4)


def test_a_lost_connection_is_made_again_and_time_goes_on(clip: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with tcp_server([(clip.read_bytes(), 0), (clip.read_bytes(), 0)]) as address:
        source = ConnectedSource(network_place(address), 1.0)
        frames, lost = grabbed(source)
    assert len(frames) > 80
    assert frames[-1].number == len(frames) - 1
    times_s = [frame.time_s for frame in frames]
    assert times_s == sorted(times_s)
    assert 2.9 < times_s[-1] < 10  # both parts, of which a few frames may be missing, and the time between
    assert source.faults.reconnects >= 2
    assert source.faults.clock_leaps == 0
    assert "no frame for" in lost
    assert "trying again in 0.05 s" in capsys.readouterr().err


def test_a_source_that_stalls_is_left(clip: Path) -> None:
    content = clip.read_bytes()
    with tcp_server([(content[: len(content) // 2], 30)]) as address:
        frames, lost = grabbed(ConnectedSource(network_place(address), 0.9))
    assert 10 < len(frames) < 50
    assert "no frame for" in lost


@pytest.mark.parametrize("content", [b"", b"\x00\xff garbage" * 5000, bytes(188 * 100)], ids=["nothing", "text", "0"])
def test_what_is_no_video_is_reported_in_one_line(content: bytes) -> None:
    with tcp_server([(content, 0.1)] * 3) as address:
        source = ConnectedSource(network_place(address), 0.8)
        with pytest.raises(SourceLost, match=r"^tcp://127\.0\.0\.1:\d+: no frame for \d+ s \(.+\)$") as raised:
            list(source.frames(Begin(), threading.Event()))
    assert raised.value.never


def test_garbage_within_a_stream_is_survived(clip: Path) -> None:
    content = clip.read_bytes()
    middle = len(content) // 376 * 188
    spoiled = content[:middle] + bytes(range(256)) * 40 + content[middle + 3000 :]
    with tcp_server([(spoiled, 0)]) as address:
        frames, _ = grabbed(ConnectedSource(network_place(address), 0.3))
    numbers = pictures(frames)
    assert numbers == sorted(numbers)
    assert numbers[0] < 10
    assert numbers[-1] > 40


def test_another_size_and_a_clock_that_goes_back_are_survived(clip: Path, tmp_path: Path) -> None:
    larger = write_video(tmp_path / "larger.ts", dataclasses.replace(SMALL, width_px=192, height_px=128))
    with tcp_server([(clip.read_bytes() + larger.read_bytes() + clip.read_bytes(), 0)]) as address:
        source = ConnectedSource(network_place(address), 0.3)
        frames, _ = grabbed(source)
    shapes = [frame.picture().shape for frame in frames if frame.picture is not None]
    assert (64, 96, 3) in shapes
    assert (128, 192, 3) in shapes
    assert shapes[-1] == (64, 96, 3)
    assert source.faults.clock_leaps == 2
    times_s = [frame.time_s for frame in frames]
    assert times_s == sorted(times_s)


def test_a_device_is_read_like_an_address() -> None:
    """FFmpeg's generator of pictures stands in for a camera."""
    generator = Place("testsrc=size=64x48:rate=25", "lavfi", {})
    frames, _ = grabbed(ConnectedSource(generator, 1.0), 30)
    assert frames[-1].time_s == pytest.approx(29 / 25)
    assert frames[0].picture is not None
    assert frames[0].picture().shape == (48, 64, 3)


@pytest.mark.parametrize("address", ["http://host/a.ts", "file:///etc/passwd", "concat://a", "data://x"])
def test_other_protocols_are_refused(address: str) -> None:
    with pytest.raises(UserError, match="not a source; addresses begin with udp, tcp, rtsp, rtsps"):
        network_place(address)


def test_passwords_are_not_shown() -> None:
    assert shown_address("rtsp://me:p@ss@10.0.0.5:554/a@b") == "rtsp://10.0.0.5:554/a@b"
    assert ConnectedSource(network_place("rtsp://me:secret@host/1"), 1.0).name == "rtsp://host/1"


def test_an_address_where_nobody_listens_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SourceLost, match="Connection refused"):
        list(ConnectedSource(network_place("tcp://127.0.0.1:1"), 0.2).frames(Begin(), threading.Event()))
