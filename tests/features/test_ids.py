"""Video ids: one form to compare, one function that makes file names of them."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.dataset_spec import NamedSplit
from configs.load import load_dataset
from configs.schema import CacheConfig, DataConfig, PreprocessConfig, SplitConfig
from features.dataset.build import build_index
from features.dataset.index import Index
from features.dataset.splits import assign_splits
from features.frames.cache import FrameCache
from features.ids import file_stem, id_key, id_of_stem, id_problem, normal_id
from features.store import feature_path
from tests.stage1_cnn.material import SPEC
from tests.videos import VideoSpec, write_video

ANY_ID = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=30)


@given(ANY_ID)
def test_an_id_makes_one_safe_file_name_and_comes_back_from_it(video_id: str) -> None:
    stem = file_stem(video_id)
    assert id_of_stem(stem) == normal_id(video_id)
    assert not set(stem) & set('/\\:*?"<>|\0')
    assert stem.isprintable()
    assert stem[0] not in ".- "
    assert stem[-1] not in ". "
    assert Path("folder", f"{stem}.h5").parent == Path("folder")
    assert file_stem(normal_id(video_id)) == stem


@given(ANY_ID, ANY_ID)
def test_two_ids_never_share_a_file_name(one: str, other: str) -> None:
    assert (file_stem(one) == file_stem(other)) == (normal_id(one) == normal_id(other))


@pytest.mark.parametrize(
    ("video_id", "stem"),
    [
        ("video01", "video01"),
        ("test_workflow_video_01", "test_workflow_video_01"),
        ("Op_4.final", "Op_4.final"),
        ("病例 一号", "病例 一号"),
        ("Fall 2 (größe)", "Fall 2 (größe)"),
        ("5 ' quote #1", "5 ' quote #1"),
        ("case#3 100%", "case#3 100%25"),
        ("a/b", "a%2Fb"),
        ("..", "%2E%2E"),
        ("-rf", "%2Drf"),
    ],
)
def test_plain_names_and_letters_of_any_script_stay_as_they_are(video_id: str, stem: str) -> None:
    assert file_stem(video_id) == stem


def test_ids_are_equal_in_any_unicode_form_and_case() -> None:
    composed, apart = "Größe É", unicodedata.normalize("NFD", "Größe É")
    assert composed != apart
    assert id_key(composed) == id_key(apart) == id_key("GRÖSSE é")
    assert file_stem(composed) == file_stem(apart)


@pytest.mark.parametrize(
    ("video_id", "problem"),
    [("", "empty"), ("a/b", "slash"), ("a\nb", "printed"), ("x" * 241, "240 bytes"), ("病" * 81, "240 bytes")],
)
def test_invalid_ids_are_described(video_id: str, problem: str) -> None:
    assert problem in (id_problem(video_id) or "")
    assert id_problem("病" * 80) is None


def test_videos_with_names_in_any_script_are_indexed_split_and_stored(tmp_path: Path) -> None:
    names = ["病例 一号", "Größe 2", "case#3 100%", "-5 ' $x$"]
    for name in names:
        write_video(tmp_path / f"{name}.mp4", VideoSpec(count=10))
    # the annotation's name in the form of another system is still that video's
    (tmp_path / f"{unicodedata.normalize('NFD', names[1])}.txt").write_text("Frame\tPhase\n" + "0\topen\n")
    patterns = SPEC.patterns.model_copy(update={"video": r"(?P<id>.+)\.mp4", "phase": r"(?P<id>.+)\.txt"})
    spec = SPEC.model_copy(update={"patterns": patterns, "annotation_fps": 25.0})
    asked = SplitConfig(train=(unicodedata.normalize("NFD", names[1]),), test=("病例*",))
    index = build_index(tmp_path, spec, DataConfig(split=asked))
    assert {entry.id for entry in index.videos} == set(names)
    assert [entry.id for entry in index.by_split("train")] == ["Größe 2"]
    assert [entry.id for entry in index.by_split("test")] == ["病例 一号"]
    assert index.entry(unicodedata.normalize("NFD", "Größe 2")).phase_file is not None
    assert Index.from_json(index.to_json()) == index
    cache = FrameCache(CacheConfig(), PreprocessConfig(), 1.0)
    for name in names:
        assert feature_path(tmp_path, name).name == cache.path(name).name == f"{file_stem(name)}.h5"


def test_a_published_split_names_videos_in_any_unicode_form() -> None:
    spec = load_dataset("m2cai16-workflow").model_copy(
        update={"splits": {"ours": NamedSplit(train=(unicodedata.normalize("NFD", "é*"),), test=("b",))}}
    )
    assert assign_splits(["é1", "b"], spec, SplitConfig(rule="ours")) == {"é1": "train", "b": "test"}
