"""Videos that are broken, mislabelled or misleading: `index`, `index --check` and `extract` lose only that file.

Each file is read through the readers' interface in this process, with a time limit per file; the command line is run
on the whole corpus at once.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from PIL import Image

from features.dataset.catalogue import index_dataset
from features.dataset.index import Index
from tests.cli import run
from tests.fuzz.harness import Child
from tests.stage1_cnn.material import SPEC, make_world, write_dataset
from tests.videos import VideoSpec, packet_spans, write_video

COUNT = 30


def box(content: bytes, kind: bytes) -> int:
    """The start of the body of the first MP4 box of a kind."""
    return content.index(kind) + 4


def patched(content: bytes, at: int, new: bytes) -> bytes:
    return content[:at] + new + content[at + len(new) :]


def with_size(content: bytes, width_px: int, height_px: int) -> bytes:
    """Another frame size in the sample description (and 16.16 in the track header)."""
    at = box(content, b"avc1") + 24
    content = patched(content, at, struct.pack(">HH", width_px & 0xFFFF, height_px & 0xFFFF))
    track = box(content, b"tkhd") + 76
    return patched(content, track, struct.pack(">II", (width_px & 0xFFFF) << 16, (height_px & 0xFFFF) << 16))


def with_sample_count(content: bytes, count: int) -> bytes:
    """This many frames of one byte each, all in one chunk: an index that needs gigabytes."""
    sizes = box(content, b"stsz")
    content = patched(content, sizes + 4, struct.pack(">II", 1, count))
    chunks = box(content, b"stsc")
    return patched(content, chunks + 12, struct.pack(">I", count))


def with_entries(content: bytes, kind: bytes, count: int) -> bytes:
    """A table of the index that claims to be longer than the file."""
    return patched(content, box(content, kind) + 4, struct.pack(">I", count))


def without_box(content: bytes, kind: bytes) -> bytes:
    at = content.index(kind) - 4
    length = int.from_bytes(content[at : at + 4], "big")
    return content[:at] + content[at + length :]


def padded(content: bytes, count: int) -> bytes:
    """This many empty boxes before the index, which is the last box."""
    at = content.index(b"moov") - 4
    return content[:at] + struct.pack(">I4s", 8, b"free") * count + content[at:]


def flipped(content: bytes, share: float, bits: int = 40) -> bytes:
    changed = bytearray(content)
    for number in range(bits):
        at = int(share * len(content)) + 37 * number
        if at < len(changed):
            changed[at] ^= 1 << number % 8
    return bytes(changed)


def two_sizes(folder: Path) -> bytes:
    """An MPEG-TS whose frames change their size half-way."""
    parts = [VideoSpec(count=COUNT, width_px=96, height_px=64), VideoSpec(count=COUNT, width_px=128, height_px=96)]
    return b"".join(write_video(folder / f"{n}.ts", part).read_bytes() for n, part in enumerate(parts))


def without_key_frame(folder: Path) -> bytes:
    """The first frame's bytes replaced: what follows has no reference."""
    path = write_video(folder / "a.mp4", VideoSpec(count=COUNT))
    offset, size = packet_spans(path)[0]
    return patched(path.read_bytes(), offset, bytes(size))


def png_file(folder: Path) -> bytes:
    Image.new("RGB", (64, 48)).save(folder / "a.jpg")
    return (folder / "a.jpg").read_bytes()


def fragments(folder: Path) -> bytes:
    spec = VideoSpec(count=COUNT, container_options={"movflags": "frag_keyframe+empty_moov"})
    return write_video(folder / "f.mp4", spec).read_bytes()


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_video(tmp_path_factory.mktemp("valid") / "a.mp4", VideoSpec(count=COUNT)).read_bytes()


