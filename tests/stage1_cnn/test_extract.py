from __future__ import annotations

import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import engine.files
import stage1_cnn.encoders.encoder
from configs.encoder_spec import EncoderDescription
from configs.errors import UserError
from configs.load import load_dataset
from configs.schema import CnnConfig, Config, DataConfig, ExtractConfig
from engine.stopping import Stopped, StopRequest
from features.dataset.build import build_index
from features.dataset.index import Dataset, Index
from features.dataset.trained_on import trained_on
from features.frames.source import frame_batches
from features.store import read_features
from features.store_folder import load_feature_set, usable_index, verify_folder
from stage1_cnn.encoders.backbone import build_backbone
from stage1_cnn.encoders.encoder import load_encoder
from stage1_cnn.extract import ExtractReport, extract
from stage1_cnn.train import train_cnn
from tests.stage1_cnn.material import (
    FRAMES,
    SPEC,
    StopAfter,
    World,
    flip_bytes,
    truncate,
    write_labels,
)
from tests.videos import VideoSpec, write_video

PROJECT = Path(__file__).resolve().parents[2]
IDS = ["video01", "video02", "video03", "video04"]


def dump(world: World, config: Config | None = None, *, index: Index | None = None, **options) -> ExtractReport:
    """Extract with the untrained backbone, unless the settings say otherwise."""
    config = config or world.set(extract={"encoder": "initial"})
    run = options.pop("run", world.run)
    stop = options.pop("stop", None)
    stop = StopRequest() if stop is None else stop
    return extract(config, run, world.dataset(index), stop=stop, **options)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.h5"))}


def features(folder: Path) -> dict[str, np.ndarray]:
    return {path.stem: read_features(path).features for path in sorted(folder.glob("*.h5"))}


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert list(found) == list(expected)
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name])


def temporaries(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name.endswith(".tmp")]


# ---------------------------------------------------------------------------------------------- the contract


