"""Read TF-Cholec80: one TFRecord file per video, one `tf.train.Example` per frame, at one frame per second.

**Framing** (TensorFlow, `core/lib/io/record_writer.h`): a record consists of its length (uint64, little endian), the
masked CRC-32C of these 8 bytes, its data, and the masked CRC-32C of the data. All checksums are verified. A length is
verified before memory is allocated for it, and no record may extend beyond the file.

**Keys** of each Example: `frame` (a PNG), `video_id`, `frame_id`, `total_frames`, `phase` (a number; the file does not
record which phase it means, see `features.dataset.phase_order`) and `instruments` (0 or 1 per tool). Frame k of the
video is record k.
"""

from __future__ import annotations

import functools
import io
import itertools
import os
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from configs.dataset_spec import DataSetSpec
from configs.errors import UserError
from engine.sniff import recognise_file
from features.dataset.layouts import RecordLayout
from features.ids import id_key
from features.video.base import FrameReader, ReaderError
from features.video.images import decode_image

FPS = 1.0
# The largest record that is read, far larger than any frame (480 x 854 raw pixels are 1.2 MB).
MAX_RECORD_BYTES = 1 << 27
_HEADER = struct.Struct("<QI")
_CHECKSUM = struct.Struct("<I")
_PNG = b"\x89PNG\r\n\x1a\n"
_REMEDY = "copy the file again or leave it out"
_ID = re.compile(r"(\D*?)[ _-]?(\d{1,9})")


# ---------------------------------------------------------------------------------------------- framing


def masked_crc32c(content: bytes) -> int:
    """Return the CRC-32C in the form in which TFRecords store it: rotated right by 15 bits, plus a constant."""
    crc = google_crc32c.value(content)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


class RecordSpan(NamedTuple):
    """The position of a record's data in its file, in bytes."""

    offset: int
    length: int


def record_spans(stream: BinaryIO, path: Path) -> Iterator[RecordSpan]:
    """Yield the positions of the records. Headers are read and verified, but data is not.

    Raises ReaderError naming the record if its header is damaged or the file ends within it.
    """
    size = os.fstat(stream.fileno()).st_size
    offset = 0
    for number in itertools.count():
        if offset == size:
            return
        header = _read_at(stream, offset, _HEADER.size, f"{path}: record {number}")
        length, checksum = _HEADER.unpack(header)
        if masked_crc32c(header[:8]) != checksum:
            if number == 0 and (found := recognise_file(path)):
                raise ReaderError(f"{path}: is {found}")
            what = "is not a TFRecord file, or its" if number == 0 else f"record {number}: its"
            raise ReaderError(f"{path}: {what} length does not fit its checksum; {_REMEDY}")
        span = RecordSpan(offset + _HEADER.size, length)
        offset = span.offset + length + _CHECKSUM.size
        if offset > size:
            raise ReaderError(f"{path}: record {number} is incomplete: the file ends within it; {_REMEDY}")
        if length > MAX_RECORD_BYTES:
            raise ReaderError(f"{path}: record {number} has {length:,} bytes, too many for a frame; {_REMEDY}")
        yield span


def read_record(stream: BinaryIO, span: RecordSpan, place: str) -> bytes:
    """Read a record's data. Raises ReaderError, whose message begins with `place`, if its checksum is wrong."""
    content = _read_at(stream, span.offset, span.length + _CHECKSUM.size, place)
    data = content[: span.length]
    if masked_crc32c(data) != _CHECKSUM.unpack(content[span.length :])[0]:
        raise ReaderError(f"{place} is damaged: its data does not fit its checksum; {_REMEDY}")
    return data


def _read_at(stream: BinaryIO, offset: int, count: int, place: str) -> bytes:
    try:
        stream.seek(offset)
        content = stream.read(count)
    except OSError as error:
        raise ReaderError(f"{place} cannot be read ({error.strerror}); {_REMEDY}") from error
    if len(content) != count:
        raise ReaderError(f"{place} is incomplete: the file ends within it; {_REMEDY}")
    return content


def _open(path: Path) -> BinaryIO:
    """Open a file with a small buffer; with the usual one, reading each header would read a whole block."""
    try:
        return path.open("rb", buffering=64)
    except OSError as error:
        raise ReaderError(f"{path}: cannot be read ({error.strerror}); {_REMEDY}") from error


# ---------------------------------------------------------------------------------------------- one record


@dataclass(frozen=True)
class FrameRecord:
    """The content of a record. `phase` is a number in the file's own order of phases."""

    frame: bytes
    video_id: str
    frame_id: int
    total_frames: int
    phase: int
    instruments: tuple[int, ...]


