"""Several encoders in one call: each video is decoded once, and the files are those of one call per encoder."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import engine.files
import features.frames.source
from configs.errors import UserError
from configs.schema import Config
from engine.files import NoRoomError, sha256_ends
from engine.stopping import Stopped, StopRequest
from features.dataset.index import Index
from features.dataset.sampling import sampled_frames
from features.frames.source import cache_request, frame_cache
from features.store import read_features
from features.store_folder import usable_index, verify_folder
from stage1_cnn.encoders.backbone import build_backbone
from stage1_cnn.extract import ExtractReport, ExtractRequest, extract, extract_each
from stage1_cnn.shared_decode import Reasons, reason_of
from tests.stage1_cnn.material import FRAMES, StopAfter, World, flip_bytes, make_world, paint, truncate, write_labels
from tests.videos import VideoSpec, write_video

IDS = ["video01", "video02", "video03", "video04"]
SIZES: Sequence[dict[str, int]] = ({}, {"resize_px": 48, "crop_px": 40}, {})  # of the first, second and third encoder


def settings_of(world: World, number: int, **extract_settings: Any) -> Config:
    """The settings of one of three encoders: the same backbone with other weights; the second sees larger images."""
    chosen = {"encoder": "initial", **extract_settings}
    return world.set(top={"seed": number}, preprocess=SIZES[number], extract=chosen)


def requests(world: World, **extract_settings: Any) -> list[ExtractRequest]:
    return [ExtractRequest(settings_of(world, number, **extract_settings)) for number in range(3)]


def dump(world: World, *, index: Index | None = None, stop: StopRequest | None = None, **chosen: Any):
    return extract_each(requests(world, **chosen), world.dataset(index), stop=stop or StopRequest())


def content(reports: Sequence[ExtractReport]) -> list[dict[str, bytes]]:
    return [{path.name: path.read_bytes() for path in sorted(report.folder.iterdir())} for report in reports]


def separately(world: World, index: Index | None = None) -> list[dict[str, bytes]]:
    """The files of one call per encoder, which are removed."""
    found = []
    for request in requests(world, workers=1):
        report = extract(request.config, None, world.dataset(index), stop=StopRequest())
        found += content([report])
        shutil.rmtree(report.folder)
    return found


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ids of the videos that this process opens to read frames."""
    real, seen = features.frames.source.open_source, list[str]()

    def noting(config: Config, dataset: Any, entry: Any, hardware: str | None = None) -> Any:
        seen.append(entry.id)
        return real(config, dataset, entry, hardware)

    monkeypatch.setattr(features.frames.source, "open_source", noting)
    return seen


# ---------------------------------------------------------------------------------------------- the same bytes


def test_each_video_is_decoded_once_and_the_files_are_those_of_single_calls(world: World, opened: list[str]) -> None:
    expected = separately(world)
    opened.clear()
    reports = dump(world, workers=1)
    assert opened == IDS
    assert content(reports) == expected
    for report in reports:
        assert (report.done, report.frames) == (IDS, 52)
        assert min(report.decode_seconds, report.encode_seconds) > 0
        assert report.frames_per_s == pytest.approx(52 / (report.decode_seconds + report.encode_seconds))
        assert f"{report.frames_per_s:.1f} frames/s without the other encoders)" in report.sentence()


@pytest.mark.slow
def test_processes_parts_and_decoding_ahead_change_no_byte(tmp_path: Path) -> None:
    root = tmp_path / "data"
    root.mkdir()
    write_video(root / "video01.mp4", VideoSpec(count=FRAMES, width_px=160, height_px=120, paint=paint))
    write_labels(root, 1)
    base = make_world(tmp_path, root)
    world = World(tmp_path, root, base.set(data={"split": {"rule": "1/0/0"}}))
    expected = separately(world)
    for chosen in ({"workers": 2, "segment_frames": 1}, {"workers": 2, "segment_frames": 1, "decode_ahead": "on"}):
        reports = dump(world, **chosen)
        assert content(reports) == expected, chosen
        for report in reports:
            assert min(report.decode_seconds, report.encode_seconds) > 0
            shutil.rmtree(report.folder)


