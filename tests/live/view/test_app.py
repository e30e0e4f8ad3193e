"""The viewer's answers: exact frames of every kind of source, ranges of files, labels, exports; hostile requests."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from configs.errors import UserError
from features.annotation_files.table import read_csv
from features.video.open import open_video
from live.view.app import Material
from tests.live.view.material import LABELS, client, material, write_case
from tests.report_material import write_run
from tests.videos import VideoSpec, damage_packet, frame_number, variable_rate, write_video


def frame(page: TestClient, video: int, number: int) -> np.ndarray:
    answer = page.get(f"/api/videos/{video}/frames/{number}")
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "image/jpeg"
    return np.asarray(PIL.Image.open(io.BytesIO(answer.content)).convert("RGB"))


def errors(answer: Any) -> str:
    """The sentence of a refused request: one line, as a command would print it."""
    assert answer.status_code == 422, answer.text
    text: str = answer.json()["error"]
    assert "\n" not in text
    return text


# ---------------------------------------------------------------------------------------------- frames


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("b-frames.mp4", VideoSpec()),
        ("parts.avi", VideoSpec(codec="mpeg4", b_frames=0)),
        ("varies.mkv", variable_rate()),
        ("stream.ts", VideoSpec(gop=30)),
    ],
)
def test_stepping_shows_frame_k_in_any_order(tmp_path: Path, name: str, spec: VideoSpec) -> None:
    path = write_video(tmp_path / name, spec)
    page = client(material(path))
    about = page.get("/api/videos/0").json()["timing"]
    assert about["count"] == spec.count
    for number in (0, 1, 2, 30, 29, 28, 59, 3, 58, 59, 0):
        assert frame_number(frame(page, 0, number)) == number
    with open_video(path) as reader:
        [exact] = reader.read([17])
        if reader.times is not None:
            assert about["edges_s"][:-1] == pytest.approx(reader.times.seconds(reader.frame_count), abs=1e-5)
    assert np.abs(frame(page, 0, 17).astype(int) - exact).mean() < 3  # JPEG's rounding alone


def test_frames_in_a_folder_keep_their_numbers(tmp_path: Path) -> None:
    from tests.videos import painted_frame

    folder = tmp_path / "op 3"
    folder.mkdir()
    for number in (0, 25, 50, 100):
        PIL.Image.fromarray(painted_frame(number)).save(folder / f"frame_{number:06d}.png")
    page = client(material(folder))
    about = page.get("/api/videos/0").json()
    assert about["timing"]["numbers"] == [0, 25, 50, 100]
    assert about["media"] is None
    assert [frame_number(frame(page, 0, at)) for at in range(4)] == [0, 25, 50, 100]


def test_a_damaged_frame_is_told_and_the_others_are_shown(tmp_path: Path) -> None:
    large = {"width_px": 320, "height_px": 240, "codec_options": {"crf": "12"}}
    path = damage_packet(write_case(tmp_path, count=60, **large), 26)
    page = client(material(path))
    answers = {k: page.get(f"/api/videos/0/frames/{k}") for k in (0, 5, *range(24, 40), 59)}
    assert answers[0].status_code == answers[5].status_code == 200
    assert any(one.status_code == 422 and "case.mp4" in errors(one) for one in answers.values())


def test_what_is_no_video_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"not a video" * 100)
    (tmp_path / "b.mp4").write_bytes(b"")
    page = client(material(tmp_path))
    for number in (0, 1):
        for address in ("", "/frames/0", "/media"):
            assert ".mp4" in errors(page.get(f"/api/videos/{number}{address}"))


def test_names_that_would_share_labels_are_refused(tmp_path: Path) -> None:
    one, other = write_case(tmp_path / "a", count=5), write_case(tmp_path / "b", count=5)
    with pytest.raises(UserError, match="both are called case"):
        material(one, other)
    with pytest.raises(UserError, match="no such video"):
        material(tmp_path / "missing.mp4")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="neither videos nor images"):
        material(tmp_path / "empty")


# ---------------------------------------------------------------------------------------------- files and paths


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("secrets")
    (folder / "private.mp4").write_bytes(b"private")
    return write_case(folder / "videos")


@pytest.fixture
def page(case: Path, tmp_path: Path) -> TestClient:
    return client(material(case, labels=tmp_path / "labels"))


def test_ranges_of_a_file_as_a_player_asks_for_them(page: TestClient, case: Path) -> None:
    content = case.read_bytes()
    assert page.get("/api/videos/0/media").content == content
    part = page.get("/api/videos/0/media", headers={"range": "bytes=100-299"})
    assert (part.status_code, part.content) == (206, content[100:300])
    assert part.headers["content-range"] == f"bytes 100-299/{len(content)}"
    assert page.get("/api/videos/0/media", headers={"range": "bytes=-7"}).content == content[-7:]
    for bad in ("bytes=9999999999-", "bytes=5-2", "bytes=x-y", "lines=1-2", "bytes=" + "0-1," * 2000 + "0-1", "bytes="):
        answer = page.get("/api/videos/0/media", headers={"range": bad})
        assert answer.status_code in (200, 206, 400, 416), bad
        assert len(answer.content) <= 2 * len(content) + (1 << 20)


OUTSIDE = ["../private.mp4", "..%2fprivate.mp4", "%2e%2e/private.mp4", "/etc/passwd", "//etc/passwd",
           "0/../../private", "0%00", "-1", "1", "1e0", "\u0663", "0x0", "9" * 5000, "case", "case.mp4", "0.0", " 0",
           "+0", "\udcff"]  # fmt: skip


@pytest.mark.parametrize("place", OUTSIDE)
def test_no_path_leads_out_of_the_named_files(page: TestClient, place: str) -> None:
    encoded = place.encode("utf-8", "surrogateescape")
    text = "".join(chr(byte) if byte < 128 and byte > 32 else f"%{byte:02X}" for byte in encoded)
    for address in (f"/{text}", f"/page/{text}", f"/api/videos/{text}", f"/api/videos/{text}/media",
                    f"/api/videos/{text}/frames/0", f"/api/videos/0/frames/{text}", f"/api/videos/0/rows/{text}",
                    f"/api/videos/{text}/labels", f"/api/export?format=csv&video={text}"):  # fmt: skip
        answer = page.get(address)
        wanted = address == "/api/videos/0/frames/1"  # it exists
        assert answer.status_code == 200 if wanted else answer.status_code in (404, 422), address
        assert b"private" not in answer.content.replace(b"private.mp4", b"")
        assert b"root:" not in answer.content


@pytest.mark.parametrize("name", ["main.js", "view.css", "index.html", "icon.svg"])
def test_the_page_is_in_the_package(page: TestClient, name: str) -> None:
    assert page.get(f"/page/{name}").status_code == 200
    assert page.get(f"/page/{name}x").status_code == 404


# ---------------------------------------------------------------------------------------------- rows


def test_rows_of_a_run_are_those_of_its_files(tmp_path: Path) -> None:
    videos = [write_video(tmp_path / f"video0{n}.mp4", VideoSpec(count=4 + n)) for n in (1, 2)]
    run = write_run(tmp_path / "runs/first", ("video01", "video02"), frames=60)
    opened = material(*videos, runs=(run,))
    source: Any = opened.sources[0]
    digest = opened.video(1).entry.sha256_ends  # the run's made-up recording is this one
    known = source.results.truth.videos
    object.__setattr__(known["video02"], "source", digest)
    page = client(opened)
    assert page.get("/api/videos/0").json()["rows"] == []  # another recording under the same name
    rows = page.get("/api/videos/1").json()["rows"]
    assert [(one["name"], one["kind"], one["track"]) for one in rows] == [
        ("truth", "truth", "phase"),
        ("truth", "truth", "tool"),
        ("first", "prediction", "phase"),
        ("first", "prediction", "tool"),
    ]
    found = source.results.predictions["video02"]
    painted = np.full(60, -1)
    for label, start, end in zip(rows[2]["labels"], rows[2]["spans"][::2], rows[2]["spans"][1::2], strict=True):
        painted[round(start) : round(end)] = label
    assert (painted == found.phase).all()
    content = page.get("/api/videos/1/rows/3").content
    samples, tools = rows[3]["samples"], len(rows[3]["names"])
    edges_s = np.frombuffer(content, "<f4", samples + 1)
    values = np.frombuffer(content, np.uint8, offset=4 * (samples + 1)).reshape(tools, samples)
    assert (edges_s[:-1] == found.time_s).all()
    assert np.abs(values / 255 - found.tool_probabilities.T).max() < 1 / 255
    assert page.get("/api/videos/1/rows/4").status_code == 422


def test_predictions_and_labels_of_files_are_shown(tmp_path: Path) -> None:
    case = write_case(tmp_path, count=FRAMES_OF_FILES)
    header = "frame,time_s,phase,phase_name,p_Preparation,p_CalotTriangleDissection,p_ClippingCutting,"
    header += "p_GallbladderDissection,p_GallbladderPackaging,p_CleaningCoagulation,p_GallbladderRetraction"
    rows = ["0,0.000,0,Preparation,0.9,0.1,0,0,0,0,0", "25,1.000,1,CalotTriangleDissection,0.2,0.8,0,0,0,0,0"]
    (tmp_path / "predicted").mkdir()
    (tmp_path / "predicted/case.json").write_text("{}")  # how it was made
    (tmp_path / "predicted/case.csv").write_text("\n".join([header, *rows]) + "\n")
    (tmp_path / "theirs.csv").write_text(LABELS)
    (tmp_path / "case-phase.txt").write_text("Frame\tPhase\n0\tPreparation\n25\tClippingCutting\n")
    shown = (tmp_path / "predicted", tmp_path / "theirs.csv", tmp_path / "case-phase.txt")
    rows_shown = client(material(case, shown=shown)).get("/api/videos/0").json()["rows"]
    by_name = {one["name"]: one for one in rows_shown}
    assert by_name["predicted"]["spans"] == [0, 1, 1, 2]
    assert by_name["predicted"]["kind"] == "prediction"
    assert by_name["theirs.csv"]["spans"] == [0, 4, 4, 10]
    assert by_name["case-phase.txt"]["spans"] == [0, 1, 1, 2]
    (tmp_path / "odd.csv").write_text(header.replace("Preparation", "Unknown") + "\n" + rows[0] + "\n")
    with pytest.raises(UserError, match="--dataset"):
        material(case, shown=(tmp_path / "odd.csv",))


FRAMES_OF_FILES = 60


# ---------------------------------------------------------------------------------------------- labels


def interval(label: str, start: float, end: float, **more: Any) -> dict[str, Any]:
    return {"track": "phase", "label": label, "start": start, "end": end, **more}


def test_labels_are_saved_as_a_file_of_annotations_and_shown_again(page: TestClient, tmp_path: Path) -> None:
    assert page.get("/api/videos/0/labels").json() == {"state": "new", "own": [], "others": []}
    own = [interval("Preparation", 0, 2.52), interval("ClippingCutting", 2.52, 10, confidence=0.7)]
    saved = page.put("/api/videos/0/labels", json={"state": "new", "intervals": own}).json()
    assert saved["own"] == own
    path = tmp_path / "labels/case.csv"
    [video] = read_csv(path.read_bytes(), path).videos
    assert [(one.label, one.start_s, one.end_s) for one in video.intervals] == [
        ("Preparation", 0.0, 2.52),
        ("ClippingCutting", 2.52, 10.0),
    ]
    assert page.get("/api/videos/0/labels").json() == saved
    [entry] = page.get("/api/videos/0/history").json()
    assert entry["intervals"] == own


def test_a_change_that_was_made_on_other_labels_is_refused_and_nothing_is_written(page: TestClient) -> None:
    first = page.put("/api/videos/0/labels", json={"state": "new", "intervals": [interval("A", 0, 1)]}).json()
    late = page.put("/api/videos/0/labels", json={"state": "new", "intervals": [interval("B", 0, 1)]})
    assert late.status_code == 409
    assert late.json()["current"] == first
    assert page.get("/api/videos/0/labels").json() == first
    mine = page.put("/api/videos/0/labels", json={"state": first["state"], "intervals": [interval("B", 0, 1)]})
    assert mine.status_code == 200
    assert [one["intervals"][0]["label"] for one in page.get("/api/videos/0/history").json()] == ["B", "A"]


def test_two_peoples_labels_are_side_by_side_and_only_ones_own_are_changed(case: Path, tmp_path: Path) -> None:
    anna = client(material(case, labels=tmp_path, annotator="anna"))
    ben = client(material(case, labels=tmp_path, annotator="ben"))
    state = anna.put("/api/videos/0/labels", json={"state": "new", "intervals": [interval("A", 0, 5)]}).json()["state"]
    seen = ben.get("/api/videos/0/labels").json()
    assert (seen["own"], [one["name"] for one in seen["others"]]) == ([], ["others (anna)"])
    forged = interval("B", 0, 4, annotator="anna")
    ben.put("/api/videos/0/labels", json={"state": state, "intervals": [forged]})
    both = anna.get("/api/videos/0/labels").json()
    assert [(one["label"], one["annotator"]) for one in both["own"]] == [("A", "anna")]
    assert [one["name"] for one in both["others"]] == ["others (ben)"]
    exported = anna.get("/api/export?format=csv").text
    assert "anna" in exported
    assert "ben" not in exported


def test_exports_are_those_of_annotations_convert(page: TestClient) -> None:
    assert "no labels" in errors(page.get("/api/export?format=eaf"))
    own = [interval("Preparation", 0, 4), interval("CalotTriangleDissection", 4, 10)]
    page.put("/api/videos/0/labels", json={"state": "new", "intervals": own})
    table = page.get("/api/export?format=csv&video=0")
    assert table.text == LABELS.replace("0,4", "0.000,4.000").replace("4,10", "4.000,10.000")
    rows = page.get("/api/export?format=cholec80").text.splitlines()
    assert rows[1] == "0\tPreparation"
    assert (rows[100], rows[101]) == ("99\tPreparation", "100\tCalotTriangleDissection")  # 25 frames per second
    assert len(rows) == 251
    assert "<ANNOTATION_DOCUMENT" in page.get("/api/export?format=eaf").text
    packed = page.get("/api/export?format=labelstudio")
    with zipfile.ZipFile(io.BytesIO(packed.content)) as archive:
        assert sorted(archive.namelist()) == ["labelstudio.json", "labelstudio.xml"]
        assert json.loads(archive.read("labelstudio.json"))[0]["data"]["fps"] == 25
    assert "zip" in packed.headers["content-disposition"]
    assert "format" in errors(page.get("/api/export?format=exe"))


def test_without_a_folder_of_labels_there_is_only_to_look(case: Path) -> None:
    page = client(material(case))
    assert page.get("/api/state").json()["can_save"] is False
    for answer in (
        page.get("/api/videos/0/labels"),
        page.put("/api/videos/0/labels", json={"state": "new", "intervals": []}),
    ):
        assert "--labels" in errors(answer)
    assert "--live" in errors(page.get("/api/live"))


def test_a_file_of_labels_that_cannot_be_read_is_told_and_not_overwritten(page: TestClient, tmp_path: Path) -> None:
    path = tmp_path / "labels/case.csv"
    path.parent.mkdir()
    for content in ("nonsense", "video,track,label,start,end\nother,phase,A,0,1\n", "label,start,end\nA,1,0\n"):
        path.write_text(content)
        assert "case.csv" in errors(page.get("/api/videos/0/labels"))
        assert "case.csv" in errors(page.put("/api/videos/0/labels", json={"state": "new", "intervals": []}))
        assert path.read_text() == content


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
FIELDS = st.fixed_dictionaries(
    {},
    optional=dict.fromkeys(("track", "label", "start", "end", "confidence", "annotator"), JSON_VALUES),
)
NEARLY = st.fixed_dictionaries({}, optional={"state": JSON_VALUES, "intervals": st.lists(FIELDS, max_size=2)})


@pytest.fixture(scope="module")
def attacked(case: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[TestClient, Path]:
    folder = tmp_path_factory.mktemp("attacked")
    return client(material(case, labels=folder)), folder


@settings(max_examples=60)
@given(value=JSON_VALUES | NEARLY)
def test_whatever_is_sent_as_labels_is_saved_or_refused_in_one_line(
    attacked: tuple[TestClient, Path], value: Any
) -> None:
    page, folder = attacked
    if isinstance(value, dict) and "state" not in value:
        value["state"] = page.get("/api/videos/0/labels").json()["state"]
    answer = page.put("/api/videos/0/labels", content=json.dumps(value).encode())
    assert answer.status_code in (200, 409, 422), answer.text
    if answer.status_code == 422:
        errors(answer)
    path = folder / "case.csv"
    if path.exists():
        read_csv(path.read_bytes(), path)
    assert {one.name for one in folder.iterdir()} <= {"case.csv", "history"}


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"[" * 100_000, b"1" * 10_000, b"null"])
def test_broken_bodies_are_refused(page: TestClient, body: bytes) -> None:
    assert "labels" in errors(page.put("/api/videos/0/labels", content=body))


def test_nothing_open_is_an_error() -> None:
    with pytest.raises(UserError, match="nothing to open"):
        material()
    assert client(Material([])).get("/api/videos/0").status_code == 422