def test_the_file_holds_what_the_contract_lists(world: World) -> None:
    train_cnn(world.set(cnn={"epochs": 1}), world.run, world.dataset(), StopRequest())
    report = dump(world, world.config, run=world.run)
    assert (report.done, report.frames) == (IDS, 52)
    video = read_features(report.folder / "video01.h5")
    assert video.features.shape == (13, 1024)
    assert video.features.dtype == np.float32
    np.testing.assert_array_equal(video.frame_index, np.arange(0, FRAMES, 5))
    np.testing.assert_allclose(video.time_s, np.arange(13) / 5)
    assert video.phase.tolist() == [min(k * 15 // FRAMES, 2) for k in range(13)]
    assert video.tools.shape == video.tool_logits.shape == (13, 2)
    assert np.isfinite(video.tool_logits).all()
    entry = world.index().entry("video01")
    expected = {
        "schema_version": 1,
        "video_id": "video01",
        "source_sha256_ends": entry.sha256_ends,
        "source_size_bytes": entry.size_bytes,
        "source_fps": 25.0,
        "fps": 5.0,
        "backbone": "shufflenet_v2_x0_5",
        "precision": "fp32",
        "device": "cpu",
        "phase_sha256": entry.phase_file.sha256,
        "tool_sha256": entry.tool_file.sha256,
        "phases": json.dumps(SPEC.phases),
        "tools": json.dumps(SPEC.tools),
        "tools_between_rows": "mask",
        "dataset": "tiny",
        "complete": True,
    }
    assert {key: video.attributes[key] for key in expected} == expected
    assert {"weights_sha256", "reader", "reader_version", "package_version"} <= set(video.attributes)
    assert json.loads(video.attributes["preprocess"])["crop_px"] == 32
    assert report.folder.name == f"shufflenet_v2_x0_5-{video.attributes['encoder_digest'][:12]}"
    assert Index.load(report.folder / "index.json") == world.index()
    assert json.loads((report.folder / "encoder.json").read_text())["digest"] == video.attributes["encoder_digest"]
    assert all(problem is None for _, problem in verify_folder(report.folder))
    pointer = json.loads((world.run / "extract/result.json").read_text())
    assert (pointer["folder"], pointer["failed"]) == (str(report.folder), [])
    with h5py.File(report.folder / "video01.h5") as file:
        assert file["features"].fletcher32
        assert file["features"].compression is None


def test_the_process_is_left_as_it_was(world: World) -> None:
    """A training after it in the same process, as in `run`, gives the same as a training alone."""
    train_cnn(world.set(cnn={"epochs": 1}), world.run, world.dataset(), StopRequest())

    def state() -> list[Any]:
        cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
        switches = [cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic, matmul.allow_tf32]
        switches += [torch.backends.mkldnn.enabled, torch.get_num_threads(), torch.get_default_dtype()]
        generators = [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]
        return [*switches, *generators, torch.is_grad_enabled(), socket.getdefaulttimeout(), warnings.filters[:]]

    before = state()
    for encoder in ("finetuned", "initial"):
        run = world.run if encoder == "finetuned" else world.run.with_name("second")
        dump(world, world.set(extract={"encoder": encoder}), run=run)
    assert state() == before


def test_untrained_encoder_has_no_tool_logits(world: World) -> None:
    report = dump(world)
    assert np.isnan(read_features(report.folder / "video02.h5").tool_logits).all()


def test_finetuned_logits_are_those_of_the_checkpoint(world: World) -> None:
    from features.frames.preprocess import Geometry, crop_frames, normalise
    from stage1_cnn.model import rebuild_from_checkpoint
    from tests.videos import decode_everything

    train_cnn(world.set(cnn={"epochs": 1}), world.run, world.dataset(), StopRequest())
    video = read_features(dump(world, world.config).folder / "video04.h5")
    net, _ = rebuild_from_checkpoint(world.run / "cnn/best.pt")
    pictures = decode_everything(world.root / "video04.mp4")[::5]
    crops = crop_frames(np.stack([Geometry(40).resize_frame(rgb) for rgb in pictures]), 32)[:, 0]
    with torch.inference_mode():
        output = net(normalise(crops, world.config.preprocess))
    np.testing.assert_allclose(video.features, output.embedding.numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(video.tool_logits, output.tool_logits.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_real_clips_equal_a_restatement_that_shares_no_code(shared_data: Path, tmp_path: Path) -> None:
    """Five clips, random ResNet50, fp32; the restatement decodes everything with PyAV, and uses Pillow and
    torchvision.
    """
    import av
    import torchvision
    from PIL import Image

    config = Config(
        seed=11,
        device="cpu",
        runs=tmp_path / "runs",
        data=DataConfig(root=shared_data / "clips", fps=1),
        cnn=CnnConfig(backbone="resnet50", weights="random"),
        extract=ExtractConfig(
            store=tmp_path / "features", encoder="initial", precision="fp32", storage="float32", workers=1
        ),
    )
    index = build_index(shared_data / "clips", load_dataset("cholec80"), config.data)
    report = extract(config, None, Dataset(index, shared_data / "clips"), stop=StopRequest())
    assert report.done == ["video05", "video15", "video18", "video25", "video47"]

    torch.manual_seed(11)
    net = torchvision.models.resnet50(weights=None)
    net.fc = torch.nn.Identity()
    net.eval()
    mean = torch.tensor([0.3456, 0.2281, 0.2233]).view(3, 1, 1)
    std = torch.tensor([0.2528, 0.2135, 0.2104]).view(3, 1, 1)
    for name in report.done:
        images = []
        with av.open(str(shared_data / f"clips/videos/{name}.mp4")) as container:
            for number, frame in enumerate(container.decode(video=0)):
                if number % 25 == 0:
                    picture = Image.fromarray(frame.to_ndarray(format="rgb24")).resize((250, 250), Image.BILINEAR)
                    pixels = torch.from_numpy(np.array(picture)[13:237, 13:237]).permute(2, 0, 1)
                    images.append((pixels.float() / 255 - mean) / std)
        with torch.inference_mode():
            expected = net(torch.stack(images)).numpy()
        video = read_features(report.folder / f"{name}.h5")
        assert video.features.shape == expected.shape == (32, 2048)
        # relative to each value; those near zero, relative to a thousandth of the largest
        np.testing.assert_allclose(video.features, expected, rtol=1e-4, atol=1e-7 * float(np.abs(expected).max()))
        np.testing.assert_array_equal(video.frame_index, np.arange(32) * 25)


# ---------------------------------------------------------------------------------------------- running again


def test_what_verifies_is_left_alone(world: World) -> None:
    first = dump(world)
    before = {path: path.stat().st_mtime_ns for path in first.folder.glob("*.h5")}
    again = dump(world)
    assert (again.skipped, again.done, again.frames) == (IDS, [], 0)
    assert {path: path.stat().st_mtime_ns for path in first.folder.glob("*.h5")} == before
    assert "4 unchanged" in again.sentence()


def test_damaged_files_are_made_again(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    folder = dump(world).folder
    expected = features(folder)
    truncate(folder / "video01.h5", 0.6)
    flip_bytes(folder / "video02.h5", 0.5)
    (folder / "video03.h5").write_bytes(b"")
    report = dump(world)
    assert (report.done, report.skipped) == (IDS[:3], IDS[3:])
    assert_same(features(folder), expected)
    assert "video02.h5: " in capsys.readouterr().err


def test_edited_labels_rewrite_labels_alone(own_world: World) -> None:
    folder = dump(own_world).folder
    expected = features(folder)
    path = own_world.root / "video02-tool.txt"
    path.write_text(path.read_text().replace("\t1\t0", "\t0\t1"))
    for kind in ("phase", "tool"):
        (own_world.root / f"video03-{kind}.txt").unlink()
    report = dump(own_world)
    assert (report.relabelled, report.skipped, report.done) == (IDS[1:3], ["video01", "video04"], [])
    assert_same(features(folder), expected)
    unlabelled = read_features(folder / "video03.h5")
    assert (unlabelled.phase == -1).all()
    assert (unlabelled.tools == -1).all()
    assert read_features(folder / "video02.h5").tools[2].tolist() == [0, 1]
    assert dump(own_world).skipped == IDS
    held = dump(own_world, own_world.set(extract={"encoder": "initial"}, data={"tools_between_rows": "hold"}))
    assert held.relabelled == IDS


@pytest.mark.parametrize("ahead", ["off", "on"])
def test_annotation_files_are_parsed_once(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead: str
) -> None:
    parsed: list[str] = []

    def noting(path: Path) -> bytes:
        parsed.append(path.name)
        return path.read_bytes()

    index = world.index()
    index = index.model_copy(update={"videos": index.videos[:1]})
    monkeypatch.setattr("features.dataset.labels.read_content", noting)
    chosen = {"encoder": "initial", "workers": 1, "decode_ahead": ahead, "store": tmp_path}
    assert dump(world, world.set(extract=chosen), index=index).done == ["video01"]
    assert sorted(parsed) == ["video01-phase.txt", "video01-tool.txt"]


def test_times_are_the_streams_own_and_an_index_without_them_is_refused(own_world: World) -> None:
    times_s = np.arange(FRAMES) * 0.04 + 1.5 * (np.arange(FRAMES) >= 30)
    spec = VideoSpec(count=FRAMES, width_px=64, height_px=48, times_s=tuple(times_s.tolist()))
    write_video(own_world.root / "video02.mp4", spec)
    index = own_world.index()
    path = dump(own_world).folder / "video02.h5"
    video = read_features(path)
    np.testing.assert_allclose(video.time_s, times_s[video.frame_index], atol=1e-4)
    assert np.diff(video.time_s).max() > 1.4
    assert dump(own_world).skipped == IDS
    older = index.to_json()
    del older["videos"][1]["times"]
    report = dump(own_world, index=Index.from_json(older))
    assert [video_id for video_id, _ in report.failed] == ["video02"]
    assert "an earlier version indexed other frames or other times of frames; run" in report.failed[0][1]


def test_a_replaced_video_is_done_again(own_world: World) -> None:
    folder = dump(own_world).folder
    before = features(folder)
    write_video(own_world.root / "video02.mp4", VideoSpec(count=FRAMES, width_px=64, height_px=48))
    stale = dump(own_world, index=Index.load(folder / "index.json"))
    ((name, reason),) = stale.failed
    assert name == "video02"
    assert reason.startswith(f"{own_world.root}/video02.mp4: has changed since it was indexed; run `index --force`")
    report = dump(own_world)
    assert (report.done, report.skipped) == (["video02"], ["video01", "video03", "video04"])
    assert not np.array_equal(features(folder)["video02"], before["video02"])


def test_features_outlive_their_videos(own_world: World) -> None:
    index = own_world.index()
    dump(own_world, index=index)
    (own_world.root / "video01.mp4").unlink()
    os.utime(own_world.root / "video02.mp4")  # copied, not changed
    assert dump(own_world, index=index).skipped == IDS


def test_another_encoder_goes_elsewhere_and_never_into_the_same_folder(world: World) -> None:
    first = dump(world)
    other = world.set(extract={"encoder": "initial"}, top={"seed": 1})
    second = dump(world, other, run=None)
    assert second.folder != first.folder
    with pytest.raises(UserError, match=r"features of two encoders cannot share a folder"):
        dump(world, other, run=None, folder=first.folder)
    shutil.copy(second.folder / "video01.h5", first.folder / "video01.h5")
    with pytest.raises(UserError, match=r"video0[12].h5: made by encoder"):
        load_feature_set(first.folder, IDS)
    assert dump(world).done == ["video01"]


def test_another_data_set_is_refused(world: World) -> None:
    folder = dump(world).folder
    before = content(folder)
    index = world.index()
    foreign = index.model_copy(update={"dataset": index.dataset.model_copy(update={"name": "other"})})
    with pytest.raises(UserError, match=r"holds features of data set tiny, not other; choose another extract.store"):
        dump(world, index=foreign, run=None)
    assert content(folder) == before


def test_a_run_does_not_change_its_features_silently(world: World) -> None:
    dump(world)
    with pytest.raises(UserError, match=r"extract.storage: float32 there, float16 now"):
        dump(world, world.set(extract={"encoder": "initial", "storage": "float16"}))


def test_a_folder_of_its_own_leaves_the_runs_pointer_alone(world: World, tmp_path: Path) -> None:
    report = dump(world, folder=tmp_path / "elsewhere")
    assert report.folder == tmp_path / "elsewhere"
    assert len(content(report.folder)) == 4
    assert not (world.run / "extract").exists()


# ---------------------------------------------------------------------------------------------- bad input


def test_one_bad_video_does_not_end_the_others(own_world: World) -> None:
    index = own_world.index()
    expected = features(dump(own_world, index=index, run=None).folder)
    shutil.rmtree(own_world.config.extract.store)
    entries = {entry.id: entry for entry in index.videos}
    for name, damage in (("video01", lambda p: p.write_bytes(b"")), ("video03", lambda p: truncate(p, 0.6))):
        path = own_world.root / f"{name}.mp4"
        damage(path)
        os.utime(path, ns=(0, 0))
        from engine.files import sha256_ends

        # as if it had been like that when it was indexed
        entries[name] = entries[name].model_copy(
            update={"sha256_ends": sha256_ends(path), "size_bytes": max(1, path.stat().st_size)}
        )
    (own_world.root / "video04-phase.txt").unlink()
    report = dump(own_world, index=index.model_copy(update={"videos": tuple(entries.values())}))
    assert report.done == ["video02"]
    assert [video_id for video_id, _ in report.failed] == ["video01", "video03", "video04"]
    assert all("\n" not in reason and f"{video_id}" in reason for video_id, reason in report.failed)
    assert sorted(path.name for path in report.folder.iterdir()) == [
        "encoder.json",
        "index.json",
        "video01.left_out.json",
        "video02.h5",
        "video03.left_out.json",
        "video04.left_out.json",
    ]
    assert [entry.id for entry in usable_index(report.folder).videos] == ["video02"]
    np.testing.assert_array_equal(features(report.folder)["video02"], expected["video02"])
    assert json.loads((own_world.run / "extract/result.json").read_text())["failed"][0][0] == "video01"
    assert "3 failed" in report.sentence()


def test_errors_outside_a_video_are_not_recorded_as_its_fault(
    own_world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device without memory, say: nothing is recorded, so that stage two asks for `extract` to be run again."""

    def encoder_without_memory(*_: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(stage1_cnn.encoders.encoder.Encoder, "__call__", encoder_without_memory)
        with pytest.raises(UserError, match=r"RuntimeError: out of memory \(and 3 more videos"):
            dump(own_world)
    index = own_world.index()
    (own_world.root / "video01.mp4").unlink()
    report = dump(own_world, index=index)
    report.require_others_done()
    assert [video_id for video_id, _ in report.failed] == ["video01"]
    assert [path.name for path in report.folder.glob("*.left_out.json")] == ["video01.left_out.json"]
    (next(report.folder.glob("*4.h5"))).unlink()
    with monkeypatch.context() as patch:
        patch.setattr(stage1_cnn.encoders.encoder.Encoder, "__call__", encoder_without_memory)
        with pytest.raises(UserError, match=r"1 video\(s\) were not done, first video04: .* start again"):
            dump(own_world, index=index).require_others_done()
    assert [path.name for path in report.folder.glob("*.left_out.json")] == ["video01.left_out.json"]


def test_batch_sizes_change_rounding_only(world: World, tmp_path: Path) -> None:
    """Therefore their size is not part of the digest."""
    reports = [
        dump(world, world.set(extract={"encoder": "initial", "batch_frames": size}), folder=tmp_path / str(size))
        for size in (1, 3, 64)
    ]
    first, *others = (features(report.folder) for report in reports)
    for found in others:
        assert list(found) == list(first)
        for name, rows in first.items():
            np.testing.assert_allclose(found[name], rows, rtol=1e-4, atol=1e-5 * float(abs(rows).max()))
    assert len({json.loads((report.folder / "encoder.json").read_text())["digest"] for report in reports}) == 1


def test_a_png_cut_in_half(tmp_path: Path) -> None:
    from PIL import Image

    from tests.stage1_cnn.material import make_world, paint

    root = tmp_path / "data"
    for number in (1, 2):
        folder = root / f"frames{number:02d}"
        folder.mkdir(parents=True)
        for frame in range(0, FRAMES, 5):
            Image.fromarray(paint(frame, 64, 48)).save(folder / f"{frame:06d}.png")
        write_labels(root, number)
    picture = root / "frames01/000020.png"
    picture.write_bytes(picture.read_bytes()[: picture.stat().st_size // 2])
    base = make_world(tmp_path, root)
    data = {"split": {"rule": "1/0/1"}, "frame_numbering": "source"}
    world = World(tmp_path, root, base.set(data=data, extract={"encoder": "initial"}))
    report = dump(world, world.config)
    assert report.done == ["video02"]
    assert report.failed[0][0] == "video01"
    assert "000020.png" in report.failed[0][1]
    assert not temporaries(report.folder)


def test_values_that_do_not_fit_half_precision(world: World, tmp_path: Path) -> None:
    state = build_backbone("shufflenet_v2_x0_5", "random", 0).net.state_dict()
    state["conv5.1.bias"] = torch.full_like(state["conv5.1.bias"], 1e6)
    torch.save(state, tmp_path / "large.pth")
    config = world.set(
        cnn={"weights": str(tmp_path / "large.pth")}, extract={"encoder": "initial", "storage": "float16"}
    )
    said = r"video01: features of sample 0 \(frame 0\) do not fit float16; use extract.storage=float32 .* 3 more videos"
    with pytest.raises(UserError, match=said):
        dump(world, config)
    (folder,) = config.extract.store.iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["encoder.json", "index.json"]


def test_a_disk_without_room_is_noticed_before(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        free = 1000

    monkeypatch.setattr(engine.files.shutil, "disk_usage", lambda path: Full)
    with pytest.raises(UserError, match=r"the features needs about .* MB and only 0 MB are free"):
        dump(world)
    assert not list(world.config.extract.store.rglob("*.h5"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, r"runs/first/cnn/best.pt: no such checkpoint; run train-cnn .*extract.encoder=initial"),
        ({"extract": {"checkpoint": "nowhere.pt"}}, "nowhere.pt: no such checkpoint"),
        ({"extract": {"encoder": "initial"}, "cnn": {"backbone": "vit_b_32"}}, "vit_b_32 cannot take images"),
        (
            {"extract": {"encoder": "initial"}, "data": {"fps": 50}},
            r"data.fps=50 is too high.*3 more videos\)",
        ),
    ],
)
def test_settings_that_allow_nothing(world: World, changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        dump(world, world.set(**changes))
    assert not world.config.extract.store.exists()
    assert not world.run.exists()


def test_labels_edited_after_indexing_are_noticed(own_world: World) -> None:
    index = own_world.index()
    folder = dump(own_world, index=index).folder
    before = content(folder)
    path = own_world.root / "video02-tool.txt"
    path.write_text(path.read_text().replace("\t1\t0", "\t0\t1"))
    ((name, reason),) = dump(own_world, index=index).failed
    assert name == "video02"
    assert reason.startswith(f"{path}: has changed since it was indexed; run `index --force`")
    assert content(folder) == before


def test_checkpoints_of_something_else(world: World) -> None:
    with pytest.raises(UserError, match=r"takes the CNN of a run: give --name, or set extract.encoder=initial"):
        dump(world, world.config, run=None)
    train_cnn(world.set(cnn={"epochs": 1}), world.run, world.dataset(), StopRequest())
    with pytest.raises(UserError, match=r"best.pt: holds shufflenet_v2_x0_5, but cnn.backbone=resnet18"):
        dump(world, world.set(cnn={"backbone": "resnet18"}))
    index = world.index()
    swapped = index.model_copy(update={"dataset": index.dataset.model_copy(update={"tools": ("Hook", "Grasper")})})
    with pytest.raises(UserError, match=r"its tools are Grasper, Hook; the index has Hook, .*extract.tool_head=false"):
        dump(world, world.config, index=swapped)
    report = dump(world, world.set(extract={"tool_head": False}), index=swapped)
    found = read_features(report.folder / "video01.h5")
    assert np.isnan(found.tool_logits).all()
    own = load_encoder(world.config, world.run, index.dataset.tools)
    assert found.attributes["encoder_digest"] == own.spec.digest
    (trained,) = trained_on(report.folder)
    assert list(trained.videos) == ["video01", "video02", "video03"]


# ---------------------------------------------------------------------------------------------- shards, cache, stopping


def test_shards_make_the_whole(world: World) -> None:
    whole = dump(world, run=None)
    expected = features(whole.folder)
    shutil.rmtree(whole.folder)
    parts = [dump(world, shard=(number, 3)) for number in range(3)]
    assert [part.done for part in parts] == [["video01", "video04"], ["video02"], ["video03"]]
    assert_same(features(whole.folder), expected)
    with pytest.raises(UserError, match="shard 3/3"):
        dump(world, shard=(3, 3))


def test_cache_and_video_give_the_same_features(own_world: World) -> None:
    config = own_world.set(extract={"encoder": "initial"}, cnn={"epochs": 1})
    index = own_world.index()
    from_video = dump(own_world, config, run=None)
    expected = features(from_video.folder)
    shutil.rmtree(from_video.folder)
    train_cnn(config, own_world.run, own_world.dataset(index), StopRequest())  # fills the cache of videos 1 to 3
    for name in IDS[:3]:
        (own_world.root / f"{name}.mp4").unlink()
    report = dump(own_world, config, index=index)
    assert report.done == IDS
    assert_same(features(report.folder), expected)
    made_from = [read_features(report.folder / f"{name}.h5").attributes["frames_from"] for name in IDS]
    assert made_from == ["cache", "cache", "cache", "source"]
    # a damaged cache is not used, and a JPEG cache never read
    flip_bytes(next(own_world.config.cache.dir.glob("*/video02.h5")), 0.6, 2000)
    shutil.rmtree(report.folder)
    assert [video_id for video_id, _ in dump(own_world, config, index=index).failed] == ["video02"]
    shutil.rmtree(report.folder)
    jpeg = own_world.set(extract={"encoder": "initial"}, cache={"codec": "jpeg"})
    assert dump(own_world, jpeg, index=index).done == ["video04"]


@pytest.mark.parametrize("asked", [1, 3, 9])
def test_stopped_anywhere_nothing_is_half_written(world: World, asked: int) -> None:
    with pytest.raises(Stopped):
        dump(world, stop=StopAfter(asked))
    (folder,) = world.config.extract.store.iterdir()
    assert not temporaries(folder)
    if asked >= 5:  # one poll before each video and one after each of its four batches
        assert all(problem is None for _, problem in verify_folder(folder))
    report = dump(world)
    assert sorted(report.done + report.skipped) == IDS
    assert len(report.skipped) == asked // 5
    other = dump(world, run=None, folder=world.base / "straight")
    assert_same(features(folder), features(other.folder))


@given(count=st.integers(1, 40), size=st.integers(1, 12))
@settings(deadline=None, max_examples=30)
def test_batches_are_cut_from_the_first_frame_on(count: int, size: int) -> None:
    frames = [np.full((4, 4, 3), number, np.uint8) for number in range(count)]
    cut = list(frame_batches(iter(frames), size))
    assert [len(batch) for batch in cut] == [size] * (count // size) + [count % size] * (count % size > 0)
    assert np.concatenate(cut)[:, 0, 0, 0].tolist() == list(range(count))
    assert all(batch.shape[1:] == (4, 4, 3) for batch in cut)


# ---------------------------------------------------------------------------------------------- processes


@pytest.mark.slow
def test_several_processes_give_the_same_bytes(world: World) -> None:
    one = dump(world, run=None)
    expected = content(one.folder)
    shutil.rmtree(one.folder)
    for decode_ahead in ("off", "on"):  # the processes encode too, or decode alone
        chosen = {"encoder": "initial", "workers": 2, "decode_ahead": decode_ahead}
        several = dump(world, world.set(extract=chosen), run=None)
        assert several.done == IDS
        assert content(several.folder) == expected
        shutil.rmtree(several.folder)


@pytest.mark.slow
def test_killed_at_any_moment_every_named_file_is_complete(world: World) -> None:
    """SIGKILL in the middle of the work: every file with a final name verifies, and the next start finishes."""
    script = (
        "import sys; from pathlib import Path; from tests.stage1_cnn.material import make_world\n"
        "from engine.stopping import StopRequest; from stage1_cnn.extract import extract\n"
        "world = make_world(Path(sys.argv[1]), Path(sys.argv[2]))\n"
        "config = world.set(extract={'encoder': 'initial', 'batch_frames': 1})\n"
        "extract(config, world.run, world.dataset(), stop=StopRequest())\n"
    )
    arguments = [sys.executable, "-c", script, str(world.base), str(world.root)]
    process = subprocess.Popen(arguments, cwd=PROJECT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 280
    while not list(world.config.extract.store.rglob("video02.h5")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.wait()
    (folder,) = world.config.extract.store.iterdir()
    assert all(problem is None for _, problem in verify_folder(folder))
    report = dump(world, world.set(extract={"encoder": "initial", "batch_frames": 1}))
    assert sorted(report.done + report.skipped) == IDS
    assert "video01" in report.skipped


def test_a_note_says_that_the_encoder_was_pretrained_on_the_data_set(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    described = EncoderDescription(
        title="", family="", network="", pretrained_on={"tiny": "videos 1 and 2", "other": "all videos"}
    )
    monkeypatch.setattr("features.dataset.overlaps.find_description", lambda name: described)
    note = "its release was pretrained on tiny (videos 1 and 2); results on these videos are too good"
    dump(world)
    assert note not in capsys.readouterr().err  # its weights are random
    file = world.base / "weights.pth"
    torch.save(build_backbone("shufflenet_v2_x0_5", "random", 0).net.state_dict(), file)
    dump(world, world.set(cnn={"weights": str(file)}, extract={"encoder": "initial"}), run=world.run.with_name("other"))
    said = capsys.readouterr().err
    assert f"note: shufflenet_v2_x0_5: {note}" in said
    assert "all videos" not in said