def test_the_cache_serves_the_encoders_that_it_fits(world: World, opened: list[str]) -> None:
    index = world.index()
    config, entry = settings_of(world, 1), index.videos[0]
    frame_index = sampled_frames(entry, config.data.fps)
    frame_cache(config).ensure(cache_request(config, world.dataset(index), entry, frame_index)).close()
    expected = separately(world, index)
    opened.clear()
    reports = dump(world, index=index)
    assert opened == IDS  # video01 for the two encoders whose size is not in the cache
    assert content(reports) == expected
    origins = [read_features(report.folder / "video01.h5").attributes["frames_from"] for report in reports]
    assert origins == ["source", "cache", "source"]
    flip_bytes(frame_cache(config).path("video01"), 0.6, 2000)
    (reports[1].folder / "video01.h5").unlink()
    (reports[2].folder / "video01.h5").unlink()
    again = dump(world, index=index)
    origins = [read_features(report.folder / "video01.h5").attributes["frames_from"] for report in again]
    assert origins == ["source", "source", "source"]


# ---------------------------------------------------------------------------------------------- running again


def test_only_what_is_missing_is_decoded_and_only_for_the_encoders_that_miss_it(
    own_world: World, opened: list[str]
) -> None:
    reports = dump(own_world)
    expected = content(reports)
    (reports[0].folder / "video02.h5").unlink()
    truncate(reports[2].folder / "video02.h5", 0.6)
    (reports[1].folder / "video04.h5").unlink()
    opened.clear()
    again = dump(own_world)
    assert opened == ["video02", "video04"]
    assert [report.done for report in again] == [["video02"], ["video04"], ["video02"]]
    assert [len(report.skipped) for report in again] == [3, 3, 3]
    assert content(again) == expected
    path = own_world.root / "video03-tool.txt"
    path.write_text(path.read_text().replace("\t1\t0", "\t0\t1"))
    (reports[1].folder / "video03.h5").unlink()
    opened.clear()
    again = dump(own_world)
    assert opened == ["video03"]
    assert [(report.done, report.relabelled) for report in again] == [
        ([], ["video03"]),
        (["video03"], []),
        ([], ["video03"]),
    ]
    tools = [read_features(report.folder / "video03.h5").tools.tolist() for report in again]
    assert tools[0] == tools[1] == tools[2]