Make = Callable[[Path, bytes], bytes]
CORPUS: dict[str, Make] = {
    **{f"cut at {n} of 20": lambda f, s, n=n: s[: len(s) * n // 20] for n in range(20)},
    **{f"bits flipped at {n} of 12": lambda f, s, n=n: flipped(s, n / 12) for n in range(12)},
    "all zeros": lambda f, s: bytes(len(s)),
    "an image": lambda f, s: png_file(f),
    "a text": lambda f, s: b"not a video at all\n" * 100,
    "a playlist": lambda f, s: b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n",
    "a concat script": lambda f, s: b"ffconcat version 1.0\nfile /etc/passwd\n",
    "65,535 x 65,535 in the header": lambda f, s: with_size(s, 65_535, 65_535),
    "no size in the header": lambda f, s: with_size(s, 0, 0),
    "two billion frames": lambda f, s: with_sample_count(s, 0x7FFFFFFF),
    "50 million frames": lambda f, s: with_sample_count(s, 50_000_000),
    "long table of sizes": lambda f, s: with_entries(s, b"stsz", 0x0FFFFFFF),
    "long table of times": lambda f, s: with_entries(s, b"stts", 0x0FFFFFFF),
    "long table of chunks": lambda f, s: with_entries(s, b"stco", 0x0FFFFFFF),
    "times that run backwards": lambda f, s: patched(s, box(s, b"stts") + 12, struct.pack(">i", -1)),
    "no index": lambda f, s: without_box(s, b"moov"),
    "no data": lambda f, s: without_box(s, b"mdat"),
    "no first key frame": lambda f, s: without_key_frame(f),
    "no frames": lambda f, s: with_sample_count(s, 0),
    "more empty boxes than are counted": lambda f, s: s[:32] + struct.pack(">I4s", 8, b"free") * 600_000,
    "50 million frames behind 500,001 empty boxes": lambda f, s: padded(with_sample_count(s, 50_000_000), 500_001),
    "a box that holds itself": lambda f, s: s.replace(b"trak", b"moov", 1),
    "50 million frames in a fragment": lambda f, s: with_entries(fragments(f), b"trun", 50_000_000),
    "fragments cut short": lambda f, s: fragments(f)[:-500],
    "size changes half-way": lambda f, s: two_sizes(f),
}


@pytest.fixture(scope="module")
def children() -> Iterator[dict[str, Child]]:
    started = {name: Child(name) for name in ("video, PyAV", "video, decord")}
    yield started
    for child in started.values():
        child.__exit__()


@pytest.mark.parametrize("name", CORPUS)
def test_a_broken_video_is_read_or_refused_by_both_readers(
    name: str, tmp_path: Path, intact: bytes, children: dict[str, Child]
) -> None:
    """The harness checks each: no traceback, less than 10 s, less than half a gigabyte."""
    content = CORPUS[name](tmp_path, intact)
    for child in children.values():
        assert child.read(content) is None


@pytest.mark.slow
def test_a_corpus_of_broken_videos_loses_no_intact_one(tmp_path: Path, intact: bytes) -> None:
    """`index`, `index --check` and `extract` through the command line: exit code 1, every broken file named."""
    root = write_dataset(tmp_path / "data", 3)
    broken = {}
    for number, (name, make) in enumerate(CORPUS.items(), start=10):
        (root / f"video{number:02d}.mp4").write_bytes(make(tmp_path, intact))
        broken[f"video{number:02d}"] = name
    (root / "video90.mp4").write_bytes(b"")
    (root / "video91.mp4").write_bytes(write_video(tmp_path / "a.mkv", VideoSpec(count=COUNT)).read_bytes())
    described = {**SPEC.model_dump(mode="json"), "default_split": "60%/20%/20%"}
    (tmp_path / "tiny-set.yaml").write_text(yaml.safe_dump(described))
    world = make_world(tmp_path, root)
    tree = world.config.model_dump(mode="json")
    tree["data"] |= {"dataset": str(tmp_path / "tiny-set.yaml"), "split": {}}
    tree["extract"] |= {"encoder": "initial"}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tree))

    done = run(["index", "--config", "tiny.yaml"], tmp_path)
    assert (done.returncode, "Traceback" in done.stderr) == (1, False), done.stderr
    index = Index.load(tmp_path / "index.json")
    left_out = {video.id for video in index.left_out}
    assert "video90" in left_out
    assert {"video01", "video02", "video03", "video91"} <= {entry.id for entry in index.videos}
    lines = done.stderr.splitlines()
    assert all(any(line.startswith(f"left out: {video}: {video}.mp4: ") for line in lines) for video in left_out)

    done = run(["index", "--check", "--config", "tiny.yaml"], tmp_path)
    assert (done.returncode, "Traceback" in done.stderr) == (1, False), done.stderr
    done = run(["extract", "--config", "tiny.yaml"], tmp_path)
    assert (done.returncode, "Traceback" in done.stderr) == (1, False), done.stderr
    failed = {line.split(": ")[1] for line in done.stderr.splitlines() if line.startswith("failed: ")}
    written = {path.stem for path in (tmp_path / "features").rglob("video*.h5")}
    assert {"video01", "video02", "video03", "video91"} <= written
    assert failed.isdisjoint(written)
    assert failed | written == {entry.id for entry in index.videos}


def test_leaving_out_a_video_does_not_change_the_splits_of_others(tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "data", 4)
    (root / "video02.mp4").write_bytes(b"no video")
    described = tmp_path / "tiny-set.yaml"
    described.write_text(yaml.safe_dump(SPEC.model_dump(mode="json")))
    config = make_world(tmp_path, root).set(data={"dataset": str(described), "split": {"rule": "2/1/1"}})
    index = index_dataset(config)
    assert [(entry.id, entry.split) for entry in index.videos] == [
        ("video01", "train"),
        ("video03", "val"),
        ("video04", "test"),
    ]
    assert [video.id for video in index.left_out] == ["video02"]
    assert index.left_out[0].reason.startswith("video02.mp4: not a video")
    assert str(tmp_path) not in (tmp_path / "index.json").read_text()
    assert index_dataset(config).to_json() == index.to_json()
    (root / "video02.mp4").write_bytes((root / "video01.mp4").read_bytes())
    assert len(index_dataset(config, replace=True).videos) == 4
