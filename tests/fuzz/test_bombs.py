"""Files made to exhaust memory or time, to reach other files or to run code: refused because of their claims."""

from __future__ import annotations

import io
import json
import pickle
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from configs.errors import UserError
from configs.load import load_config, load_dataset
from engine.files import read_json
from engine.safe_pickle import load_plain
from features.dataset.formats.cholec80 import read_phase_file
from features.dataset.phase_order import parse_phase_order
from features.dataset.tfrecord import masked_crc32c
from features.sealed_hdf5 import USER_BLOCK_BYTES, seal
from tests.fuzz.harness import Child
from tests.fuzz.parsers import PARSERS, SPEC, record_file

GIGA = 1 << 30


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_bomb(width_px: int, height_px: int) -> bytes:
    """A valid PNG of one colour: a few kB that decode to gigabytes."""
    packer, body = zlib.compressobj(9), b""
    for _ in range(min(height_px, 100)):
        body += packer.compress(bytes(min(3 * width_px + 1, 1 << 20)))
    header = struct.pack(">IIBBBBB", width_px, height_px, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body + packer.flush()) + chunk(b"IEND", b"")


def png_text_bomb() -> bytes:
    """A PNG of one pixel with 128 MiB of compressed text."""
    packer, text = zlib.compressobj(9), b""
    for _ in range(128):
        text += packer.compress(bytes(1 << 20))
    intact = PARSERS["image"].seeds()[0]
    return intact[:33] + chunk(b"zTXt", b"Comment\0\0" + text + packer.flush()) + intact[33:]


def long_record() -> bytes:
    """A record that claims a gigabyte, in a sparse file of that size."""
    head = struct.pack("<Q", GIGA)
    return head + struct.pack("<I", masked_crc32c(head)) + bytes(1000)


