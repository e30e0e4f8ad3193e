"""Files that the libraries of annotation tools made, and intervals for tests of all formats."""

from __future__ import annotations

from hypothesis import strategies as st

from features.annotation_files.intervals import Interval, VideoAnnotations

# Made by pympi-ling 1.71: add_linked_file, add_tier, add_annotation and add_ref_annotation, then to_file.
PYMPI_EAF = """\
<?xml version='1.0' encoding='UTF-8'?>
<ANNOTATION_DOCUMENT AUTHOR="" DATE="2026-01-01T00:00:00+00:00" VERSION="2.8" FORMAT="2.8" \
xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance" \
xsi:noNamespaceSchemaLocation="http://www.mpi.nl/tools/elan/EAFv2.8.xsd">
\t<HEADER MEDIA_FILE="" TIME_UNITS="milliseconds">
\t\t<MEDIA_DESCRIPTOR MEDIA_URL="file:///videos/video01.mp4" RELATIVE_MEDIA_URL="./video01.mp4" \
MIME_TYPE="video/mp4" />
\t\t<PROPERTY NAME="lastUsedAnnotation">0</PROPERTY>
\t\t</HEADER>
\t<TIME_ORDER>
\t\t<TIME_SLOT TIME_SLOT_ID="ts2" TIME_VALUE="0" />
\t\t<TIME_SLOT TIME_SLOT_ID="ts3" TIME_VALUE="2000" />
\t\t<TIME_SLOT TIME_SLOT_ID="ts4" TIME_VALUE="2000" />
\t\t<TIME_SLOT TIME_SLOT_ID="ts5" TIME_VALUE="3480" />
\t\t</TIME_ORDER>
\t<TIER TIER_ID="phase" LINGUISTIC_TYPE_REF="default-lt">
\t\t<ANNOTATION>
\t\t\t<ALIGNABLE_ANNOTATION ANNOTATION_ID="a2" TIME_SLOT_REF1="ts2" TIME_SLOT_REF2="ts3">
\t\t\t\t<ANNOTATION_VALUE>Preparation</ANNOTATION_VALUE>
\t\t\t\t</ALIGNABLE_ANNOTATION>
\t\t\t</ANNOTATION>
\t\t<ANNOTATION>
\t\t\t<ALIGNABLE_ANNOTATION ANNOTATION_ID="a3" TIME_SLOT_REF1="ts4" TIME_SLOT_REF2="ts5">
\t\t\t\t<ANNOTATION_VALUE>Calot triangle dissection</ANNOTATION_VALUE>
\t\t\t\t</ALIGNABLE_ANNOTATION>
\t\t\t</ANNOTATION>
\t\t</TIER>
\t<TIER TIER_ID="steps" LINGUISTIC_TYPE_REF="subdivision" PARENT_REF="phase">
\t\t<ANNOTATION>
\t\t\t<REF_ANNOTATION ANNOTATION_ID="a4" ANNOTATION_REF="a2">
\t\t\t\t<ANNOTATION_VALUE>Trocars</ANNOTATION_VALUE>
\t\t\t\t</REF_ANNOTATION>
\t\t\t</ANNOTATION>
\t\t<ANNOTATION>
\t\t\t<REF_ANNOTATION ANNOTATION_ID="a5" ANNOTATION_REF="a3">
\t\t\t\t<ANNOTATION_VALUE>Peritoneum</ANNOTATION_VALUE>
\t\t\t\t</REF_ANNOTATION>
\t\t\t</ANNOTATION>
\t\t</TIER>
\t<LINGUISTIC_TYPE LINGUISTIC_TYPE_ID="default-lt" TIME_ALIGNABLE="true" GRAPHIC_REFERENCES="false" />
\t<LINGUISTIC_TYPE LINGUISTIC_TYPE_ID="subdivision" TIME_ALIGNABLE="false" GRAPHIC_REFERENCES="false" \
CONSTRAINTS="Symbolic_Subdivision" />
\t<CONSTRAINT STEREOTYPE="Symbolic_Subdivision" DESCRIPTION="Symbolic subdivision of a parent annotation. \
Annotations refering to the same parent are ordered" />
\t</ANNOTATION_DOCUMENT>
"""

