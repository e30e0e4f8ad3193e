"""Feature folders made of other programs' files: axes, rates, labels, splits, ids; what is refused; starting again."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import UserError
from configs.load import load_config
from engine.stopping import StopRequest, watch_signals
from features.dataset.index import Index
from features.store import read_features
from interop.feature_files.export import export_features
from interop.feature_files.importing import ImportReport, Request, import_features

DIM = 4


@pytest.fixture
def stop() -> Iterator[StopRequest]:
    with watch_signals(leaving=False) as request:
        yield request


@pytest.fixture
def bring(tmp_path: Path, stop: StopRequest) -> Any:
    """Import `tmp_path/in` to `tmp_path/out`; keyword arguments are those of the request."""

    def call(overrides: tuple[str, ...] = (), place: str = "in", out: str = "out", **said: Any) -> ImportReport:
        config = load_config("cholec80", overrides)
        return import_features(tmp_path / place, tmp_path / out, config, Request(**said), stop)

    return call


def refusal(bring: Any, **said: Any) -> str:
    with pytest.raises(UserError) as caught:
        bring(**said)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def values(frames: int, seed: int = 0) -> np.ndarray:
    """Features (T, D) that float16 holds exactly."""
    return np.random.default_rng(seed).integers(-64, 64, (frames, DIM)).astype(np.float32) / 8


def mstcn(folder: Path, lengths: dict[str, int], names: tuple[str, ...] = ("SIL", "cut_tomato", "background")) -> None:
    """A folder as MS-TCN's authors publish theirs, in which the last lines have no line break."""
    for part in ("features", "groundTruth", "splits"):
        (folder / part).mkdir(parents=True)
    for seed, (video, frames) in enumerate(lengths.items()):
        np.save(folder / "features" / f"{video}.npy", values(frames, seed).T)
        truth = "\n".join(names[frame * len(names) // frames] for frame in range(frames))
        (folder / "groundTruth" / f"{video}.txt").write_text(truth)
    (folder / "mapping.txt").write_text("\n".join(f"{number} {name}" for number, name in enumerate(names)))
    *train, test = (f"{video}.txt" for video in lengths)
    (folder / "splits" / "train.split1.bundle").write_text("\n".join(train))
    (folder / "splits" / "test.split1.bundle").write_text(f"{test}\n")


def test_a_folder_of_mstcn(tmp_path: Path, bring: Any) -> None:
    lengths = {"rgb-01-1": 12, "rgb-02-1": 15, "rgb-03-2": 9}
    mstcn(tmp_path / "in", lengths)
    report = bring(fps=15.0)
    assert report.done == list(lengths)
    index = Index.load(tmp_path / "out/index.json")
    assert index.dataset.phases == ("SIL", "cut_tomato", "background")
    assert index.dataset.background == ("background",)
    assert {entry.id: entry.split for entry in index.videos} == dict(
        zip(lengths, ("train", "train", "test"), strict=True)
    )
    for seed, (video, frames) in enumerate(lengths.items()):
        found = read_features(tmp_path / "out" / f"{video}.h5")
        assert np.array_equal(np.asarray(found.features), values(frames, seed))
        assert found.phase.tolist() == [frame * 3 // frames for frame in range(frames)]  # with the last line
        assert np.array_equal(found.time_s, np.arange(frames) / 15)
        assert np.isnan(found.tool_logits).all()
    about = json.loads((tmp_path / "out/encoder.json").read_text())
    assert (about["arithmetic"], about["imported"]["program"]) == ("imported", "MS-TCN")
    assert about["imported"]["files"].keys() == lengths.keys()
    assert not list((tmp_path / "out").glob("*.tmp"))


def test_a_second_call_keeps_what_is_there(tmp_path: Path, bring: Any) -> None:
    mstcn(tmp_path / "in", {"a": 12, "b": 15})
    bring(fps=15.0)
    (tmp_path / "out/a.h5").unlink()
    (tmp_path / "in/groundTruth/b.txt").write_text("SIL\n" * 15)
    report = bring(fps=15.0)
    assert (report.done, report.skipped, report.relabelled) == (["a"], [], ["b"])
    assert not read_features(tmp_path / "out/b.h5").phase.any()
    assert bring(fps=15.0).skipped == ["a", "b"]
    damaged = bytearray((tmp_path / "out/a.h5").read_bytes())
    damaged[-1] ^= 1
    (tmp_path / "out/a.h5").write_bytes(damaged)
    assert bring(fps=15.0).done == ["a"]


def test_other_features_do_not_mix(tmp_path: Path, bring: Any) -> None:
    mstcn(tmp_path / "in", {"a": 12, "b": 15})
    mstcn(tmp_path / "new", {"c": 8, "d": 9})
    bring(fps=15.0)
    assert "choose another --out" in refusal(bring, fps=30.0)
    assert "choose another --out" in refusal(bring, place="new", fps=15.0)
    first, second = (bring(place=place, out=f"{place}-out", fps=15.0, encoder="I3D") for place in ("in", "new"))
    digests = {json.loads((one.folder / "encoder.json").read_text())["digest"] for one in (first, second)}
    assert len(digests) == 1
    np.savez(tmp_path / "e.npz", features=values(8))
    bring(place="e.npz", out="e", dataset="cholec80", fps=15.0, encoder="I3D", axes="TD")
    assert json.loads((tmp_path / "e/encoder.json").read_text())["digest"] in digests


def tecno(folder: Path, name: str, frames: int, seed: int = 0) -> None:
    """A pickle as TeCNO writes it: `pickle.dump([stems, p_phases, labels], f)`."""
    folder.mkdir(exist_ok=True)
    labels = [frame * 7 // frames for frame in range(frames)]
    (folder / name).write_bytes(pickle.dumps([values(frames, seed), np.zeros((frames, 7)), np.asarray(labels)]))


@pytest.mark.parametrize("name", ["video_1_25.0fps.pkl", "video_01_25.0fps.pkl"])  # as written, and as read
def test_pickles_of_tecno_at_25_fps(tmp_path: Path, bring: Any, name: str) -> None:
    tecno(tmp_path / "in", name, 110)
    tecno(tmp_path / "in", "video_12_25.0fps.pkl", 135, seed=1)
    report = bring(dataset="cholec80", every=25)
    assert report.done == ["video01", "video12"]
    found = read_features(tmp_path / "out/video01.h5")
    assert np.array_equal(np.asarray(found.features), values(110)[::25])
    assert found.frame_index.tolist() == [0, 25, 50, 75, 100]
    assert found.time_s.tolist() == [0, 1, 2, 3, 4]
    assert found.phase.tolist() == [k * 7 // 110 for k in range(0, 110, 25)]
    assert found.attributes["fps"] == 1.0
    assert "made at 25 rows per second" in refusal(bring, dataset="cholec80", fps=1.0)


def test_files_of_all_videos_of_a_part(tmp_path: Path, bring: Any) -> None:
    """Trans-SVNet: one array per part, and nine lists that say which rows are which video's."""
    folder = tmp_path / "in/LFB"
    folder.mkdir(parents=True)
    lengths = {"train": {1: 5, 2: 7}, "val": {41: 4}, "test": {41: 4, 42: 6}}
    paths, labels, counts, arrays_of = [], [], [], {}
    for part, videos in lengths.items():
        paths.append([f"/data/{number}/{number}-{k}.jpg" for number, frames in videos.items() for k in range(frames)])
        labels.append([[0, 1, 0, 0, 0, 0, 0, k % 7] for frames in videos.values() for k in range(frames)])
        counts.append(list(videos.values()))
        arrays_of[part] = np.concatenate([values(frames, number) for number, frames in videos.items()])
        (folder / f"g_LFB50_{part}.pkl").write_bytes(pickle.dumps(arrays_of[part].astype(np.float64)))
    order = [paths[0], paths[1], labels[0], labels[1], counts[0], counts[1], paths[2], labels[2], counts[2]]
    said = {"place": "in/LFB", "dataset": "cholec80", "fps": 1.0, "phase_order": "mtrcnet"}
    assert "train_val_paths_labels1.pkl, which says where each video begins" in refusal(bring, **said)
    (tmp_path / "in/train_val_paths_labels1.pkl").write_bytes(pickle.dumps(order))
    assert "give their order with --phase-order" in refusal(bring, **said | {"phase_order": None})
    assert bring(**said).done == ["video01", "video02", "video41", "video42"]
    index = Index.load(tmp_path / "out/index.json")
    assert [entry.split for entry in index.videos] == ["train", "train", "test", "test"]
    for number, frames in {1: 5, 2: 7, 41: 4, 42: 6}.items():
        found = read_features(tmp_path / f"out/video{number:02d}.h5")
        assert np.array_equal(np.asarray(found.features), values(frames, number))
        assert found.phase.tolist() == [k % 7 for k in range(frames)]
        assert found.tools.tolist() == [[0, 1, 0, 0, 0, 0, 0]] * frames
    assert bring(**said).skipped == ["video01", "video02", "video41", "video42"]
    (folder / "g_LFB50_val.pkl").write_bytes(pickle.dumps(arrays_of["val"][:3]))
    assert "has 3 rows, but" in refusal(bring, **said)


def test_the_rate_and_the_classes_are_never_assumed(tmp_path: Path, bring: Any) -> None:
    tecno(tmp_path / "in", "video01.pkl", 60)
    assert "give the rows per second with --fps RATE" in refusal(bring, dataset="cholec80")
    assert "name the data set with --dataset NAME" in refusal(bring, fps=1.0)
    np.savez(tmp_path / "one.npz", features=values(60), labels=np.zeros(60, np.int64))
    text = refusal(bring, place="one.npz", dataset="cholec80", fps=1.0, axes="TD")
    assert "contains phase numbers, not names; give their order with --phase-order" in text


# ---------------------------------------------------------------------------------------------- axes and lengths


def arrays(folder: Path, shapes: dict[str, tuple[int, int]]) -> None:
    folder.mkdir(exist_ok=True)
    for name, shape in shapes.items():
        np.save(folder / f"{name}.npy", np.ones(shape, np.float32))


@pytest.mark.parametrize("transposed", [False, True])
def test_the_axis_of_time_follows_from_several_files(tmp_path: Path, bring: Any, transposed: bool) -> None:
    shapes = {"video01": (50, 8), "video02": (3, 8), "video03": (8, 8)}
    arrays(tmp_path / "in", {name: shape[::-1] if transposed else shape for name, shape in shapes.items()})
    bring(dataset="cholec80", fps=1.0)
    assert {len(read_features(path)) for path in (tmp_path / "out").glob("*.h5")} == {50, 3, 8}


def test_an_ambiguous_axis_is_asked_for(tmp_path: Path, bring: Any) -> None:
    arrays(tmp_path / "in", {"video01": (50, 2048), "video02": (50, 2048)})
    assert "cannot tell which axis of 50x2048 is time" in refusal(bring, dataset="cholec80", fps=1.0)
    bring(dataset="cholec80", fps=1.0, axes="TD")
    assert len(read_features(tmp_path / "out/video01.h5")) == 50


@pytest.mark.parametrize("transposed", [False, True])
def test_labels_tell_the_axis(tmp_path: Path, bring: Any, transposed: bool) -> None:
    features = values(DIM * 9)
    (tmp_path / "in").mkdir()
    np.savez(tmp_path / "in/video01.npz", features=features.T if transposed else features, phase=np.zeros(DIM * 9, int))
    bring(dataset="cholec80", fps=1.0, phase_order="mtrcnet")
    assert np.array_equal(np.asarray(read_features(tmp_path / "out/video01.h5").features), features)


def test_different_dimensions_are_refused(tmp_path: Path, bring: Any) -> None:
    arrays(tmp_path / "in", {"video01": (50, 8), "video02": (60, 9)})
    assert "video02.npy: has 60x9 features, but video01.npy 50x8" in refusal(bring, dataset="cholec80", fps=1.0)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("features", "labels", "kept"), [(30, 31, 30), (31, 30, 30), (45, 30, 30), (46, 30, None)])
def test_lengths_may_differ_by_a_second(
    tmp_path: Path, bring: Any, features: int, labels: int, kept: int | None, capsys: pytest.CaptureFixture[str]
) -> None:
    mstcn(tmp_path / "in", {"a": features})
    (tmp_path / "in/groundTruth/a.txt").write_text("SIL\n" * labels)
    if kept is None:
        assert "46 samples of features, but 30 of labels" in refusal(bring, fps=15.0)
        return
    bring(fps=15.0)
    assert len(read_features(tmp_path / "out/a.h5")) == kept
    assert f"cut: a to {kept} (of {min(features, labels)} and {max(features, labels)})" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_name_file_and_frame(tmp_path: Path, bring: Any, bad: float) -> None:
    mstcn(tmp_path / "in", {"a": 12, "b": 15})
    array = values(15)
    array[8, 2] = bad
    np.save(tmp_path / "in/features/b.npy", array.T)
    assert f"b.npy: frame 8 (counted from 0) holds {np.float32(bad)} in feature 2" in refusal(bring, fps=15.0, every=2)
    assert [path.name for path in (tmp_path / "out").glob("*.h5")] == ["a.h5"]
    assert not (tmp_path / "out/index.json").exists()  # a folder with an index is complete
    np.save(tmp_path / "in/features/b.npy", np.full((DIM, 15), 1e6, np.float32))
    assert "do not fit float16; use extract.storage=float32" in refusal(bring, fps=15.0, out="o")
    bring(("extract.storage=float32",), fps=15.0, out="o32")
    assert np.asarray(read_features(tmp_path / "o32/b.h5").features).max() == np.float32(1e6)


def test_labels_that_do_not_fit(tmp_path: Path, bring: Any) -> None:
    mstcn(tmp_path / "in", {"a": 12, "b": 15})
    (tmp_path / "in/groundTruth/b.txt").write_text("SIL\n" * 14 + "peel")
    assert "b.txt: line 15: unknown phase 'peel'" in refusal(bring, fps=15.0)
    (tmp_path / "in/mapping.txt").write_text("0 SIL\n2 cut\n")
    assert "mapping.txt: its numbers must be 0 to 1, each once" in refusal(bring, fps=15.0)
    (tmp_path / "in/mapping.txt").write_text("SIL\n")
    assert "mapping.txt: line 1 is 'SIL', not a number, a blank and a class name" in refusal(bring, fps=15.0)
    tecno(tmp_path / "pkl", "video01.pkl", 30)
    np.savez(tmp_path / "one.npz", features=values(3), labels=np.array([0, -100, 7]))
    text = refusal(bring, place="one.npz", dataset="cholec80", fps=1.0, phase_order="mtrcnet")
    assert "label 7 of row 2 is not one of the 7 phases' numbers" in text


def test_bundles_that_do_not_fit(tmp_path: Path, bring: Any, capsys: pytest.CaptureFixture[str]) -> None:
    mstcn(tmp_path / "in", {"a": 12, "b": 15})
    splits = tmp_path / "in/splits"
    (splits / "train.split2.bundle").write_text("a.txt\nc.txt\n")
    (splits / "test.split2.bundle").write_text("b.txt\n")
    assert "choose one of its divisions with --split: split1, split2" in refusal(bring, fps=15.0)
    report = bring(fps=15.0, split="split2")
    assert report.left_out == [{"id": "c", "reason": "no file of features", "split": "train"}]
    assert "left out: c: no file of features" in capsys.readouterr().err
    assert "has no division 'split3'" in refusal(bring, fps=15.0, split="split3")
    (splits / "test.split2.bundle").write_text("a.txt\n")
    assert "'a' is in train too" in refusal(bring, fps=15.0, split="split2")


def test_ids_follow_the_description(tmp_path: Path, bring: Any) -> None:
    arrays(tmp_path / "in", {"video1": (5, 2), "vid-02": (6, 2), "other.v2": (7, 2)})
    report = bring(("data.exclude={other.v2: another hospital}",), dataset="cholec80", fps=1.0)
    assert report.done == ["video01", "video02"]
    assert report.left_out == [
        {"id": "other.v2", "reason": "excluded: another hospital", "split": "none", "excluded": True}
    ]
    arrays(tmp_path / "in", {"video_01": (5, 2)})
    assert "both have features of video01" in refusal(bring, dataset="cholec80", fps=1.0)


def test_labels_in_a_folder_of_text_files(tmp_path: Path, bring: Any) -> None:
    arrays(tmp_path / "in", {"video01": (5, 2), "video02": (6, 2)})
    (tmp_path / "truth").mkdir()
    for video, frames in (("video01", 5), ("video02", 6)):
        rows = "".join(f"{25 * frame}\tClippingCutting\n" for frame in range(frames))
        (tmp_path / f"truth/{video}-phase.txt").write_text(f"Frame\tPhase\n{rows}")
    bring(dataset="cholec80", fps=1.0, labels=str(tmp_path / "truth"))
    assert read_features(tmp_path / "out/video02.h5").phase.tolist() == [2] * 6
    assert "not numbers of phases" in refusal(bring, dataset="cholec80", fps=1.0, labels="none", phase_order="mtrcnet")
    assert "--labels index: give the index" in refusal(bring, dataset="cholec80", fps=1.0, labels="index")


def test_additional_tracks_without_labels(tmp_path: Path, bring: Any, stop: StopRequest) -> None:
    arrays(tmp_path / "in", {"SBP01": (5, 2), "SBP02": (6, 2)})
    bring(dataset="strasbypass70", fps=1.0, labels="none")
    (path, _) = sorted((tmp_path / "out").glob("*.h5"))
    found = read_features(path)
    assert {name: track.tolist() for name, track in found.tracks.items()} == {"steps": [-1] * 5}
    export_features(tmp_path / "out", tmp_path / "npz", "npz", unlabelled=None, replace=False, stop=stop)
    with np.load(tmp_path / "npz" / f"{path.stem}.npz", allow_pickle=False) as archive:
        assert archive["track_steps"].tolist() == [-1] * 5
        assert len(archive["track_steps_names"]) > 40


def test_places_without_features(tmp_path: Path, bring: Any) -> None:
    assert "no such file or folder" in refusal(bring, fps=1.0)
    (tmp_path / "in/inner").mkdir(parents=True)
    assert "its folders are inner" in refusal(bring, fps=1.0)
    arrays(tmp_path / "in", {"a": (0, 4)})
    assert "its features are empty (0x4)" in refusal(bring, dataset="cholec80", fps=1.0)
    tecno(tmp_path / "in", "b.pkl", 30)
    assert "files of several formats; choose one with --format: tecno, npy" in refusal(bring, fps=1.0)
    assert "so it is not a folder of MS-TCN" in refusal(bring, fps=1.0, layout="mstcn")
    (tmp_path / "in/b.pkl").write_bytes((tmp_path / "in/a.npy").read_bytes())
    assert "b.pkl: not a pickle but a NumPy array" in refusal(bring, dataset="cholec80", fps=1.0, layout="tecno")


@settings(max_examples=20, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=3, unique=True),
    dim=st.integers(80, 100),  # T of one file could be D otherwise
    every=st.integers(1, 5),
    format=st.sampled_from(["npy", "npz", "pt", "h5"]),
    transposed=st.booleans(),
    data=st.data(),
)
def test_any_features_and_labels_come_through(
    tmp_path_factory: pytest.TempPathFactory,
    lengths: list[int],
    dim: int,
    every: int,
    format: str,
    transposed: bool,
    data: st.DataObject,
) -> None:
    place, out = (tmp_path_factory.mktemp("any") / name for name in ("in", "out"))
    place.mkdir()
    written = {}
    for number, frames in enumerate(lengths, start=1):
        labels = np.array(data.draw(st.lists(st.sampled_from([-1, *range(7)]), min_size=frames, max_size=frames)))
        features = np.random.default_rng(frames).normal(size=(frames, dim)).astype(np.float16)
        written[f"video{number:02d}"] = features, labels
        save(place / f"video{number:02d}.{format}", (features.T if transposed else features).astype(np.float64), labels)
    said: dict[str, Any] = {"axes": "DT" if transposed else "TD"} if format == "npy" else {"phase_order": "mtrcnet"}
    with watch_signals(leaving=False) as stop:
        request = Request(dataset="cholec80", fps=5.0, every=every, **said)
        import_features(place, out, load_config("cholec80"), request, stop)
    for name, (features, labels) in written.items():
        found = read_features(out / f"{name}.h5")
        assert np.array_equal(np.asarray(found.features), features[::every])
        assert np.array_equal(found.time_s, np.arange(len(features))[::every] / 5)
        assert np.array_equal(found.phase, np.full(len(labels), -1)[::every] if format == "npy" else labels[::every])


def save(path: Path, features: np.ndarray, labels: np.ndarray) -> None:
    if path.suffix == ".npy":
        np.save(path, features)
    elif path.suffix == ".npz":
        np.savez_compressed(path, features=features, labels=labels)
    elif path.suffix == ".pt":
        torch.save({"features": torch.from_numpy(features.copy()), "labels": torch.from_numpy(labels)}, path)
    else:
        with h5py.File(path, "w") as file:
            file["features"], file["labels"] = features, labels
