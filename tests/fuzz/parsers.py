"""Every parser of files from other sources, with valid files to start from.

A parser reads one file as the commands do, in a child process (`tests.fuzz.harness`); its return value is discarded.
`mend` corrects checksums after damage, as an attacker would.
"""

from __future__ import annotations

import base64
import functools
import io
import json
import pickle
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from configs.errors import UserError
from configs.load import load_ablation, load_config, load_dataset, load_mapping
from configs.schema import CacheConfig, PreprocessConfig
from tests.fuzz import described, viewed

Read = Callable[[Path], object]
SPEC = load_dataset("cholec80")


@dataclass(frozen=True)
class Parser:
    """`prepare(folder)` gives the reader of a file; `words` and `marks` are the format's own, for shaped text."""

    file_name: str
    prepare: Callable[[Path], Read]
    seeds: Callable[[], list[bytes]]
    words: Sequence[str] = ()
    marks: Sequence[str] = ("\t", "\n")
    mend: Callable[[bytes], bytes] | None = None


def _allow_refusal(step: Callable[[], object]) -> object:
    """Continue after a refusal in one printable line."""
    try:
        return step()
    except UserError as error:
        if not str(error).isprintable():
            raise AssertionError(f"not printable: {str(error)!r}") from error
        return None


def _plainly(read: Read) -> Callable[[Path], Read]:
    return lambda folder: read


def _written(write: Callable[[Path], object], name: str = "file") -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        write(path)
        return path.read_bytes()


# ---------------------------------------------------------------------------------------------- annotations


def _read_phases(path: Path) -> object:
    from features.dataset.formats.cholec80 import read_phase_file
    from features.dataset.labels import sample_labels

    track = read_phase_file(path, SPEC)
    return track.end, sample_labels(np.arange(0, 1000, 25), track, None, "mask", 7)


def _phase_seeds() -> list[bytes]:
    rows = "".join(f"{frame}\t{SPEC.phases[min(frame // 8, 6)]}\n" for frame in range(60))
    text = f"Frame\tPhase\n{rows}"
    return [text.encode(), "\ufeff".encode() + text.replace("\n", "\r\n").encode()]


def _read_tools(path: Path) -> object:
    from features.dataset.formats.cholec80 import read_tool_file

    return read_tool_file(path, SPEC)


def _tool_seeds() -> list[bytes]:
    head = "\t".join(("Frame", *SPEC.tools))
    rows = "".join(f"{25 * row}\t" + "\t".join(str((row >> k) & 1) for k in range(7)) + "\n" for row in range(40))
    return [f"{head}\n{rows}".encode()]


def _read_class_order(path: Path) -> object:
    from features.dataset.phase_order import parse_phase_order

    return parse_phase_order(str(path), SPEC, "file")


def _read_tool_file(name: str) -> Read:
    """Read a file of an annotation tool as intervals, write these in every format, and read it as labels."""

    def read(path: Path) -> None:
        from features.annotation_files.eaf import eaf_text, read_eaf
        from features.annotation_files.intervals import Annotations, Losses
        from features.annotation_files.label_studio import label_studio_tasks, read_label_studio
        from features.annotation_files.table import csv_text, read_csv

        readers: dict[str, Callable[[bytes, Path], Annotations]] = {
            "eaf": read_eaf,
            "labelstudio": partial(read_label_studio, fps_of=lambda video: 25.0),
            "csv": read_csv,
        }
        content = path.read_bytes()
        _allow_refusal(partial(_read_as_labels, name, content, path))
        found = readers[name](content, path)
        for note in found.notes:
            note.encode()
        for video in found.videos:
            for text in (eaf_text, lambda video, losses: csv_text([video], losses)):
                written = _allow_refusal(partial(text, video, Losses()))
                assert written is None or (isinstance(written, str) and written.encode())
            json.dumps(label_studio_tasks([video], lambda name: 25.0, Losses())).encode()

    return read


def _read_as_labels(name: str, content: bytes, path: Path) -> None:
    from configs.dataset_spec import DataSetSpec
    from features.dataset.described.intervals import TimedLabels
    from features.dataset.described.labels import parse_described, records_by_video
    from features.dataset.row_numbers import Extent

    columns = {"video": "video", "start": "start", "end": "end", "label": "label"}
    table = {"delimiter": "comma", "form": "intervals", "unit": "second", "columns": columns}
    labels = {"files": "x", **(table if name == "csv" else {"format": name}), "where": {"track": "phase"}}
    spec = DataSetSpec.model_validate(SPEC.model_dump(exclude={"labels"}) | {"labels": {"phases": labels}})
    source = spec.labels["phases"]
    for records in records_by_video(content, path, source, spec).values():
        track = parse_described(records, path, source, "phase", spec)
        assert isinstance(track, TimedLabels)
        track.place(path, Extent("video01.mp4", 1000, 25.0, 25.0))