def parse_record(content: bytes, place: str) -> FrameRecord:
    """Parse a record's data. Raises ReaderError, whose message begins with `place`, for a missing or wrong key."""
    from google.protobuf.message import DecodeError

    try:
        features = example_class().FromString(content).features.feature
    except DecodeError as error:
        raise ReaderError(f"{place} is not a tf.train.Example; not a TF-Cholec80 file") from error
    frame = bytes(_one_value(features, "frame", "bytes_list", place))
    if not frame.startswith(_PNG):
        raise ReaderError(f"{place}: its frame is not a PNG; {_REMEDY}")
    return FrameRecord(
        frame=frame,
        video_id=_one_value(features, "video_id", "bytes_list", place).decode("utf-8", "replace"),
        frame_id=_one_value(features, "frame_id", "int64_list", place),
        total_frames=_one_value(features, "total_frames", "int64_list", place),
        phase=_one_value(features, "phase", "int64_list", place),
        instruments=tuple(_values(features, "instruments", "int64_list", place)),
    )


def _values(features: Any, key: str, kind: Literal["bytes_list", "int64_list"], place: str) -> Sequence[Any]:
    found = features[key].WhichOneof("kind") if key in features else None
    if found is None:
        raise ReaderError(f"{place} lacks the key {key!r}; not a TF-Cholec80 file")
    if found != kind:
        raise ReaderError(f"{place} contains a {found} under {key!r}, not a {kind}; not a TF-Cholec80 file")
    values: Sequence[Any] = getattr(features[key], kind).value
    return values


def _one_value(features: Any, key: str, kind: Literal["bytes_list", "int64_list"], place: str) -> Any:
    values = _values(features, key, kind, place)
    if len(values) != 1:
        raise ReaderError(f"{place} contains {len(values)} values under {key!r}, not one; not a TF-Cholec80 file")
    return values[0]


# tensorflow/core/example/{example,feature}.proto, as a descriptor
_EXAMPLE = """
name: "surgstage/example.proto" package: "tensorflow" syntax: "proto3"
message_type { name: "BytesList" field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_BYTES } }
message_type { name: "FloatList" field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_FLOAT } }
message_type { name: "Int64List" field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_INT64 } }
message_type { name: "Feature" oneof_decl { name: "kind" }
  field { name: "bytes_list" number: 1 type: TYPE_MESSAGE type_name: ".tensorflow.BytesList" oneof_index: 0 }
  field { name: "float_list" number: 2 type: TYPE_MESSAGE type_name: ".tensorflow.FloatList" oneof_index: 0 }
  field { name: "int64_list" number: 3 type: TYPE_MESSAGE type_name: ".tensorflow.Int64List" oneof_index: 0 } }
message_type { name: "Features"
  field { name: "feature" number: 1 type: TYPE_MESSAGE label: LABEL_REPEATED
    type_name: ".tensorflow.Features.FeatureEntry" }
  nested_type { name: "FeatureEntry" options { map_entry: true }
    field { name: "key" number: 1 type: TYPE_STRING }
    field { name: "value" number: 2 type: TYPE_MESSAGE type_name: ".tensorflow.Feature" } } }
message_type { name: "Example"
  field { name: "features" number: 1 type: TYPE_MESSAGE type_name: ".tensorflow.Features" } }
"""


@functools.cache
def example_class() -> Any:
    """Return the message class of `tf.train.Example` (TensorFlow, `core/example/example.proto` and `feature.proto`).

    It is built in its own descriptor pool, so that it does not collide with that of a TensorFlow in the same process.
    """
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

    pool = descriptor_pool.DescriptorPool()
    pool.Add(text_format.Parse(_EXAMPLE, descriptor_pb2.FileDescriptorProto()))
    descriptor = pool.FindMessageTypeByName("tensorflow.Example")
    get_class = getattr(message_factory, "GetMessageClass", None)  # since protobuf 4.22
    return get_class(descriptor) if get_class else message_factory.MessageFactory(pool).GetPrototype(descriptor)


# ---------------------------------------------------------------------------------------------- one file


