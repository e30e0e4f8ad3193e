"""`stream` through the command line: the numbers of `predict`, files that can be followed, and restarts."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner

from evaluation.files.predictions import read_prediction_csv
from features.dataset.build import dataset_of_source
from features.dataset.sampling import sampled_frames
from features.frames.preprocess import crop_frames, normalise
from features.frames.source import source_frames
from pipeline import cli
from tests.cli import PROJECT, Forks, succeed
from tests.live.material import SPEC, settings, write_stages
from tests.live.sources.serving import free_port, tcp_server
from tests.videos import VideoSpec, damage_packet, variable_rate, write_video

SECONDS = 24
STREAM = ["stream", "--config", "two.yaml"]
CAUSAL = ["--set", "temporal.decoding={mode: causal, lag_s: 3, tool_smoothing_s: 2}"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two stages, its settings, and two videos: at 5 frames per second, and with uneven times."""
    folder = tmp_path_factory.mktemp("stream")
    config, _ = write_stages(folder)
    (folder / "two.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True)))
    write_video(folder / "case.mp4", VideoSpec(count=5 * SECONDS, fps=Fraction(5)))
    write_video(folder / "uneven.mkv", variable_rate(60))
    return folder


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def test_a_file_gives_the_numbers_of_predict(place: Path, forks: Forks) -> None:
    files = ["jsonl", "csv", "record", "dump-input", "report"]
    names = dict(zip(files, ["a.jsonl", "a.csv", "a.mp4", "a.npy", "a.json"], strict=True))
    words = [word for option, name in names.items() for word in (f"--{option}", f"out/{name}")]
    done = forks.complete([*STREAM, "case.mp4", "--speed", "max", *words, *CAUSAL], place)
    assert done.returncode == 0, done.stderr
    assert "24 of 120 frames recognised" in done.stderr
    assert (place / "out/a.jsonl").read_text() == done.stdout
    succeed(["predict", "--config", "two.yaml", "case.mp4", "--out", "known", *CAUSAL], place)
    known = read_prediction_csv(place / "known/case.csv", SPEC)
    found = read_prediction_csv(place / "out/a.csv", SPEC)
    for name in ("frame_index", "time_s", "phase"):
        np.testing.assert_array_equal(getattr(found, name), getattr(known, name))
    np.testing.assert_allclose(found.probabilities, known.probabilities, atol=1e-4)
    np.testing.assert_allclose(found.tool_probabilities, known.tool_probabilities, atol=1e-4)
    told = lines(done.stdout)
    assert list(told[0]) == [
        "frame", "time_s", "phase", "phase_name", "since_s", "probabilities", "tools", "delay_s"
    ]  # fmt: skip
    assert [one["phase_name"] for one in told] == [SPEC.phases[phase] for phase in known.phase]
    assert [list(one["probabilities"].values()) for one in told] == found.probabilities.astype(str).astype(
        float
    ).tolist()
    assert [one["delay_s"] for one in told] == [3.0] * (SECONDS - 3) + [2.0, 1.0, 0.0]
    require_report(json.loads((place / "out/a.json").read_text()))
    require_recording(place)
    require_input(place)


def require_report(report: dict[str, Any]) -> None:
    assert report["recognised"] == report["sampled"] == SECONDS
    parts = ["capture", "decode", "preprocess", "encoder", "head", "decoding", "total"]
    assert list(report["latency"]) == parts
    for part in parts:
        one = report["latency"][part]
        assert 0 < one["p50_ms"] <= one["p95_ms"] <= one["p99_ms"] <= one["max_ms"]


def require_recording(place: Path) -> None:
    """The sampled frames from the first decision on, with a band below."""
    with av.open(str(place / "out/a.mp4")) as found:
        frames = list(found.decode(video=0))
    assert len(frames) == SECONDS - 3
    assert (frames[0].width, frames[0].height > 64) == (96, True)
    assert [round(float(frame.time)) for frame in frames] == list(range(SECONDS - 3))


def require_input(place: Path) -> None:
    """What the encoder gets, in the order of the frames."""
    config, _ = write_stages(place)
    dataset = dataset_of_source(place / "case.mp4", SPEC, config.data)
    [entry] = dataset.index.videos
    with source_frames(config, dataset, entry, sampled_frames(entry, 1.0)) as frames:
        pixels = torch.from_numpy(np.stack(list(frames.frames)))
    expected = normalise(crop_frames(pixels, config.preprocess.crop_px)[:, 0], config.preprocess)
    found = np.load(place / "out/a.npy")
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected.numpy())