def _tool_file_seeds(name: str) -> list[bytes]:
    from features.annotation_files.eaf import eaf_text
    from features.annotation_files.intervals import Interval, Losses, VideoAnnotations
    from features.annotation_files.label_studio import label_studio_tasks
    from features.annotation_files.table import csv_text
    from tests.features.annotation_files.material import LABEL_STUDIO_EXPORT, PYMPI_EAF, SDK_JSON_MIN

    phases = [Interval("phase", name, at * 2, at * 2 + 2, 0.5, "a") for at, name in enumerate(SPEC.phases)]
    more = [Interval("phase", "Preparation", 1, 5, 0.25, "b"), Interval("step", "x", 1, 3)]
    video = VideoAnnotations("video01", (*phases, *more), 25.0, "video01.mp4")
    alone = VideoAnnotations("video01", tuple(phases), 25.0)
    tasks = [json.dumps(label_studio_tasks([one], lambda name: 25.0, Losses())) for one in (video, alone)]
    texts = {
        "eaf": [eaf_text(video, Losses()), eaf_text(alone, Losses()), PYMPI_EAF],
        "labelstudio": [*tasks, LABEL_STUDIO_EXPORT, SDK_JSON_MIN],
        "csv": [csv_text([video], Losses()), csv_text([alone], Losses())],
    }
    return [text.encode() for text in texts[name]]


_XML_WORDS = (
    '<ANNOTATION_DOCUMENT FORMAT="3.0">', "<HEADER>", '<TIME_SLOT TIME_SLOT_ID="ts1" TIME_VALUE="40"/>',
    '<TIME_SLOT TIME_SLOT_ID="ts2"/>', '<TIER TIER_ID="phase">', "</TIER>", "</ANNOTATION_DOCUMENT>", "<ANNOTATION>",
    '<ALIGNABLE_ANNOTATION ANNOTATION_ID="a1" TIME_SLOT_REF1="ts1" TIME_SLOT_REF2="ts2">', "</ALIGNABLE_ANNOTATION>",
    '<REF_ANNOTATION ANNOTATION_ID="a2" ANNOTATION_REF="a1"/>', "<ANNOTATION_VALUE>", "</ANNOTATION_VALUE>",
    "<!DOCTYPE a>", "<!ENTITY a 'b'>", "&a;", "&lt;", "<![CDATA[", "]]>", "<!--", "-->", "<?xml version='1.0'?>",
)  # fmt: skip
_TASK_WORDS = (
    "[", "]", "{", "}", '"data":', '"video": "a.mp4"', '"fps": 25', '"annotations":', '"predictions":', '"result":',
    '"type": "timelinelabels"', '"value":', '"ranges":', '"start": 1', '"end": 5', '"timelinelabels": ["a"]', "null",
)  # fmt: skip
_TABLE_WORDS = (
    "video",
    "track",
    "label",
    "start",
    "end",
    "confidence",
    "annotator",
    "phase",
    "Preparation",
    "0:01:02.5",
)


# ---------------------------------------------------------------------------------------------- index and settings


def _read_index(folder: Path) -> Read:
    from engine.files import inside
    from features.dataset.check import check_index
    from features.dataset.index import Dataset, Index
    from features.dataset.labels import load_labels
    from features.dataset.sampling import frame_times_s, sampled_frames
    from features.dataset.summary import count_frames

    root = folder / "root"
    root.mkdir(exist_ok=True)

    def read(path: Path) -> None:
        index = Index.load(path)
        dataset = Dataset(index, root)
        index.digest()
        Index.from_json(index.to_json())
        for entry in index.videos:
            for path in (*entry.paths, *(one.source for one in entry.sources)):
                if not inside(root, path).resolve().is_relative_to(root.resolve()):
                    raise AssertionError(f"{path} leads out of the root")
            frame_times_s(entry, [entry.frame_count - 1])
            for step in (partial(sampled_frames, entry, 1.0), partial(load_labels, dataset, entry, [0, 5])):
                _allow_refusal(step)
        for problem in check_index(dataset):
            assert problem.isprintable(), repr(problem)
        _allow_refusal(partial(count_frames, dataset, 1.0))

    return read


