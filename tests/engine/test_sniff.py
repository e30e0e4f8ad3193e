"""The description of a refused file, and its use in the readers' messages."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import pickle
import zipfile
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import UserError
from configs.load import load_dataset
from engine.sniff import recognise_file
from features.dataset.formats.cholec80 import read_phase_file
from features.dataset.tfrecord import scan_records
from features.video.scan import probe_video
from tests.videos import VideoSpec, write_video

SPEC = load_dataset("cholec80")
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4665a5ea423c2713\nsize 1073741824\n"
PHASES = b"Frame\tPhase\n0\tPreparation\n"


def zipped(name: str) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr(name, "x")
    return content.getvalue()


FILES = {
    "page": (
        b"<!DOCTYPE html>\n<html><title>Google Drive - Virus scan warning</title>",
        "a web page",
        "download it again",
    ),
    "page in capitals": (b"\xef\xbb\xbf\r\n  <HTML><BODY>", "a web page", "download it again"),
    "page with a comment": (b"<!-- saved -->\n<html>", "a web page", "download it again"),
    "lfs": (LFS, "a Git LFS pointer", "git lfs pull"),
    "annex": (b"/annex/objects/MD5E-s12--0123.mp4\n", "a git-annex pointer", "git annex get"),
    "gzip": (gzip.compress(PHASES), "gzip-compressed", "gunzip"),
    "zlib": (zlib.compress(PHASES), "zlib-compressed", "without compression"),
    "bzip2": (bz2.compress(PHASES), "bzip2-compressed", "bunzip2"),
    "xz": (lzma.compress(PHASES), "xz-compressed", "unxz"),
    "zip": (zipped("video01.mp4"), "a ZIP archive", "unpack it"),
    "xlsx": (zipped("xl/workbook.xml"), "an Excel workbook", "export it as plain text"),
    "docx": (zipped("[Content_Types].xml"), "an Office document", "export it as plain text"),
    "pdf": (b"%PDF-1.7\n%", "a PDF document", ""),
    "utf-16": (PHASES.decode().encode("utf-16"), "text in UTF-16", "save it as UTF-8"),
    "pickle": (pickle.dumps([1, 2]), "a Python pickle", ""),
    "apple double": (b"\0\5\x16\7\0\2\0\0Mac OS X", "metadata that macOS keeps beside a file", "copy that"),
    "zeros": (b"\0" * 9000, "filled with zeros", "copy it again"),
    "empty": (b"", "an empty file", "copy it again"),
    "server's answer": (b'{"error": {"code": 403}}', "a text that begins with", "error message"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_refused_video_file_is_recognised(tmp_path: Path, name: str) -> None:
    content, called, remedy = FILES[name]
    path = tmp_path / "video01.mp4"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        probe_video(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert f"is {called}" in message
    assert remedy in message
    assert "re-encode" not in message


@pytest.mark.parametrize("name", ["page", "lfs", "gzip", "xlsx", "utf-16", "pdf"])
def test_a_refused_annotation_file_is_recognised(tmp_path: Path, name: str) -> None:
    content, called, remedy = FILES[name]
    path = tmp_path / "video01-phase.txt"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_phase_file(path, SPEC)
    assert str(caught.value).startswith(f"{path}: is {called}")
    assert remedy in str(caught.value)


@pytest.mark.parametrize("name", ["page", "lfs", "gzip", "zlib"])
def test_a_refused_tfrecord_file_is_recognised(tmp_path: Path, name: str) -> None:
    content, called, _ = FILES[name]
    path = tmp_path / "video01.tfrecord"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        scan_records(path, "video01", SPEC, SPEC.phases)
    assert str(caught.value).startswith(f"{path}: is {called}")


@pytest.mark.parametrize("kept", ["all but the table", "half of the frames"])
def test_an_interrupted_recording_is_recognised(tmp_path: Path, kept: str) -> None:
    path = write_video(tmp_path / "video01.mp4", VideoSpec(count=40))
    content = path.read_bytes()
    table = content.rindex(b"moov") - 4
    path.write_bytes(content[: table if kept == "all but the table" else table // 2])
    with pytest.raises(UserError) as caught:
        probe_video(path)
    assert "without its table of frames (no moov box)" in str(caught.value)
    assert "re-encode" not in str(caught.value)


def test_intact_files_and_noise_are_not_recognised(tmp_path: Path) -> None:
    assert recognise_file(write_video(tmp_path / "video01.mp4", VideoSpec(count=10))) is None
    (tmp_path / "noise").write_bytes(bytes(range(7, 256)) * 40)
    assert recognise_file(tmp_path / "noise") is None
    assert recognise_file(tmp_path / "nothing") is None


@given(st.binary(max_size=200))
def test_any_bytes_get_one_printable_line_or_none(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any"
    for start in (b"", b"\0\0\0\x10ftyp", b"<html", b"PK\x03\x04"):
        path.write_bytes(start + content)
        what = recognise_file(path)
        assert what is None or (what.isprintable() and len(what) < 300)