def test_a_video_with_uneven_times_gives_the_frames_of_predict(here: Path) -> None:
    done = CliRunner().invoke(cli, [*STREAM, "uneven.mkv", "--speed", "max"])
    assert done.exit_code == 0, done.stderr
    [entry] = dataset_of_source(here / "uneven.mkv", SPEC, settings(here).data).index.videos
    assert [one["frame"] for one in lines(done.stdout)] == sampled_frames(entry, 1.0).tolist()


@pytest.fixture(scope="module")
def whole(place: Path, forks: Forks) -> dict[str, str]:
    """What an uninterrupted stream writes."""
    files = ["--jsonl", "whole.jsonl", "--csv", "whole.csv"]
    done = forks.complete([*STREAM, "case.mp4", "--speed", "max", *CAUSAL, *files], place)
    assert done.returncode == 0, done.stderr
    written = {kind: (place / f"whole.{kind}").read_text() for kind in ("jsonl", "csv")}
    return {"out": done.stdout, **written}


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_a_stream_that_is_stopped_continues_as_if_it_had_not_been(
    place: Path, forks: Forks, whole: dict[str, str], number: int, code: int
) -> None:
    names = {kind: f"{code}.{kind}" for kind in ("state", "jsonl", "csv")}
    files = [word for kind, name in names.items() for word in (f"--{kind}", name)]
    command = [*STREAM, "case.mp4", "--speed", "max", *CAUSAL, *files]
    stopped = forks.run(command, place, signal_at_line=(17, number))
    assert stopped.code == code, stopped.output
    assert 8 <= (place / names["jsonl"]).read_text().count("\n") <= 10
    again = forks.run(command, place)
    assert again.code == 0, again.output
    for kind in ("jsonl", "csv"):
        assert (place / names[kind]).read_text() == whole[kind]
    if number != signal.SIGKILL:  # which comes without warning, so that lines are printed twice
        assert lines(stopped.output) + lines(again.output) == lines(whole["out"])
    if number == signal.SIGTERM:
        told = "stopped by SIGTERM; progress is saved, and the same command resumes from there"
        assert stopped.last_line == told
        ended = "error: 75.state: case.mp4 has been recognised to its end; delete it to begin again"
        assert forks.run(command, place).last_line == ended