def _index_tree() -> dict[str, Any]:
    file = {"path": "labels/video01-phase.txt", "sha256": "ab" * 32, "rows": 60, "row_fps": 1.0, "row_base": 1}
    base = {"split": "train", "size_bytes": 10, "modified_ns": 1, "sha256_ends": "cd" * 32, "fps": 25.0}
    layout = {"numbering": "sample", "base": 1, "stride": 25, "first": 0, "count": 40, "missing": [[3, 5], [9, 10]]}
    records = {"frame_base": 0, "total_frames": 40, "phase_order": list(SPEC.phases), "labels": "34x0:0,2 6x1:-"}
    steps = np.where(np.arange(59) == 30, 540, 40).astype("<u4")
    times = {"tick_s": [1, 1000], "steps": base64.b64encode(zlib.compress(steps.tobytes())).decode()}
    part = {name: value for name, value in base.items() if name != "split"}
    parts = [
        {**part, "source": "a/5_1.mp4", "frame_count": 60, "times": times},
        {**part, "source": "a/5_2.mp4", "frame_count": 40, "fps": 30.0, "phase_file": {**file, "row_base": 0}},
    ]
    return {
        "format_version": 1,
        "dataset": SPEC.model_dump(mode="json"),
        "videos": [
            {"id": "video01", "kind": "video", "source": "a/1.mp4", "frame_count": 60, **base, "phase_file": file},
            {"id": "video02", "kind": "frames", "source": "f/video02", "frame_count": 1000, **base, "frames": layout},
            {"id": "video03", "kind": "tfrecord", "source": "v.tfrecord", "frame_count": 40, **base, "fps": 1.0,
             "records": records},
            {"id": "video04", "kind": "video", "source": "a/4.mkv", "frame_count": 60, **base, "times": times},
            {"id": "video05", "kind": "video", "source": "a/5_1.mp4", "frame_count": 100, **base, "phase_file": file,
             "parts": parts},
        ],
    }  # fmt: skip


def _index_seeds() -> list[bytes]:
    return [json.dumps(_index_tree(), indent=1).encode()]


_JSON_WORDS = ("{", "}", "[", "]", '"format_version": 1', '"videos": ', '"dataset": ', '"id": ', "null", "1", '"a"')
_JSON_MARKS = ("", ",", ":", " ", "\n")


def _read_settings(path: Path) -> object:
    from configs.load import to_yaml

    return to_yaml(load_config(path))


def _read_override(path: Path) -> object:
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError:
        return None  # a command line is text
    return load_config("cholec80", [text])


def _preset_seeds(*names: str) -> list[bytes]:
    folder = Path(__file__).resolve().parents[2] / "configs"
    return [(folder / name).read_bytes() for name in names]


_YAML_WORDS = (
    "seed",
    "data",
    "fps",
    "temporal",
    "head",
    "name",
    "lstm",
    "cnn",
    "- ",
    "&a ",
    "*a",
    "<<",
    "[1, 2]",
    "{a: 1}",
)
_YAML_MARKS = (": ", "\n", "\n  ", ",", " ", "#")


def _read_description(path: Path) -> object:
    from features.dataset.discover import find_videos

    spec = load_dataset(str(path))
    return _allow_refusal(partial(find_videos, path.parent, spec))  # which finds none here


def _read_ablation(path: Path) -> object:
    return load_ablation(path)


def _read_class_mapping(path: Path) -> object:
    mapping = load_mapping(path)
    return _allow_refusal(lambda: mapping.common_ids(SPEC.name, SPEC.phases, str(path)))


def _read_trained_on(path: Path) -> object:
    from features.dataset.trained_on import TRAINED_ON, trained_on

    assert path.name == TRAINED_ON
    return trained_on(path.parent)


# ---------------------------------------------------------------------------------------------- predictions


def _read_external(path: Path) -> object:
    from evaluation.files.third_party import read_external_phases

    return read_external_phases(path, SPEC, SPEC.phases)


def _external_seeds() -> list[bytes]:
    return [
        *_phase_seeds(),
        "".join(f"{frame // 10}\n" for frame in range(60)).encode(),
        ("frame,time_s,phase,phase_name\n" + "".join(f"{25 * k},{k}.000,0,Preparation\n" for k in range(30))).encode(),
        ("Frame Phase\n" + "".join(f"{25 * k}\tCalotTriangleDissection\n" for k in range(30))).encode(),
        "".join(" ".join("01"[k % 7 == c] for c in range(7)) + "\n" for k in range(30)).encode(),
        (",0,1,2,3,4,5,6\n" + "".join(f"{k},.1,.3,.1,.1,.2,.1,.1\n" for k in range(30))).encode(),
        ("### Frame level recognition: ###\n" + "Preparation ClippingCutting " * 30).encode(),
    ]


def _read_prediction(path: Path) -> object:
    from evaluation.files.predictions import read_prediction_csv

    return read_prediction_csv(path, SPEC)


