"""Bugs that fuzzing found, each with its smallest input; before, each was a traceback, a hang or a garbled line."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest

from configs.errors import UserError
from configs.load import load_config
from configs.schema import Config
from engine.logs import MetricLog, read_metrics
from engine.runs import StageFolder, StageIdentity
from evaluation.reports.summary import update_summary
from features.dataset.build import build_index
from features.dataset.catalogue import print_summary
from features.dataset.index import Dataset, Index
from features.video.base import ReaderError
from features.video.images import decode_image
from features.video.open import open_video
from features.video.scan import probe_video
from tests.fuzz.harness import Child
from tests.fuzz.parsers import PARSERS
from tests.stage1_cnn.material import SPEC, make_world, write_dataset
from tests.videos import VideoSpec, write_video


@pytest.mark.parametrize(
    "text",
    [
        "seed: !!timestamp x",
        "seed: !!bool x",
        "seed: !!int ''",
        "seed: !!float x",
        "? [a]\n: b",
        "a: &a [*a]",
        "&a {*a : 1}",
    ],
)
def test_yaml_values_that_contradict_their_tags(tmp_path: Path, text: str) -> None:
    """AttributeError, KeyError and IndexError came out of PyYAML."""
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UserError, match=r"a\.yaml: "):
        load_config(tmp_path / "a.yaml")
    with pytest.raises(UserError):
        load_config("cholec80", [f"seed={text.partition(': ')[2] or text}"])


@pytest.mark.parametrize("text", ["fps:\u202e#fps: fps", "\x1b[31m: 1", "a\rb: 1"])
def test_messages_repeat_what_is_in_a_file_without_its_powers(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        load_config(tmp_path / "a.yaml")
    assert str(caught.value).isprintable()
    with pytest.raises(UserError) as caught:
        load_config("cholec80", [text])
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "line",
    [
        b"\x85",
        b"\xff\xfe{}",
        b'{"global_step": 1}',
        b'{"kind": "epoch", "global_step": 1e999}',
        b"[" * 100_000,
        b"3",
        b'{"kind": "epoch", "global_step": 3}',
        b'{"kind": "epoch", "global_step": 3, "epoch": "x"}',
    ],
)
def test_metrics_with_a_broken_line_keep_the_others(tmp_path: Path, line: bytes) -> None:
    intact = b'{"kind": "epoch", "global_step": 3, "epoch": 3, "loss": 1.0}\n'
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(intact + line + b"\n" + intact)
    assert [row["global_step"] for row in read_metrics(path, "epoch")] == [3, 3]
    MetricLog(tmp_path).rewind(3, 4)
    assert path.read_bytes() == intact + intact


@pytest.mark.parametrize("content", [b"RIFF", b"RIFF\0\0\0", b"\0\0\0\1ftyp", b"\x1a\x45\xdf\xa3"])
def test_a_video_that_ends_within_its_first_bytes(tmp_path: Path, content: bytes) -> None:
    """struct.error for the RIFF ones."""
    (tmp_path / "video01.mp4").write_bytes(content)
    with pytest.raises(ReaderError, match=r"video01\.mp4: "):
        probe_video(tmp_path / "video01.mp4")


def test_a_header_with_an_impossible_rate_gives_one_line(tmp_path: Path) -> None:
    """A flipped bit in the frames' times gave 12,800 frames per second, and a ValidationError with a traceback."""
    root = write_dataset(tmp_path / "data", 1)
    content = bytearray((root / "video01.mp4").read_bytes())
    at = content.index(b"mdhd") + 16
    content[at : at + 4] = struct.pack(">I", 0x7FFFFFFF)
    (root / "video01.mp4").write_bytes(content)
    with pytest.raises(UserError, match=r"video01\.mp4"):
        build_index(root, SPEC, Config().data)


@pytest.mark.parametrize("content", ["[]", "3", '"text"', "null"])
def test_a_result_that_is_no_object(tmp_path: Path, content: str) -> None:
    """AttributeError: a list has no `get`."""
    stage = StageFolder(tmp_path, "cnn", Config(), StageIdentity({"a": 1}))
    stage.path.mkdir()
    for path, call in (
        (stage.path / "result.json", lambda: stage.result),
        (stage.path / "identity.json", stage.open),
        (tmp_path / "summary.json", lambda: update_summary(tmp_path, {})),
    ):
        path.write_text(content)
        with pytest.raises(UserError, match=path.name):
            call()
        path.unlink()


def test_square_brackets_in_a_class_name_are_no_markup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """rich raised MarkupError."""
    root = write_dataset(tmp_path / "data", 1)
    spec = SPEC.model_copy(update={"title": "a [/b] set"})
    index = build_index(root, spec, Config().data)
    tree = index.to_json()
    tree["dataset"]["phases"] = ["open", "cut", "close"]
    tree["dataset"]["tools"] = ["[/red]", "Hook"]
    shown = Index.from_json(tree)
    for entry in shown.videos:
        assert entry.tool_file is not None
        path = root / entry.tool_file.path
        path.write_text(path.read_text().replace("Grasper", "[/red]"))
    shown = build_index(root, shown.dataset, Config().data)
    print_summary(Dataset(shown, root), 1.0)
    out = capsys.readouterr().out
    assert "[/red]" in out
    assert "a [/b] set" in out


@pytest.mark.parametrize("kind", ["EPS", "GIF", "PPM"])
def test_unsupported_image_formats_are_refused(tmp_path: Path, kind: str) -> None:
    """Pillow starts Ghostscript for EPS, regardless of the file's name."""
    from PIL import Image

    path = tmp_path / "1.png"
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(path, kind)
    with pytest.raises(ReaderError, match=r"1\.png: damaged or not an image"):
        decode_image(path, str(path), 1)


def test_runs_of_labels_whose_sum_overflows_are_refused() -> None:
    """Four runs of 2**62 sum to 0 in 64 bits: numpy then wrote beyond the end of an array, and the process died."""
    tree = json.loads(PARSERS["truth.json"].seeds()[0])
    tree["videos"]["video41"] |= {"phase": [[1 << 62, 0]] * 4, "tools": []}
    with Child("truth.json") as child:
        assert child.read(json.dumps(tree).encode()) is None
        assert child.refused == 1


def test_a_damaged_table_of_times_is_indexed_as_it_is_read(tmp_path: Path) -> None:
    """One time in the table lay beyond the end: the index took the table's 30 frames, and every reader found 29."""
    path = write_video(tmp_path / "video01.mp4", VideoSpec(count=30))
    content = bytearray(path.read_bytes())
    entry = content.index(b"ctts") + 12 + 8 * 18  # after version and count, (how often, delay) for each run
    content[entry : entry + 8] = struct.pack(">II", 1, 66_048)
    path.write_bytes(content)
    info = probe_video(path)
    with open_video(path, "pyav") as reader:
        assert (reader.frame_count, reader.times) == (info.frame_count, info.times)


def test_a_valid_data_set_and_video_still_work(tmp_path: Path) -> None:
    """The limits above refuse nothing valid."""
    write_video(tmp_path / "video01.mp4", VideoSpec(count=10))
    assert probe_video(tmp_path / "video01.mp4").frame_count == 10
    assert make_world(tmp_path, tmp_path).config.data.fps == 5