@pytest.mark.parametrize("asked", [2, 7])
def test_a_stop_leaves_whole_files_that_the_next_start_keeps(world: World, asked: int) -> None:
    expected = separately(world)
    with pytest.raises(Stopped):
        dump(world, stop=StopAfter(asked))
    assert not list(world.config.extract.store.rglob("*.tmp"))
    reports = dump(world)
    assert {len(report.skipped) for report in reports} == {asked // 5}  # a video takes five polls
    assert content(reports) == expected


def test_every_run_gets_its_result(world: World) -> None:
    runs = [world.config.runs / name for name in ("a", "b")]
    pair = [ExtractRequest(settings_of(world, number), run) for number, run in enumerate(runs)]
    reports = extract_each(pair, world.dataset(), stop=StopRequest())
    for run, report in zip(runs, reports, strict=True):
        result = json.loads((run / "extract/result.json").read_text())
        assert (result["folder"], result["done"], result["processes"]) == (str(report.folder), IDS, 1)
        assert result["encode_seconds"] == report.encode_seconds > 0
        alone = extract(settings_of(world, reports.index(report)), run, world.dataset(), stop=StopRequest())
        assert alone.skipped == IDS  # the same identity


# ---------------------------------------------------------------------------------------------- faults


def test_a_damaged_video_is_left_out_for_every_encoder(own_world: World) -> None:
    index = own_world.index()
    path = own_world.root / "video03.mp4"
    truncate(path, 0.6)
    os.utime(path, ns=(0, 0))
    changed = {"sha256_ends": sha256_ends(path), "size_bytes": path.stat().st_size}
    videos = tuple(e.model_copy(update=changed) if e.id == "video03" else e for e in index.videos)
    index = index.model_copy(update={"videos": videos})
    expected = separately(own_world, index)
    reports = dump(own_world, index=index)
    assert content(reports) == expected
    for report in reports:
        assert [video_id for video_id, _ in report.failed] == ["video03"]
        assert [entry.id for entry in usable_index(report.folder).videos] == ["video01", "video02", "video04"]


@pytest.mark.parametrize("ahead", ["off", "on"])
def test_an_encoder_that_fails_does_not_stop_the_others(world: World, tmp_path: Path, ahead: str) -> None:
    state = build_backbone("shufflenet_v2_x0_5", "random", 0).net.state_dict()
    state["conv5.1.bias"] = torch.full_like(state["conv5.1.bias"], 1e6)
    torch.save(state, tmp_path / "large.pth")
    chosen = {"encoder": "initial", "storage": "float16", "decode_ahead": ahead}
    large = world.set(cnn={"weights": str(tmp_path / "large.pth")}, extract=chosen)
    good = world.set(preprocess=SIZES[1], extract=chosen)
    run = world.config.runs / "good"
    pair = [ExtractRequest(large), ExtractRequest(good, run)]
    said = r"video01: features of sample 0 \(frame 0\) do not fit float16; use extract.storage=float32 .* 3 more videos"
    with pytest.raises(UserError, match=said):
        extract_each(pair, world.dataset(), stop=StopRequest())
    result = json.loads((run / "extract/result.json").read_text())
    assert (result["done"], result["failed"]) == (IDS, [])
    assert all(problem is None for _, problem in verify_folder(Path(result["folder"])))
    others = [path for path in world.config.extract.store.iterdir() if path != Path(result["folder"])]
    assert [sorted(path.name for path in folder.iterdir()) for folder in others] == [["encoder.json", "index.json"]]


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ({"cnn": {"weights": "nowhere.pth"}}, "nowhere.pth"),
        ({"cnn": {"backbone": "resnet9"}}, "resnet9"),
        (
            {"data": {"fps": 1}},
            r"cannot share one decode: data.fps: 5.0 there, 1.0 now; give both the same value",
        ),
        ({"extract": {"batch_frames": 3}}, r"extract.batch_frames: 4 there, 3 now"),
        ({}, r"shufflenet_v2_x0_5-\w{12}: two of the encoders would write to it"),
    ],
)
def test_a_request_that_cannot_work_is_refused_before_any_frame_is_read(
    world: World, opened: list[str], blocks: dict[str, Any], message: str
) -> None:
    first = world.set(extract={"encoder": "initial"})
    second = world.set(**{**blocks, "extract": {"encoder": "initial", **blocks.get("extract", {})}})
    with pytest.raises(UserError, match=message):
        extract_each([ExtractRequest(first), ExtractRequest(second)], world.dataset(), stop=StopRequest())
    assert opened == []
    assert not world.config.extract.store.exists()


def test_the_disk_needs_room_for_the_features_of_all(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    class Some:
        free = 1_000_000  # enough for one encoder, whose four files take 4 * (13 * 4160 + 64000) bytes at most

    monkeypatch.setattr(engine.files.shutil, "disk_usage", lambda path: Some)
    with pytest.raises(NoRoomError, match="the features needs about 1 MB and only 1 MB are free"):
        dump(world)
    assert not world.config.extract.store.exists()


def test_no_requests_are_no_work(world: World) -> None:
    assert extract_each([], world.dataset(), stop=StopRequest()) == []


def test_reasons_keep_which_encoder_failed_when_they_are_sent() -> None:
    sent = pickle.loads(pickle.dumps(Reasons({2: "disk", 5: "net"})))  # noqa: S301
    assert [reason_of(sent, number) for number in (2, 3, 5)] == ["disk", None, "net"]
    assert (str(sent), reason_of("all", 7), reason_of(None, 0)) == ("disk", "all", None)
