"""Arrays in files as TeCNO, CLAM, TRIDENT and others write them; objects and false claims are refused unread."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from configs.errors import UserError
from engine.safe_pickle import load_arrays
from interop.feature_files.arrays import open_features

FEATURES = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)  # (T, D)


def read(path: Path, format: str, key: str | None = None) -> tuple[Any, Any, Any]:
    with open_features(path, format, key) as content:
        return content.frames("TD", slice(0, len(content.features))), content.labels, content.tools


def refusal(path: Path, format: str, key: str | None = None) -> str:
    with pytest.raises(UserError) as caught:
        read(path, format, key)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


# ---------------------------------------------------------------------------------------------- pickles


@pytest.mark.parametrize("protocol", range(2, 6))
def test_a_pickle_of_tecno(tmp_path: Path, protocol: int) -> None:
    labels = [0, 0, 1, 1, 6, 6]  # TeCNO makes the last array of a list of Python numbers
    content = [
        FEATURES,
        np.zeros((6, 7), np.float32),
        np.asarray(labels),
    ]  # `pickle.dump([stems, p_phases, labels], f)`
    path = tmp_path / "video_1_25.0fps.pkl"
    path.write_bytes(pickle.dumps(content, protocol))
    features, found, tools = read(path, "tecno")
    assert np.array_equal(features, FEATURES)
    assert (found.tolist(), tools) == (labels, None)


@pytest.mark.parametrize(
    "array",
    [
        np.asfortranarray(FEATURES),
        FEATURES.astype(">f8"),
        FEATURES[::2, 1:],
        np.zeros((0, 3)),
        np.float64(2.5),
        np.array(True),
        np.arange(3, dtype=np.uint16),
    ],
    ids=str,
)
def test_arrays_are_rebuilt_from_their_bytes(tmp_path: Path, array: Any) -> None:
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        (tmp_path / "a.pkl").write_bytes(pickle.dumps({"x": array, "n": [1, "a"]}, protocol))
        found = load_arrays(tmp_path / "a.pkl")
        assert np.array_equal(found["x"], array)
        assert (np.asarray(found["x"]).dtype.kind, found["n"]) == (np.asarray(array).dtype.kind, [1, "a"])


class Runs:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return exec, ("raise AssertionError('was run')",)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ([FEATURES, Runs(), np.arange(6)], "refers to 'builtins.exec'"),
        ([FEATURES, np.array([Runs(), 1], dtype=object), np.arange(6)], "unknown type 'O8'"),
        ([FEATURES, np.array(["a"], dtype=object), np.arange(6)], "unknown type 'O8'"),
        ([FEATURES, np.zeros(2, dtype="f4,i4"), np.arange(6)], "unknown type 'V8'"),
        ([FEATURES, FEATURES], "not a pickle of TeCNO"),
        ([FEATURES, FEATURES[:5], np.arange(6)], "not a pickle of TeCNO"),
        (FEATURES, "import its folder with --format transsvnet"),
        ({"features": FEATURES}, "not a pickle of TeCNO"),
    ],
)
def test_other_pickles_are_refused_and_not_run(tmp_path: Path, content: Any, problem: str) -> None:
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content))
    assert problem in refusal(tmp_path / "a.pkl", "tecno")


def test_a_pickled_array_cannot_claim_more_than_its_bytes(tmp_path: Path) -> None:
    whole = pickle.dumps([np.zeros((6, 4)), np.zeros((6, 7)), np.zeros(6)], 2)
    assert whole.count(b"K\x06K\x04\x86") == 1  # the shape (6, 4)
    (tmp_path / "a.pkl").write_bytes(whole.replace(b"K\x06K\x04\x86", b"J\xff\xff\xff\x7fK\x04\x86"))
    assert "damaged number" in refusal(tmp_path / "a.pkl", "tecno")


# ---------------------------------------------------------------------------------------------- NumPy and PyTorch


def test_numpy_files(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", FEATURES)
    np.savez(tmp_path / "one.npz", anything=FEATURES)
    phase, tools = np.arange(6) % 3, np.zeros((6, 7), np.int8)
    np.savez_compressed(tmp_path / "a.npz", features=FEATURES, phase=phase, tools=tools, other=FEATURES[:, :2])
    assert np.array_equal(read(tmp_path / "a.npy", "npy")[0], FEATURES)
    assert np.array_equal(read(tmp_path / "one.npz", "npz")[0], FEATURES)
    features, labels, found = read(tmp_path / "a.npz", "npz")
    assert np.array_equal(features, FEATURES)
    assert np.array_equal(labels, phase)
    assert np.array_equal(found, tools)
    assert read(tmp_path / "a.npz", "npz", key="other")[0].shape == (6, 2)


def test_objects_and_choices_in_numpy_files(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([Runs()], dtype=object), allow_pickle=True)
    assert "not a NumPy file" in refusal(tmp_path / "a.npy", "npy")
    np.savez(tmp_path / "a.npz", x=np.array([Runs()], dtype=object))
    assert "holds Python objects" in refusal(tmp_path / "a.npz", "npz")
    np.savez(tmp_path / "b.npz", x=FEATURES, y=FEATURES)
    assert "holds x 6x4 float32, y 6x4 float32; choose the features with --key NAME" in refusal(
        tmp_path / "b.npz", "npz"
    )
    assert "--key z names no array" in refusal(tmp_path / "b.npz", "npz", key="z")
    np.savez(tmp_path / "c.npz", coords=np.zeros((6, 2), np.int64))
    assert "features are real numbers" in refusal(tmp_path / "c.npz", "npz")


def test_a_numpy_archive_cannot_expand_without_limit(tmp_path: Path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (1 << 20, 1 << 12)})
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("features.npy", header.getvalue() + bytes(1000))
    assert "does not have the size that its header claims" in refusal(tmp_path / "a.npz", "npz")
    with zipfile.ZipFile(tmp_path / "b.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("features.npy", bytes(80 << 20))
    assert "claims to hold far more" in refusal(tmp_path / "b.npz", "npz")


@pytest.mark.parametrize(
    "content",
    [torch.from_numpy(FEATURES), {"features": torch.from_numpy(FEATURES), "n": 3}, [torch.from_numpy(FEATURES)]],
    ids=["tensor", "dictionary", "list"],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_tensors(tmp_path: Path, content: Any, zipped: bool) -> None:
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    assert np.array_equal(read(tmp_path / "a.pt", "pt")[0], FEATURES)


def test_tensors_that_are_refused(tmp_path: Path) -> None:
    torch.save(FEATURES, tmp_path / "trident.pt")  # TRIDENT saves the array itself
    assert "convert it where it was made: numpy.save" in refusal(tmp_path / "trident.pt", "pt")
    torch.save([FEATURES[0]], tmp_path / "00001.pth")  # and MuST a list with one array per frame
    assert "convert it where it was made: numpy.save" in refusal(tmp_path / "00001.pth", "pt")
    torch.save(Runs(), tmp_path / "runs.pt")
    assert "nothing in it was run" in refusal(tmp_path / "runs.pt", "pt")
    torch.save(torch.zeros(1).expand(1 << 20, 1 << 12), tmp_path / "large.pt")
    assert "claims to be larger" in refusal(tmp_path / "large.pt", "pt")


# ---------------------------------------------------------------------------------------------- HDF5


def hdf5(path: Path, write: Callable[[h5py.File], object], **options: Any) -> Path:
    with h5py.File(path, "w", **options) as file:
        write(file)
    return path


def test_files_of_clam_and_trident(tmp_path: Path) -> None:
    def clam(file: h5py.File) -> None:  # appended batch by batch
        for name, dtype, width in (("features", "float32", 4), ("coords", "int32", 2)):
            found = file.create_dataset(name, (2, width), dtype, chunks=(1, width), maxshape=(None, width))
            found.resize(6, axis=0)
        file["features"][...] = FEATURES

    def trident(file: h5py.File) -> None:
        file.create_dataset("features", data=FEATURES).attrs["encoder"] = "uni_v1"
        file.create_dataset("coords", data=np.zeros((6, 2), np.int64)).attrs["patch_size"] = 256

    def compressed(file: h5py.File) -> None:
        file.create_dataset("features", data=FEATURES.astype("f8"), compression="gzip", shuffle=True, fletcher32=True)
        file.create_dataset("labels", data=np.arange(6))

    for name, write in {"clam": clam, "trident": trident, "compressed": compressed}.items():
        features, labels, _ = read(hdf5(tmp_path / f"{name}.h5", write), "h5")
        assert np.array_equal(features, FEATURES), name
        assert labels is None or labels.tolist() == list(range(6))


def test_hdf5_that_is_stored_elsewhere_or_claims_more(tmp_path: Path) -> None:
    hdf5(tmp_path / "other.h5", lambda file: file.create_dataset("features", data=FEATURES))
    (tmp_path / "raw").write_bytes(FEATURES.tobytes())

    def virtual(file: h5py.File) -> None:
        layout = h5py.VirtualLayout((6, 4), "f4")
        layout[...] = h5py.VirtualSource("other.h5", "features", (6, 4))
        file.create_virtual_dataset("features", layout)

    def linked(file: h5py.File) -> None:
        file["features"] = h5py.ExternalLink("other.h5", "features")

    def external(file: h5py.File) -> None:
        file.create_dataset("features", (6, 4), "f4", external=[(str(tmp_path / "raw"), 0, 96)])

    def huge(file: h5py.File) -> None:
        file.create_dataset("features", (1 << 40, 4), "f4", chunks=(64, 4), compression="gzip")

    wanted = {
        virtual: "stored in another file",
        linked: "is a link or a group",
        external: "stored in another file",
        huge: "claims to be larger",
    }
    for write, problem in wanted.items():
        assert problem in refusal(hdf5(tmp_path / "a.h5", write), "h5"), problem
    (tmp_path / "b.h5").write_bytes((tmp_path / "other.h5").read_bytes()[:700])
    assert "damaged, or not an HDF5 file" in refusal(tmp_path / "b.h5", "h5")