def _prediction_seeds() -> list[bytes]:
    from evaluation.files.predictions import PredictionFile, write_prediction_csv

    def write(path: Path) -> None:
        values = np.full((20, 7), 0.25, np.float32)
        write_prediction_csv(
            path, PredictionFile(np.arange(20) * 25, np.arange(20), np.arange(20) % 7, values, values), SPEC
        )

    return [_written(write)]


def _read_tool_prediction(path: Path) -> object:
    from evaluation.files.predictions import read_prediction_csv

    return read_prediction_csv(path, SPEC, phases=False)


def _tool_prediction_seeds() -> list[bytes]:
    from evaluation.files.predictions import PredictionFile, write_prediction_csv

    def write(path: Path) -> None:
        values = np.full((20, 7), 0.25, np.float32)
        write_prediction_csv(
            path, PredictionFile(np.arange(20) * 25, np.arange(20), np.full(20, -1), np.zeros((20, 0)), values), SPEC
        )

    return [_written(write)]


def _read_truth(path: Path) -> object:
    from evaluation.files.truth import read_truth

    return read_truth(path)


def _truth_seeds() -> list[bytes]:
    from configs.label_source import LabelSource, TrackSpec
    from evaluation.files.truth import Truth, VideoTruth, write_truth

    phase, tools = np.repeat(np.arange(7), 5).astype(np.int8), np.ones((35, 7), np.int8)
    steps = {"tracks": {"steps": TrackSpec(classes=("a", "b"))}, "labels": {"steps": LabelSource(files="(?P<id>x)")}}
    videos = VideoTruth(phase, tools, "ab" * 32), VideoTruth(phase, tools, "ab" * 32, {"steps": phase % 2})
    truths = (
        Truth(SPEC, "test", 1.0, {"video41": videos[0]}),
        Truth(SPEC.model_copy(update=steps), "a", 1.0, {"video41": videos[1]}),
    )
    return [_written(functools.partial(write_truth, truth=truth)) for truth in truths]


def _read_metrics(path: Path) -> object:
    from engine.logs import MetricLog, read_metrics

    log = MetricLog(path.parent)
    log.path = path
    rows = read_metrics(path), read_metrics(path, "epoch")
    log.rewind(3, 3)
    return rows


def _metrics_seeds() -> list[bytes]:
    rows = [{"kind": kind, "global_step": k, "loss": 0.5, "epoch": k} for k in range(8) for kind in ("step", "epoch")]
    return ["".join(json.dumps(row) + "\n" for row in rows).encode()]


# ---------------------------------------------------------------------------------------------- HDF5


def _read_feature_file(path: Path) -> object:
    from features.store import read_every_chunk, read_features, recorded_encoder, verify_file

    verify_file(path)
    return read_features(path), recorded_encoder(read_every_chunk(path))


@functools.cache
def _feature_seeds() -> list[bytes]:
    from features.store import EncoderSpec, SourceIdentity, write_features

    def write(path: Path, tracks: dict[str, Any]) -> None:
        encoder = EncoderSpec("tiny", "ab" * 32, {"resize_px": 250}, 1.0, "fp32", "float32", 16)
        source = SourceIdentity("video01", "cd" * 32, 1000, 25.0)
        labels, about = (np.zeros(30, np.int8), np.zeros((30, 7), np.int8)), {"phases": "[]", "tracks": "{}"}
        with write_features(path, encoder, source, np.arange(30) * 25, *labels, about, tracks=tracks) as writer:
            writer.append(np.ones((30, 16), np.float32), np.zeros((30, 7), np.float32))

    return [
        _written(functools.partial(write, tracks=tracks), "video01.h5")
        for tracks in ({}, {"steps": np.zeros(30, np.int8)})
    ]


def _cache_request() -> Any:
    from features.frames.cache import CacheRequest
    from features.store import SourceIdentity

    def no_reader() -> Any:
        raise UserError("the source is not there")

    return CacheRequest(SourceIdentity("video01", "cd" * 32, 1000, 25.0), np.arange(0, 60, 5), no_reader)


def _frame_cache(folder: Path) -> Any:
    from features.frames.cache import FrameCache

    return FrameCache(CacheConfig(dir=folder), PreprocessConfig(resize_px=48, crop_px=40), 5.0)


def _read_cache(folder: Path) -> Read:
    cache, request = _frame_cache(folder), _cache_request()
    place = cache.path("video01")
    place.parent.mkdir(exist_ok=True)

    def read(path: Path) -> None:
        path.replace(place)
        for deep in (False, True):
            problem = cache.problem(request, deep)
            assert problem is None or problem.isprintable(), repr(problem)
        frames = cache.find(request)
        if frames is None:
            return
        try:
            for position in range(len(frames)):
                frames[position]
        finally:
            frames.close()

    return read