# As the documentation of Label Studio shows an export: two annotators, a cancelled annotation and a prediction.
LABEL_STUDIO_EXPORT = """\
[{"id": 7, "file_upload": "1a2b3c4d-video01.mp4", "data": {"video": "/data/upload/1/1a2b3c4d-video01.mp4", "fps": 25},
  "annotations": [
    {"id": 1, "completed_by": {"id": 3, "email": "ann@example.org"}, "was_cancelled": false, "ground_truth": false,
     "lead_time": 12.5, "result_count": 2, "result": [
      {"id": "r1", "type": "timelinelabels", "from_name": "phase", "to_name": "video", "origin": "manual",
       "value": {"ranges": [{"start": 1, "end": 50}], "timelinelabels": ["Preparation"]}},
      {"id": "r2", "type": "timelinelabels", "from_name": "phase", "to_name": "video", "origin": "manual",
       "value": {"ranges": [{"start": 51, "end": 87}], "timelinelabels": ["Calot triangle dissection"]}}]},
    {"id": 2, "completed_by": 4, "was_cancelled": true, "result": [
      {"id": "r3", "type": "timelinelabels", "from_name": "phase", "to_name": "video",
       "value": {"ranges": [{"start": 1, "end": 87}], "timelinelabels": ["Nonsense"]}}]}],
  "predictions": [{"id": 5, "model_version": "surgstage", "score": 0.8, "result": [
      {"id": "r4", "type": "timelinelabels", "from_name": "phase", "to_name": "video", "score": 0.8,
       "value": {"ranges": [{"start": 1, "end": 87}], "timelinelabels": ["Preparation"]}}]}]}]
"""

# Made by label-studio-sdk 2.1.2: TaskValue of AnnotationValue and PredictionValue, then model_dump(mode="json").
SDK_TASK = """\
[{"data": {"video": "/data/upload/1/1a2b3c4d-video01.mp4", "fps": 25}, "annotations": [{"was_cancelled": false, \
"ground_truth": false, "lead_time": 0.0, "result_count": 0, "completed_by": 3, "result": [{"id": "r3", \
"type": "timelinelabels", "from_name": "phase", "to_name": "video", "value": {"ranges": [{"start": 1, \
"end": 48}], "timelinelabels": ["Preparation"]}}, {"id": "r4", "type": "timelinelabels", "from_name": "phase", \
"to_name": "video", "value": {"ranges": [{"start": 49, "end": 87}], "timelinelabels": ["Closure"]}}]}], \
"predictions": [{"model_version": "m1", "score": 0.8, "result": [{"id": "r1", "type": "timelinelabels", \
"from_name": "phase", "to_name": "video", "value": {"ranges": [{"start": 1, "end": 50}], \
"timelinelabels": ["Preparation"]}}, {"id": "r2", "type": "timelinelabels", "from_name": "phase", \
"to_name": "video", "value": {"ranges": [{"start": 51, "end": 87}], "timelinelabels": ["Closure"]}}]}]}]
"""
# The same annotation, made by the sdk's Converter.convert_to_json_min.
SDK_JSON_MIN = """\
[{"video": "/data/upload/1/1a2b3c4d-video01.mp4", "fps": 25, "id": 1, "phase": [{"ranges": [{"start": 1, \
"end": 48}], "timelinelabels": ["Preparation"]}, {"ranges": [{"start": 49, "end": 87}], \
"timelinelabels": ["Closure"]}], "annotator": 3, "annotation_id": 1, "created_at": null, "updated_at": null, \
"lead_time": 0.0}]
"""

FPS = 25.0
_NAMES = st.text(st.characters(blacklist_categories=("Cc", "Cs", "Cn", "Zl", "Zp")), min_size=1, max_size=12).map(
    lambda text: " ".join(text.split())
)
names = st.one_of(st.sampled_from(["phase", "phase (2)", "steps", "confidence", "Calot <&> 'dissection'"]), _NAMES)
names = names.filter(lambda text: text and text[0] not in "=+-@")  # formulas, which CSV refuses


@st.composite
def intervals(draw: st.DrawFn, confidences: bool, annotators: bool, tracks: int = 3) -> tuple[Interval, ...]:
    """Intervals that begin and end on frames of a video at 25 fps; they may overlap, touch and leave gaps."""
    known = draw(st.lists(names, min_size=1, max_size=tracks, unique=True))
    who = draw(st.lists(st.one_of(st.none(), names, st.just("7")), min_size=1, max_size=2)) if annotators else [None]
    found = []
    for _ in range(draw(st.integers(1, 8))):
        start = draw(st.integers(0, 400))
        confidence = draw(st.integers(0, 100)) / 100 if confidences else None
        found.append(
            Interval(
                draw(st.sampled_from(known)),
                draw(names),
                start / FPS,
                (start + draw(st.integers(1, 100))) / FPS,
                confidence,
                draw(st.sampled_from(who)),
            )
        )
    return sorted_intervals(found)


def sorted_intervals(found: object) -> tuple[Interval, ...]:
    """Intervals in one order, so that two lists can be compared."""
    return tuple(sorted(found, key=lambda one: (one.track, one.start_s, one.end_s, one.label, one.annotator or "",  # type: ignore[call-overload]
                                                one.confidence or 0)))  # fmt: skip


def video_of(found: tuple[Interval, ...], video: str = "video01") -> VideoAnnotations:
    """The intervals as those of one video."""
    return VideoAnnotations(video, found, FPS, f"{video}.mp4")