@contextmanager
def sealed_file(seed: bytes) -> Iterator[tuple[Path, Callable[[], bytes]]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.h5"
        path.write_bytes(seed)

        def content() -> bytes:
            seal(path)
            return path.read_bytes()

        yield path, content


def hdf5(parser: str, change: Callable[[h5py.File], None]) -> bytes:
    """A valid file of this project, changed by someone who knows HDF5 and the seal."""
    with sealed_file(PARSERS[parser].seeds()[0]) as (path, content):
        with h5py.File(path, "r+") as file:
            change(file)
        return content()


def replaced(name: str, **options: Any) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        del file[name]
        file.create_dataset(name, **options)

    return change


def linked(name: str, link: Any) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        del file[name]
        file[name] = link

    return change


def virtual(file: h5py.File) -> None:
    del file["features"]
    layout = h5py.VirtualLayout((30, 16), "f4")
    layout[...] = h5py.VirtualSource("/etc/other.h5", "features", (30, 16))
    file.create_virtual_dataset("features", layout)


def many_texts(file: h5py.File) -> None:
    """An attribute that names one long text a thousand times."""
    file.attrs.create("phases", np.array(["x" * 60_000] * 500, dtype=object), dtype=h5py.string_dtype())


def long_attribute(file: h5py.File) -> None:
    file.attrs.create("phases", np.zeros(8000), dtype="f8")


HDF5_BOMBS: dict[str, Callable[[h5py.File], None]] = {
    "claims 8 GiB and holds none": replaced("features", shape=(1 << 27, 16), dtype="f4", chunks=(256, 16)),
    "compressed zeros": replaced("features", data=np.zeros((1 << 22, 16), "f4"), chunks=(1 << 16, 16), compression=9),
    "claims rows in labels": replaced("phase", shape=(1 << 40,), dtype="i1", chunks=(1 << 20,)),
    "values in another file": replaced("features", shape=(30, 16), dtype="f4", external=[("/etc/passwd", 0, 1920)]),
    "a link to another file": linked("features", h5py.ExternalLink("/etc/other.h5", "features")),
    "a link to itself": linked("features", h5py.SoftLink("/features")),
    "pieces of another file": virtual,
    "an attribute that repeats a text": many_texts,
    "an attribute of many numbers": long_attribute,
    "texts for features": replaced("features", data=["a"] * 30, dtype=h5py.string_dtype()),
    "records for features": replaced("features", shape=(30, 16), dtype=[("a", "f4"), ("b", "i8")]),
}


def zip_bomb(compression: int, name: str = "archive/data/0") -> bytes:
    """A checkpoint whose one storage is 64 MiB of zeros, compressed."""
    intact = io.BytesIO(PARSERS["checkpoint"].seeds()[0])
    out = io.BytesIO()
    with zipfile.ZipFile(intact) as archive, zipfile.ZipFile(out, "w", compression) as written:
        for entry in archive.infolist():
            written.writestr(entry.filename, archive.read(entry))
        with written.open(f"{archive.namelist()[0].split('/')[0]}/data/9", "w", force_zip64=True) as stream:
            for _ in range(64):
                stream.write(bytes(1 << 20))
    return out.getvalue()


def overlapping_zip() -> bytes:
    """Hundreds of names for one stored entry, as in a zip bomb without compression."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as written:
        written.writestr("a/data.pkl", bytes(100_000))
        entry = written.infolist()[0]
        for number in range(300):
            twin = zipfile.ZipInfo(f"a/data/{number}")
            for key in ("CRC", "file_size", "compress_size", "header_offset", "compress_type"):
                setattr(twin, key, getattr(entry, key))
            written.filelist.append(twin)
    return out.getvalue()


class _Runs:
    """Pickles as a call of os.system."""

    def __init__(self, canary: str) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        import os

        return os.system, (f"touch {self.canary}",)


def running_checkpoint(canary: str) -> bytes:
    import torch

    out = io.BytesIO()
    torch.save({"format": 1, "model": _Runs(canary)}, out)
    return out.getvalue()


def running_legacy(canary: str) -> bytes:
    import torch

    out = io.BytesIO()
    torch.save({"model": _Runs(canary)}, out, _use_new_zipfile_serialization=False)
    return out.getvalue()


LAUGHS = b"a: &a [x, x, x, x, x, x, x, x, x]\n" + b"".join(
    b"%c: &%c [%s]\n" % (98 + k, 98 + k, b", ".join([b"*%c" % (97 + k)] * 9)) for k in range(20)
)
MERGES = b"a: &a {x: 1}\n" + b"".join(
    b"%c: &%c {<<: [%s]}\n" % (98 + k, 98 + k, b", ".join([b"*%c" % (97 + k)] * 9)) for k in range(20)
)
XML_LAUGHS = b"<!DOCTYPE a [<!ENTITY a 'xxxxxxxxx'>%s]><ANNOTATION_DOCUMENT>&u;</ANNOTATION_DOCUMENT>" % b"".join(
    b"<!ENTITY %c '%s'>" % (98 + k, b"&%c;" % (97 + k) * 9) for k in range(20)
)
BOMBS: dict[str, tuple[str, Callable[[], bytes]]] = {
    "PNG of 30,000 x 30,000": ("image", lambda: png_bomb(30_000, 30_000)),
    "PNG of 2^31 pixels a side": ("image", lambda: png_bomb(2**31 - 1, 1)),
    "PNG with long text": ("image", png_text_bomb),
    "EPS, which Pillow hands to Ghostscript": (
        "image",
        lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(x) run\n%%EOF\n",
    ),
    "TFRecord with such a PNG": ("TFRecord", lambda: record_file([png_bomb(30_000, 30_000)])),
    "TFRecord that claims a gigabyte": ("TFRecord", long_record),
    **{
        f"feature file: {name}": ("feature file", lambda c=change: hdf5("feature file", c))
        for name, change in HDF5_BOMBS.items()
    },
    "compressed checkpoint": ("checkpoint", lambda: zip_bomb(zipfile.ZIP_DEFLATED)),
    "checkpoint compressed otherwise": ("checkpoint", lambda: zip_bomb(zipfile.ZIP_LZMA)),
    "checkpoint of overlapping entries": ("checkpoint", overlapping_zip),
    "aliases that multiply": ("settings", lambda: LAUGHS),
    "merges that multiply": ("settings", lambda: MERGES),
    "aliases in --set": ("--set", lambda: b"data.split.train=[&a [x, x], &b [*a, *a], &c [*b, *b, *c]]"),
    "YAML of 100,000 brackets": ("settings", lambda: b"seed: " + b"[" * 100_000),
    "a settings file of 10 MB": ("settings", lambda: b"# comment\n" * 1_000_000),
    "JSON of 100,000 brackets": ("index", lambda: b'{"format_version": 1, "videos": ' + b"[" * 100_000),
    "an index of endless videos": ("index", lambda: endless_index()),
    "a truth of endless frames": ("truth.json", lambda: endless_truth()),
    "entities that multiply": ("annotations, ELAN", lambda: XML_LAUGHS),
    "entities in another encoding": ("annotations, ELAN", lambda: XML_LAUGHS.decode().encode("utf-16")),
    "XML of 100,000 tags in each other": ("annotations, ELAN", lambda: b"<ANNOTATION_DOCUMENT>" + b"<a>" * 100_000),
    "tasks of 100,000 brackets": ("annotations, Label Studio", lambda: b"[" * 100_000),
    "a rate beyond all cameras": ("index", lambda: PARSERS["index"].seeds()[0].replace(b"25.0", b"1e300")),
}  # fmt: skip


def endless_index() -> bytes:
    tree = json.loads(PARSERS["index"].seeds()[0])
    for video in tree["videos"]:
        video["frame_count"] = 10**15
    tree["videos"][2]["records"]["labels"] = "999999999x0:-"
    return json.dumps(tree).encode()


def endless_truth() -> bytes:
    tree = json.loads(PARSERS["truth.json"].seeds()[0])
    tree["videos"]["video41"]["phase"] = [[1 << 27, 0]]
    return json.dumps(tree).encode()


@pytest.fixture(scope="module")
def children() -> Iterator[dict[str, Child]]:
    """One child per parser, for all bombs of its kind."""
    started: dict[str, Child] = {}
    yield started
    for child in started.values():
        child.__exit__()


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_without_going_off(name: str, children: dict[str, Child]) -> None:
    parser, make = BOMBS[name]
    child = children.setdefault(parser, Child(parser))
    refused = child.refused
    assert child.read(make()) is None
    assert child.refused == refused + 1


def test_cached_frames_that_claim_gigabytes_are_not_used(children: dict[str, Child]) -> None:
    """The frame cache makes an unusable file again, so nothing is refused; memory must stay small."""
    child = children.setdefault("frame cache", Child("frame cache"))

    def bomb(file: h5py.File) -> None:
        blob = np.frombuffer(png_bomb(30_000, 30_000), np.uint8)
        file["blobs"][0] = blob
        file["crc32"][0] = zlib.crc32(blob.tobytes())

    refused = child.refused
    assert child.read(hdf5("frame cache", bomb)) is None
    assert child.refused == refused + 1  # the frame itself, by the size in its header
    for change in (
        replaced("frame_index", shape=(1 << 40,), dtype="i8", chunks=(1 << 20,)),
        replaced("blobs", data=np.zeros((12, 1 << 20), "u1"), chunks=(12, 1 << 20), compression=9),
        replaced("crc32", shape=(12,), dtype="u4", external=[("/etc/passwd", 0, 48)]),
        linked("blobs", h5py.ExternalLink("/etc/other.h5", "blobs")),
    ):
        assert child.read(hdf5("frame cache", change)) is None


@pytest.mark.parametrize("make", [running_checkpoint, running_legacy, lambda c: pickle.dumps([_Runs(c)])])
def test_nothing_in_a_file_is_run(tmp_path: Path, children: dict[str, Child], make: Callable[[str], bytes]) -> None:
    canary = tmp_path / "canary"
    content = make(str(canary))
    for parser in ("checkpoint", "older checkpoint", "pickle"):
        assert children.setdefault(parser, Child(parser)).read(content) is None
    assert not canary.exists()


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.system", "!!python/name:os.system", "!!python/module:os"])
def test_yaml_names_no_code(tmp_path: Path, tag: str) -> None:
    canary = tmp_path / "canary"
    path = tmp_path / "a.yaml"
    path.write_text(f"seed: {tag} ['touch {canary}']\n")
    with pytest.raises(UserError, match="not a YAML file"):
        load_config(path)
    assert not canary.exists()


def test_a_file_of_a_terabyte_is_refused_by_its_size(tmp_path: Path) -> None:
    path = tmp_path / "video01-phase.txt"
    with path.open("wb") as stream:
        stream.truncate(1 << 40)  # a hole: no byte of it is on the disk
    for read in (
        lambda: read_json(path),
        lambda: read_phase_file(path, SPEC),
        lambda: load_config(path),
        lambda: load_dataset(str(path)),
        lambda: load_plain(path),
        lambda: parse_phase_order(str(path), SPEC, "file"),
    ):
        with pytest.raises(UserError, match=r"larger than|too long"):
            read()


def test_the_user_block_is_where_the_seal_expects_it() -> None:
    """The bombs are sealed like our files; with a wrong seal they would be refused for that reason alone."""
    content = hdf5("feature file", lambda file: None)
    assert content[USER_BLOCK_BYTES:].startswith(b"\x89HDF")
    with Child("feature file") as child:
        assert child.read(content) is None
        assert child.refused == 0


def test_a_child_that_is_ended_leaves_no_folder() -> None:
    with Child("phase annotations") as child:
        assert child.read(b"") is None
        assert child.folder is not None
        folder = Path(child.folder.name)
        assert list(folder.iterdir()) != []
    assert not folder.exists()