@functools.cache
def _cache_seeds() -> list[bytes]:
    from features.video.open import open_video
    from tests.videos import VideoSpec, write_video

    with tempfile.TemporaryDirectory() as folder:
        video = write_video(Path(folder) / "video.mp4", VideoSpec())
        cache, request = _frame_cache(Path(folder)), _cache_request()
        opened = type(request)(request.source, request.frame_index, lambda: open_video(video, "pyav"))
        cache.ensure(opened)
        return [cache.path("video01").read_bytes()]


# ---------------------------------------------------------------------------------------------- images and records


def _read_image(path: Path) -> object:
    from features.video.images import decode_image

    return decode_image(path, str(path), 0)


@functools.cache
def _image_seeds() -> list[bytes]:
    from PIL import Image

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8))
    seeds = []
    for name in ("PNG", "JPEG", "WEBP", "BMP", "TIFF"):
        stream = io.BytesIO()
        image.save(stream, name)
        seeds.append(stream.getvalue())
    return seeds


def mend_png(content: bytes) -> bytes:
    """The chunks of a PNG with correct checksums."""
    out, at = content[:8], 8
    while at + 12 <= len(content):
        length = int.from_bytes(content[at : at + 4], "big")
        body = content[at + 4 : at + 8 + length]
        out += content[at : at + 4] + body + struct.pack(">I", zlib.crc32(body))
        at += 12 + length
    return out + content[at:]


def _read_records(path: Path) -> object:
    from features.dataset.tfrecord import TfrecordReader, scan_records

    layout = scan_records(path, "video01", SPEC, SPEC.phases)
    layout.tracks(SPEC)
    with TfrecordReader(path, layout) as reader:
        return list(reader.read(range(reader.frame_count)))


def record_file(images: Sequence[bytes]) -> bytes:
    """A TFRecord file of video01 with these images."""
    from features.dataset.tfrecord import example_class

    content = b""
    for number, image in enumerate(images):
        message = example_class()()
        keys = message.features.feature
        keys["frame"].bytes_list.value.append(image)
        keys["video_id"].bytes_list.value.append(b"video01")
        numbers = {"frame_id": [number], "total_frames": [len(images)], "phase": [0], "instruments": [0, 1] + [0] * 5}
        for key, values in numbers.items():
            keys[key].int64_list.value.extend(values)
        data = message.SerializeToString()
        content += struct.pack("<QI", len(data), 0) + data + bytes(4)
    return mend_records(content)


def _record_seeds() -> list[bytes]:
    return [record_file(_image_seeds()[:1] * 4)]


def mend_records(content: bytes) -> bytes:
    """The records of a TFRecord file with correct checksums, as far as their lengths can be followed."""
    from features.dataset.tfrecord import masked_crc32c

    out, at = b"", 0
    while at + 16 <= len(content):
        length = int.from_bytes(content[at : at + 8], "little")
        data = content[at + 12 : at + 12 + length]
        out += content[at : at + 8] + struct.pack("<I", masked_crc32c(content[at : at + 8]))
        if at + 16 + length > len(content):
            return out + content[at + 12 :]
        out += data + struct.pack("<I", masked_crc32c(data))
        at += 16 + length
    return out + content[at:]


# ---------------------------------------------------------------------------------------------- checkpoints, pickles


def _read_checkpoint(folder: Path) -> Read:
    from engine import checkpoints

    checkpoints.SAFE_TORCH = (2, 0)  # what an old torch asks for is tested with the checkpoints

    def read(path: Path) -> None:
        try:
            checkpoints.load_external_state(path)
        except UserError:
            checkpoints.load_checkpoint(path)

    return read


@functools.cache
def _checkpoint_seeds() -> list[bytes]:
    import torch

    from engine.checkpoints import save_checkpoint

    state = {"module.fc.weight": torch.ones(3, 4), "module.fc.bias": torch.zeros(3), "n": torch.tensor(1)}
    content = {"model": state, "meta": {"tools": ["a"], "epoch": 1, "numbers": [1, 2.5, None, True]}}
    return [
        _written(lambda path: save_checkpoint(path, content), "a.pt"),
        _written(lambda path: torch.save(state, path)),
    ]


@functools.cache
def _legacy_seeds() -> list[bytes]:
    import torch

    from engine.checkpoints import save_external_weights

    state = {"module.fc.weight": torch.ones(3, 4), "module.fc.bias": torch.zeros(3), "n": torch.tensor(1)}
    return [_written(lambda path: save_external_weights(path, state), "a.pth")]