@pytest.fixture
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(place)
    (place / "old.jsonl").write_text('{"frame": 3}\n')
    (place / "old.csv").write_text("my own table\n")
    (place / "notes.pt").write_text("my own notes")
    (place / "text.mp4").write_text("no video")
    return place


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["nowhere.mp4"], "nowhere.mp4: no such video"),
        (["text.mp4"], "not a video that can be read"),
        (["-"], "-: standard input needs --raw WIDTHxHEIGHT@FPS"),
        (["case.mp4", "--raw", "4x4@5"], "--raw: case.mp4 states its own size"),
        (["-", "--raw", "4x4"], "--raw 4x4: expected WIDTHxHEIGHT@FPS"),
        (["http://127.0.0.1/a"], "http://127.0.0.1/a: not a source; addresses begin with udp, tcp, rtsp"),
        (["udp://127.0.0.1:1", "--speed", "max"], "--speed max: udp://127.0.0.1:1 has its own speed"),
        (["tcp://127.0.0.1:1", "--give-up", "0.1"], "tcp://127.0.0.1:1: no frame for 0 s (Connection refused)"),
        (["case.mp4", "--give-up", "nan"], "--give-up nan: expected a number of seconds"),
        (["case.mp4", "--decoding", "offline"], "mode=offline needs whole videos"),
        (["case.mp4", "--jsonl", "old.jsonl"], "old.jsonl: exists; name another file"),
        (["case.mp4", "--csv", "old.csv"], "old.csv: exists; name another file"),
        (["case.mp4", "--record", "old.csv"], "old.csv: exists; name another file"),
        (["case.mp4", "--dump-input", "old.csv"], "old.csv: exists; name another file"),
        (["case.mp4", "--state", "notes.pt"], "notes.pt: "),
        (["case.mp4", "--state", "runs/two/temporal/best.pt"], "best.pt: not the state of a stream"),
        (["case.mp4", "--jsonl", "two.yaml/x"], "two.yaml"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(here: Path, words: list[str], told: str) -> None:
    done = CliRunner().invoke(cli, [*STREAM, *words])
    assert (done.exit_code, done.stdout) == (2, ""), done.output
    errors = [line for line in done.stderr.splitlines() if not line.startswith(("stream: ", "note: "))]
    assert len(errors) == 1, done.stderr
    assert told in errors[0]


def test_a_damaged_file_ends_the_stream_in_one_line_after_its_readable_part(here: Path) -> None:
    shutil.copyfile("case.mp4", "damaged.mp4")
    damage_packet(Path("damaged.mp4"), 60)
    done = CliRunner().invoke(cli, [*STREAM, "damaged.mp4", "--speed", "max"])
    assert done.exit_code == 2
    assert 8 < len(lines(done.stdout)) <= 12
    [error] = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert "damaged, frame" in error


def test_a_stream_from_the_network_is_recognised_until_it_stays_away_and_continues(here: Path) -> None:
    clip = write_video(here / "clip.ts", VideoSpec(count=60, gop=5, b_frames=0)).read_bytes()
    words = ["--give-up", "0.6", "--jsonl", "net.jsonl", "--state", "net.state", "--report", "net.json"]
    for _ in range(2):
        with tcp_server([(clip, 0)]) as address:
            done = CliRunner().invoke(cli, [*STREAM, address, *words])
        assert done.exit_code == 1, done.output
        assert "no frame for" in done.stderr.splitlines()[-1]
        found = lines((here / "net.jsonl").read_text())
        report = json.loads((here / "net.json").read_text())
        assert report["sampled"] in (2, 3)
        assert len(lines(done.stdout)) == report["recognised"] == report["sampled"] - report["dropped"]
        assert [one["frame"] for one in found] == sorted({one["frame"] for one in found})
        times_s = [one["time_s"] for one in found]
        assert times_s == sorted(times_s)
    assert times_s[-1] > 3  # the first one ends at 2 s, and the time between the two is part of it


def test_a_stream_by_udp_is_recognised_while_another_process_sends_it(here: Path) -> None:
    write_video(here / "sent.ts", VideoSpec(count=80, gop=5, b_frames=0))
    port = free_port()
    sender = [sys.executable, "-m", "tests.live.sources.serving", str(here / "sent.ts"), str(port), "3.2"]
    with subprocess.Popen(sender, cwd=PROJECT) as process:
        done = CliRunner().invoke(cli, [*STREAM, f"udp://127.0.0.1:{port}", "--give-up", "1", "--report", "udp.json"])
        process.kill()
    assert done.exit_code == 1, done.output
    found, report = lines(done.stdout), json.loads((here / "udp.json").read_text())
    assert 1 <= len(found) == report["recognised"] == report["sampled"] - report["dropped"]
    assert all(0 < one["delay_s"] < 60 for one in found)
    assert report["frames"] > 10
