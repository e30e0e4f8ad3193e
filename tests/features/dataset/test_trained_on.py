"""Operations that occur in several data sets: the list of them, and the refusal to test on what was trained on."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path

import pytest

from configs.dataset_spec import DataSetSpec
from configs.errors import UserError
from configs.load import load_dataset
from features.dataset.index import Index, VideoEntry
from features.dataset.trained_on import (
    TrainedOn,
    inherited_from,
    is_own_index,
    record_training,
    require_separate_split,
    trained_on,
)


def index_of(dataset: str, **splits: list[str]) -> Index:
    """An index of a data set, described like Cholec80, with the ids of each split."""
    spec = DataSetSpec(**{**load_dataset("cholec80").model_dump(), "name": dataset})
    entries = [
        VideoEntry(
            id=name,
            kind="video",
            source=f"{name}.mp4",
            size_bytes=1,
            modified_ns=0,
            sha256_ends=sha256(f"{dataset} {name}".encode()).hexdigest(),
            fps=25,
            frame_count=10,
            split=split,
        )
        for split, ids in splits.items()
        for name in ids
    ]
    return Index(dataset=spec, videos=tuple(entries))


CHOLEC80 = index_of("cholec80", train=["video01", "video02", "video03"], val=["video04"], test=["video05"])
CHOLECT50 = index_of("cholect50", train=["VID05", "VID92"], test=["VID02", "VID04", "VID103"], val=["VID110"])


def trained(tmp_path: Path, index: Index = CHOLEC80) -> Path:
    (tmp_path / "trained").mkdir(exist_ok=True)
    record_training(tmp_path / "trained", (), index)
    return tmp_path / "trained"


def test_testing_on_the_other_copy_is_refused_and_can_be_allowed(tmp_path: Path, capsys) -> None:
    folder = trained(tmp_path)
    with pytest.raises(UserError) as error:
        require_separate_split(folder, CHOLECT50, "test", False, own=False)
    assert str(error.value) == (
        f"{folder}: trained on video02 of cholec80, which is the same operation as VID02 of cholect50 (and 1 more "
        "operation); test on other videos (data.split, data.exclude), or set data.allow_overlap=true to accept results "
        "that are too good"
    )
    require_separate_split(folder, CHOLECT50, "test", True, own=False)
    assert "so results on cholect50 are too good" in capsys.readouterr().err
    require_separate_split(folder, CHOLECT50, "train", False, own=False)  # video05 was neither trained on nor validated
    require_separate_split(folder, CHOLECT50, "val", False, own=False)
    assert capsys.readouterr().err == ""


def test_the_other_direction_and_validation_videos_count_too(tmp_path: Path) -> None:
    folder = trained(tmp_path, CHOLECT50)
    with pytest.raises(UserError, match="trained on VID05 of cholect50, which is the same operation as video05"):
        require_separate_split(folder, CHOLEC80, "test", False, own=False)
    folder = trained(tmp_path, index_of("phakir", train=["Video_01"], val=["Video_07"]))
    with pytest.raises(UserError, match=r"trained on Video_07 of phakir, .* Hei-Chole2 of heichole;"):
        require_separate_split(folder, index_of("heichole", test=["Hei-Chole2", "Hei-Chole7"]), "all", False, own=False)


def test_possible_overlaps_are_noted_and_never_refused(tmp_path: Path, capsys) -> None:
    folder = trained(tmp_path)
    require_separate_split(folder, index_of("m2cai16-workflow", test=["workflow_video_01"]), "test", False, own=False)
    assert "operations of m2cai16-workflow may be among its videos: Cholec80 extends" in capsys.readouterr().err
    require_separate_split(folder, index_of("heichole", test=["Hei-Chole2"]), "test", False, own=False)
    assert capsys.readouterr().err == ""


def test_equal_recordings_are_found_in_unknown_data_sets_and_in_other_splits(tmp_path: Path) -> None:
    folder = trained(tmp_path)
    copies = {"id": "case7", "split": "test", "sha256_ends": CHOLEC80.videos[1].sha256_ends}
    own = index_of("ours", test=["case7"])
    own = own.model_copy(update={"videos": (own.videos[0].model_copy(update=copies),)})
    with pytest.raises(UserError, match=r"trained on video02 of cholec80, .* case7 of ours"):
        require_separate_split(folder, own, "test", False, own=False)
    again = index_of("cholec80", train=["video05"], test=["video01"])
    with pytest.raises(UserError, match="trained on video01 of cholec80; test on other videos"):
        require_separate_split(folder, again, "test", False, own=False)


def test_within_one_data_set_an_equal_id_or_an_equal_recording_is_enough(tmp_path: Path) -> None:
    """A re-encoded copy or the frames of a video have other bytes, and a renamed copy has another id."""
    folder = trained(tmp_path)
    index = index_of("cholec80", test=["Video01", "video70"])
    copies = [{"sha256_ends": "1" * 64}, {"sha256_ends": CHOLEC80.videos[1].sha256_ends}]
    for at, same in enumerate(("video01 of cholec80, which is the same operation as Video01 of",
                               "video02 of cholec80, which is the same operation as video70 of")):  # fmt: skip
        one = index.model_copy(update={"videos": (index.videos[at].model_copy(update=copies[at]),)})
        with pytest.raises(UserError, match=same):
            require_separate_split(folder, one, "test", False, own=False)
        with pytest.raises(UserError, match=same):
            inherited_from([folder], one, False)


def test_a_run_may_evaluate_its_own_training_videos(tmp_path: Path) -> None:
    for split in ("train", "all", "test"):
        require_separate_split(trained(tmp_path), CHOLEC80, split, False, own=True)


def test_an_index_is_the_run_s_own_if_the_training_used_its_videos_and_no_others(tmp_path: Path) -> None:
    folder, first = trained(tmp_path), CHOLEC80.videos[0]
    changed = CHOLEC80.videos[0].model_copy(update={"sha256_ends": "1" * 64})
    assert is_own_index(folder, CHOLEC80)
    assert is_own_index(folder, CHOLEC80.without([(first.id, "cannot be read")]))
    for other in (
        index_of("cholec80", train=["video01", "video02"], test=["video03"], val=["video04"]),
        index_of("cholec80", train=["video01", "video02", "video03", "video05"], val=["video04"]),
        index_of("cholec80", test=["video01", "video02"]),
        CHOLEC80.model_copy(update={"videos": (changed, *CHOLEC80.videos[1:])}),
        CHOLECT50,
    ):
        assert not is_own_index(folder, other)
    assert is_own_index(tmp_path, CHOLECT50)  # nothing is known about the training


def test_a_note_says_if_the_training_videos_are_unknown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    require_separate_split(tmp_path, CHOLEC80, "test", False, own=True)
    assert capsys.readouterr().err == ""
    require_separate_split(tmp_path, CHOLEC80, "test", False, own=False)
    assert "does not record its training videos, so videos of cholec80 may be among them" in capsys.readouterr().err


def test_the_record_includes_the_trainings_that_it_started_from(tmp_path: Path, capsys) -> None:
    first = trained(tmp_path)
    second = tmp_path / "second"
    second.mkdir()
    own = index_of("cholect50", train=["VID92"], test=["VID103"])
    inherited = inherited_from([first, first, tmp_path / "unknown"], own, allow=False)
    record_training(second, inherited, own)
    assert [(one.dataset, len(one.videos)) for one in trained_on(second)] == [("cholect50", 1), ("cholec80", 4)]
    with pytest.raises(UserError, match="video01 of cholec80, which is the same operation as VID01"):
        require_separate_split(second, index_of("cholect45", test=["VID01"]), "test", False, own=False)
    with pytest.raises(UserError, match="trained on video02 of cholec80"):
        inherited_from([first], CHOLECT50, allow=False)
    assert len(inherited_from([first], CHOLECT50, allow=True)) == 1


def test_a_run_of_an_earlier_version_is_known_by_its_identity(tmp_path: Path) -> None:
    identity = {"dataset": "cholec80", "split": {"train": ["video01"], "val": ["video02"]}}
    (tmp_path / "identity.json").write_text(json.dumps(identity))
    assert trained_on(tmp_path) == [TrainedOn("cholec80", {"video01": "", "video02": ""})]
    (tmp_path / "trained_on.json").write_text('{"data": 3}')
    with pytest.raises(UserError, match=r"trained_on\.json: damaged"):
        trained_on(tmp_path)