def mend_zip(content: bytes) -> bytes:
    """The entries of a zip archive, written again with correct checksums; other files are returned unchanged."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            out = io.BytesIO()
            with zipfile.ZipFile(out, "w") as written:
                for entry in archive.infolist():
                    start = entry.header_offset + 30 + len(entry.filename.encode()) + len(entry.extra)
                    written.writestr(entry.filename, content[start : start + min(entry.file_size, 1 << 20)])
            return out.getvalue()
    except Exception:  # zipfile may raise anything on damage; then the damaged file itself is the input
        return content


def _read_pickle(path: Path) -> object:
    from engine.safe_pickle import load_plain
    from interop.pickled_videos import read_pickled_index
    from interop.text_files import read_predictions

    value = None
    for read in (
        lambda: load_plain(path),
        lambda: load_plain(path, tensors=True),
        lambda: read_pickled_index(path, SPEC),
        lambda: read_predictions(path, SPEC),
    ):
        found = _allow_refusal(read)
        value = value if found is None else found
    return value


@functools.cache
def _pickle_seeds() -> list[bytes]:
    import torch

    rows = [[f"video01/video01-{k}.jpg", *(0,) * 7, k // 3] for k in range(12)]
    phases = [np.int64(3), 2, torch.tensor(4)]
    tools = [torch.ones(7), [0.5] * 7]
    return [pickle.dumps(value, protocol) for value in ([rows, rows], phases, tools) for protocol in (0, 2, 4)]


def _read_what_it_is(path: Path) -> object:
    from engine.sniff import recognise_file

    what = recognise_file(path)
    assert what is None or (what and "\n" not in what), repr(what)
    return what


def _sniffed_seeds() -> list[bytes]:
    page = b"<!DOCTYPE html><html><head><title>Sign in</title></head></html>"
    return [page, b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12\n", *_video_seeds()[:1]]


# ---------------------------------------------------------------------------------------------- features of others


def _read_foreign(format: str) -> Callable[[Path], Read]:
    from interop.feature_files.arrays import open_features

    def read(path: Path) -> None:
        with open_features(path, format) as content:
            for axes in ("TD", "DT"):
                _allow_refusal(partial(content.frames, axes, slice(0, 50, 2)))

    return lambda folder: read


def _foreign_features() -> np.ndarray:
    return np.arange(480, dtype=np.float32).reshape(30, 16) / 7


def _tecno_seeds() -> list[bytes]:
    values = _foreign_features()
    lists = [[values, values[:, :7], np.arange(30) % 7], [values.astype(np.float64), values[:, :7], np.zeros(30)]]
    return [pickle.dumps(value, protocol) for value in lists for protocol in (2, 4, 5)]


def _numpy_seeds() -> list[bytes]:
    arrays = (_foreign_features(), np.asfortranarray(_foreign_features()), _foreign_features().astype(">f8"))
    return [_written(partial(np.save, arr=array), "a.npy") for array in arrays]


def _archive_seeds() -> list[bytes]:
    arrays = {"features": _foreign_features(), "phase": np.zeros(30, np.int8), "phase_names": np.array(SPEC.phases)}
    return [_written(partial(save, **arrays), "a.npz") for save in (np.savez, np.savez_compressed)]


def _tensor_seeds() -> list[bytes]:
    import torch

    tensor = torch.from_numpy(_foreign_features())
    contents = (tensor, {"features": tensor.half(), "labels": torch.zeros(30, dtype=torch.int64)}, [tensor.T])
    seeds = [_written(partial(torch.save, content), "a.pt") for content in contents]
    return [*seeds, _written(partial(torch.save, tensor, _use_new_zipfile_serialization=False), "a.pt")]


@functools.cache
def _hdf5_seeds() -> list[bytes]:
    import h5py

    def write(path: Path, **options: Any) -> None:
        with h5py.File(path, "w", libver=options.pop("libver", "earliest")) as file:
            file.create_dataset("features", data=_foreign_features(), **options)
            file.create_dataset("coords", data=np.zeros((30, 2), np.int64))
            file["features"].attrs["encoder"] = "resnet50"

    chunked = {"chunks": (8, 16), "maxshape": (None, 16)}
    kinds: list[dict[str, Any]] = [{}, chunked, {**chunked, "compression": "gzip"}, {**chunked, "libver": "latest"}]
    return [_written(partial(write, **options), "a.h5") for options in kinds]


def _read_truth_lines(path: Path) -> object:
    from interop.feature_files.mstcn import read_truth

    return read_truth(path, path.name, SPEC)


def _read_class_names(path: Path) -> object:
    from interop.feature_files.mstcn import spec_of_mapping

    return spec_of_mapping(path, "set", 15.0)


def _read_bundle(path: Path) -> object:
    from interop.feature_files.mstcn import read_bundles

    return read_bundles(path.parent, None)


def _read_export_file(path: Path) -> object:
    from interop.feature_files.export import read_export

    return read_export(path)


# ---------------------------------------------------------------------------------------------- videos


def _read_video(reader: str) -> Callable[[Path], Read]:
    from features.video.open import open_video
    from features.video.scan import probe_video

    def read(path: Path) -> None:
        info = probe_video(path)
        with open_video(path, reader) as frames:  # type: ignore[arg-type]
            assert (frames.frame_count, frames.times) == (info.frame_count, info.times), "indexed otherwise than read"
            for _ in frames.read(frames.spread(5)):
                pass

    return lambda folder: read


@functools.cache
def _video_seeds() -> list[bytes]:
    from tests.videos import VideoSpec, open_gop, variable_rate, write_video

    kinds = {"a.mp4": VideoSpec(count=30), "b.mkv": VideoSpec(count=30), "c.mp4": open_gop(30, 10)}
    kinds["d.avi"] = VideoSpec(count=12, codec="mpeg4", b_frames=0)
    kinds |= {"f.mp4": variable_rate(20), "g.ts": VideoSpec(count=20)}
    kinds["e.mp4"] = VideoSpec(count=20, container_options={"movflags": "frag_keyframe+empty_moov"})
    return [_written(functools.partial(write_video, spec=spec), name) for name, spec in kinds.items()]


# ---------------------------------------------------------------------------------------------- all parsers

_NAMES = (*SPEC.phases, "Frame", "Phase")
PARSERS: dict[str, Parser] = {
    "phase annotations": Parser("video01-phase.txt", _plainly(_read_phases), _phase_seeds, _NAMES),
    "tool annotations": Parser(
        "video01-tool.txt", _plainly(_read_tools), _tool_seeds, ("Frame", *SPEC.tools, "0", "1")
    ),
    "class order": Parser(
        "order.txt",
        _plainly(_read_class_order),
        lambda: ["\n".join(SPEC.phases).encode()],
        SPEC.phases,
        ("\n", ",", " "),
    ),
    "annotations, ELAN": Parser(
        "video01.eaf",
        _plainly(_read_tool_file("eaf")),
        partial(_tool_file_seeds, "eaf"),
        _XML_WORDS,
        ("", " ", "\n"),
    ),
    "annotations, Label Studio": Parser(
        "export.json",
        _plainly(_read_tool_file("labelstudio")),
        partial(_tool_file_seeds, "labelstudio"),
        _TASK_WORDS,
        ("", ",", " "),
    ),
    "annotations, CSV": Parser(
        "all.csv",
        _plainly(_read_tool_file("csv")),
        partial(_tool_file_seeds, "csv"),
        _TABLE_WORDS,
        (",", "\n", '"', ";"),
    ),
    "labels, table": Parser(
        "case_1.txt",
        _plainly(described.read_labels(described.TABLES)),
        described.table_seeds,
        described.TABLE_WORDS,
        ("\t", "\n", ",", ";", " ", '"', "|"),
    ),
    "labels, JSON": Parser(
        "case_1.json",
        _plainly(described.read_labels(described.TREES, format="json")),
        described.tree_seeds,
        described.TREE_WORDS,
        _JSON_MARKS,
    ),
    "description of labels": Parser(
        "set.yaml",
        described.read_description,
        lambda: list(described.description_seeds()),
        described.DESCRIPTION_WORDS,
        _YAML_MARKS,
    ),
    "index": Parser("index.json", _read_index, _index_seeds, _JSON_WORDS, _JSON_MARKS),
    "settings": Parser(
        "a.yaml",
        _plainly(_read_settings),
        lambda: _preset_seeds("cholec80.yaml", "mini.yaml"),
        _YAML_WORDS,
        _YAML_MARKS,
    ),
    "--set": Parser(
        "set.txt",
        _plainly(_read_override),
        lambda: [b"temporal.head.hidden=256", b"data.split.train=[video01, video02]", b"temporal.head.name=tcn"],
        _YAML_WORDS,
        (".", "=", ": ", " "),
    ),
    "data set description": Parser(
        "set.yaml",
        _plainly(_read_description),
        lambda: _preset_seeds("datasets/cholec80.yaml", "datasets/m2cai16-workflow.yaml"),
        _YAML_WORDS,
        _YAML_MARKS,
    ),
    "ablation": Parser(
        "ablation.yaml",
        _plainly(_read_ablation),
        lambda: _preset_seeds("ablations/hidden.yaml", "ablations/rates.yaml", "ablations/head.yaml"),
        _YAML_WORDS,
        _YAML_MARKS,
    ),
    "mapping of classes": Parser(
        "mapping.yaml",
        _plainly(_read_class_mapping),
        lambda: _preset_seeds("mappings/cholecystectomy.yaml", "mappings/cataract.yaml"),
        _YAML_WORDS,
        _YAML_MARKS,
    ),
    "training videos": Parser(
        "trained_on.json",
        _plainly(_read_trained_on),
        lambda: [b'{"data": [{"dataset": "cholec80", "videos": {"video01": "", "video02": "ab"}}]}', b'{"data": []}'],
        _JSON_WORDS,
        _JSON_MARKS,
    ),
    "anyone's predictions": Parser(
        "video41.txt",
        _plainly(_read_external),
        _external_seeds,
        (*_NAMES, "time_s", "phase_name"),
        ("\t", ",", ";", " ", "\n"),
    ),
    "prediction CSV": Parser("video41.csv", _plainly(_read_prediction), _prediction_seeds, _NAMES, (",", "\n", '"')),
    "tool CSV": Parser(
        "video41.csv", _plainly(_read_tool_prediction), _tool_prediction_seeds, _NAMES, (",", "\n", '"')
    ),
    "truth.json": Parser("truth.json", _plainly(_read_truth), _truth_seeds, _JSON_WORDS, _JSON_MARKS),
    "metrics.jsonl": Parser("metrics.jsonl", _plainly(_read_metrics), _metrics_seeds, _JSON_WORDS, _JSON_MARKS),
    "lines of stream": Parser("live.jsonl", _plainly(viewed.read_lines), viewed.line_seeds, _JSON_WORDS, _JSON_MARKS),
    "history of labels": Parser(
        "op.jsonl", _plainly(viewed.read_history), viewed.history_seeds, _JSON_WORDS, _JSON_MARKS
    ),
    "labels from the page": Parser(
        "sent.json", _plainly(viewed.read_sent), viewed.sent_seeds, _JSON_WORDS, _JSON_MARKS
    ),
    "feature file": Parser("video01.h5", _plainly(_read_feature_file), _feature_seeds),
    "frame cache": Parser("cached.h5", _read_cache, _cache_seeds),
    "image": Parser("1.png", _plainly(_read_image), _image_seeds, mend=mend_png),
    "TFRecord": Parser("video01.tfrecord", _plainly(_read_records), _record_seeds, mend=mend_records),
    "checkpoint": Parser("a.pt", _read_checkpoint, _checkpoint_seeds, mend=mend_zip),
    "older checkpoint": Parser("a.pth", _read_checkpoint, _legacy_seeds),
    "pickle": Parser("a.pkl", _plainly(_read_pickle), _pickle_seeds),
    "TeCNO pickle": Parser("video_1_25.0fps.pkl", _read_foreign("tecno"), _tecno_seeds),
    "Trans-SVNet pickle": Parser(
        "g_LFB50_test.pkl",
        _read_foreign("lfb"),
        lambda: [pickle.dumps(_foreign_features().astype(np.float64), protocol) for protocol in (2, 4)],
    ),
    "NumPy features": Parser("video01.npy", _read_foreign("npy"), _numpy_seeds),
    "NumPy archive": Parser("video01.npz", _read_foreign("npz"), _archive_seeds, mend=mend_zip),
    "tensor features": Parser("video01.pt", _read_foreign("pt"), _tensor_seeds, mend=mend_zip),
    "HDF5 features": Parser("video01.h5", _read_foreign("h5"), _hdf5_seeds),
    "MS-TCN labels": Parser(
        "video01.txt",
        _plainly(_read_truth_lines),
        lambda: ["".join(f"{n}\n" * 5 for n in SPEC.phases).encode()],
        _NAMES,
    ),
    "MS-TCN classes": Parser(
        "mapping.txt", _plainly(_read_class_names), lambda: [b"0 SIL\n1 cut tomato\n2 background"], _NAMES, (" ", "\n")
    ),
    "MS-TCN bundle": Parser(
        "train.split1.bundle", _plainly(_read_bundle), lambda: [b"video01.txt\nvideo02.txt\n"], _NAMES
    ),
    "exported features": Parser(
        "surgstage.json",
        _plainly(_read_export_file),
        lambda: [json.dumps({"fps": 25.0, "videos": {"a_1": "a.1"}}).encode()],
        _JSON_WORDS,
        _JSON_MARKS,
    ),
    "refused file": Parser("video01.mp4", _plainly(_read_what_it_is), _sniffed_seeds),
    "video, PyAV": Parser("video01.mp4", _read_video("pyav"), _video_seeds),
    "video, decord": Parser("video01.mp4", _read_video("decord"), lambda: _video_seeds()[:1]),
}