def scan_records(path: Path, video_id: str, spec: DataSetSpec, phase_order: tuple[str, ...]) -> RecordLayout:
    """Read a whole file, verify it and return its labels.

    Checksums, keys and numbers of all records are verified, but no image is decoded, and only one record is in memory
    at a time. `video_id` is the id in the file's name, and `phase_order` names the phase of each number in the file.
    Raises ReaderError naming the record if it is damaged or of another video, if frames are missing, repeated or out of
    order, or if the data set does not have its labels.
    """
    first: FrameRecord | None = None
    rows = []
    with _open(path) as stream:
        for number, span in enumerate(record_spans(stream, path)):
            place = f"{path}: record {number}"
            record = parse_record(read_record(stream, span, place), place)
            first = first or record
            if problem := _problem(record, first, number, video_id) or _label_problem(record, spec):
                raise ReaderError(f"{place}{problem}")
            rows.append((record.phase, tuple(tool for tool, present in enumerate(record.instruments) if present)))
    if first is None:
        raise ReaderError(f"{path}: contains no record; {_REMEDY}")
    base: Literal[0, 1] = 1 if first.frame_id else 0
    # total_frames may be the number of frames or, as TF-Cholec80's own loader understands it, the last frame_id.
    if first.total_frames not in {len(rows), len(rows) - 1 + base}:
        raise ReaderError(f"{path}: contains {len(rows)} records, but total_frames is {first.total_frames}; {_REMEDY}")
    return RecordLayout.of_rows(base, first.total_frames, phase_order, rows)


def _problem(record: FrameRecord, first: FrameRecord, number: int, video_id: str) -> str | None:
    """Return why a record does not belong at this position, as text that follows the record's name, or None."""
    of_video = f" is of video {record.video_id[:60]!r}"
    if number == 0 and not _same_video(record.video_id, video_id):
        return f"{of_video}, but its file is named {video_id}; rename the file"
    if number == 0 and record.frame_id not in (0, 1):
        return f" is frame {record.frame_id}, not 0 or 1: the video's start is missing; {_REMEDY}"
    if record.video_id != first.video_id:
        return f"{of_video}, but the first record is of video {first.video_id!r}; {_REMEDY}"
    if record.frame_id != first.frame_id + number:
        return f" is frame {record.frame_id}, but frame {first.frame_id + number} was expected; {_REMEDY}"
    if record.total_frames != first.total_frames:
        return f": total_frames is {record.total_frames}, but was {first.total_frames} before; {_REMEDY}"
    return None


def _label_problem(record: FrameRecord, spec: DataSetSpec) -> str | None:
    """Return why a record's labels do not fit the data set, as text that follows the record's name, or None."""
    if not 0 <= record.phase < len(spec.phases):
        return f": phase {record.phase} is not one of the {len(spec.phases)} phases of {spec.name}"
    if len(record.instruments) != len(spec.tools):
        return f": has {len(record.instruments)} instruments, but {spec.name} has {len(spec.tools)} tools"
    if not {0, 1}.issuperset(record.instruments):
        return f": instruments are {list(record.instruments)}, not all 0 or 1"
    return None


def _same_video(recorded: str, video_id: str) -> bool:
    """Whether a record's video_id (such as video1, video_01 or 1) means the id in the file's name (video01)."""
    recorded, video_id = id_key(recorded), id_key(video_id)
    one, other = _ID.fullmatch(recorded), _ID.fullmatch(video_id)
    if one is None or other is None:
        return recorded == video_id
    return int(one[2]) == int(other[2]) and one[1] in ("", other[1])


# ---------------------------------------------------------------------------------------------- in the index


def require_one_numbering(layouts: Sequence[tuple[str, RecordLayout]]) -> None:
    """Raise UserError if two files number frames differently: a lost frame is more likely than two conventions."""
    first: dict[tuple[int, int], str] = {}
    for path, layout in layouts:
        first.setdefault((layout.frame_base, layout.total_frames - layout.frame_count), path)
    if len(first) > 1:
        one, other = list(first.values())[:2]
        raise UserError(
            f"{other}: frame_id and total_frames are counted differently from {one}, so a frame is missing; {_REMEDY}"
        )


# ---------------------------------------------------------------------------------------------- reading frames


class TfrecordReader(FrameReader):
    """Reads the frames of a TFRecord file with Pillow, by their position in the file, and verifies their checksums."""

    name = "pillow"

    def __init__(self, path: Path, layout: RecordLayout) -> None:
        import PIL

        self.version = PIL.__version__
        self.path = path
        self._base = layout.frame_base
        with _open(path) as stream:
            self._spans = tuple(record_spans(stream, path))
        self.frame_count = len(self._spans)
        if self.frame_count != layout.frame_count:
            raise ReaderError(
                f"{path}: contains {self.frame_count} records, but {layout.frame_count} were indexed; run index again"
            )

    def _frames(self, wanted: list[int]) -> Iterator[NDArray[np.uint8]]:
        """See FrameReader; the file is open only while frames are read."""
        with _open(self.path) as stream:
            for number in wanted:
                place = f"{self.path}: record {number}"
                record = parse_record(read_record(stream, self._spans[number], place), place)
                if record.frame_id != self._base + number:
                    raise ReaderError(f"{place} is another frame ({record.frame_id}) than was indexed; run index again")
                yield decode_image(io.BytesIO(record.frame), place, number)
