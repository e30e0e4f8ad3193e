"""The data sets described in `configs/datasets`: files of the form of each give the labels that were written."""

from __future__ import annotations

import pickle
import re
import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from configs.dataset_spec import DataSetSpec
from configs.errors import UserError
from configs.load import dataset_names, load_config, load_dataset
from configs.schema import DataConfig, SplitConfig
from features.dataset.build import build_index
from features.dataset.catalogue import index_dataset, open_dataset
from features.dataset.index import Dataset, Index
from features.dataset.labels import sampled_labels
from features.dataset.splits import PARTS, assign_splits
from features.ids import numbered_id
from tests.cli import run
from tests.shipped_sets import WRITERS, make, text, video

NAMES = dataset_names()


@pytest.mark.parametrize("name", NAMES)
def test_every_frame_has_the_label_that_was_written(name: str, tmp_path: Path) -> None:
    truth, spec = make(name, tmp_path), load_dataset(name)
    index = build_index(tmp_path, spec, DataConfig(unverified=bool(spec.unverified)))
    assert not index.is_partial
    assert {entry.id for entry in index.videos} == set(truth)
    for entry in index.videos:
        every = DataConfig(fps=entry.most_fps, tools_between_rows="hold")
        found = sampled_labels(Dataset(index, tmp_path), entry, every)
        labels = {"phase": found.phase, "tool": found.tools, **found.tracks}
        assert truth[entry.id].keys() == set(spec.roles)
        for role, expected in truth[entry.id].items():
            np.testing.assert_array_equal(labels[role], expected, err_msg=f"{entry.id} {role}")


def test_every_description_is_tried() -> None:
    assert sorted(WRITERS) == NAMES
    assert all(load_dataset(name).name == name for name in NAMES)


# ---------------------------------------------------------------------------------------------- published splits


def numbered(name: str, numbers: Iterable[int]) -> list[str]:
    return [numbered_id(number, load_dataset(name)) for number in numbers]


CHOLEC80_PART = (
    *(1, 2, 4, 5, 6, 8, 10, 12, 13, 14, 15, 18, 22, 23, 25, 26, 27, 29, 31, 32, 35, 36, 40, 42, 43, 47, 48, 49, 50, 51),
    *(52, 56, 57, 60, 62, 65, 66, 68, 70, 73, 74, 75, 78, 79, 80),
)
IDS = {
    "autolaparo": numbered("autolaparo", range(1, 22)),
    "cataract-101": numbered("cataract-101", range(269, 269 + 9 * 101, 9)),
    "cataracts": [f"{part}{number:02d}" for part in ("test", "train") for number in range(1, 26)],
    "cholect45": numbered("cholect45", CHOLEC80_PART),
    "cholect50": numbered("cholect50", (*CHOLEC80_PART, 92, 96, 103, 110, 111)),
    "jigsaws": [
        f"{task}_{user}{trial:03d}"
        for task in ("Knot_Tying", "Needle_Passing", "Suturing")
        for user in "BCDEFGHI"
        for trial in range(1, 6)
    ],
    "m2cai16-workflow": [
        *(f"test_workflow_video_{number:02d}" for number in range(1, 15)),
        *(f"workflow_video_{number:02d}" for number in range(1, 28)),
    ],
    "pitvis": numbered("pitvis", range(1, 26)),
    "psi-ava": numbered("psi-ava", (1, 2, 3, 4, 7, 14, 15, 21)),
    "sar-rarp50": numbered("sar-rarp50", range(1, 51)),
}
SIZES = {
    "autolaparo": {"official": (10, 4, 7)},
    "cataract-101": {"51/10/40": (51, 10, 40)},
    "cataracts": {"challenge2020": (25, 5, 20)},
    "cholect45": {f"crossval-{fold}": (31, 5, 9) for fold in range(1, 6)},
    "cholect50": {"rendezvous": (35, 5, 10), "challenge": (40, 5, 5)}
    | {f"crossval-{fold}": (35, 5, 10) for fold in range(1, 6)},
    "jigsaws": {
        f"{task}-{kind}": (40 - test, 0, test)
        for task in ("suturing", "knot-tying", "needle-passing")
        for kind, test in [*((f"louo-{user}", 5) for user in "BCDEFGHI"), *((f"loso-{k}", 8) for k in range(1, 6))]
    },
    "m2cai16-workflow": {"official": (27, 0, 14)},
    "pitvis": {"suggested": (20, 5, 0)},
    "psi-ava": {"fold1": (4, 4, 0), "fold2": (4, 4, 0)},
    "sar-rarp50": {"official": (39, 0, 10)},
}


@pytest.mark.parametrize(("name", "rule"), [(name, rule) for name, rules in SIZES.items() for rule in rules])
def test_published_splits_have_their_published_sizes(name: str, rule: str) -> None:
    splits = assign_splits(IDS[name], load_dataset(name), SplitConfig(rule=rule))
    counts = Counter(splits.values())
    assert tuple(counts[part] for part in PARTS) == SIZES[name][rule]


def test_every_published_split_is_counted() -> None:
    assert {name: set(rules) for name, rules in SIZES.items() if name != "cataract-101"} == {
        name: set(spec.splits) for name in NAMES if (spec := load_dataset(name)).splits and not needs_copy(spec)
    }


def needs_copy(spec: DataSetSpec) -> bool:
    return any(split.needs_copy for split in spec.splits.values())


def test_splits_name_the_published_videos() -> None:
    autolaparo = assign_splits(IDS["autolaparo"], load_dataset("autolaparo"), SplitConfig())
    assert [one for one, part in autolaparo.items() if part == "val"] == ["11", "12", "13", "14"]
    cataract = assign_splits(IDS["cataract-101"], load_dataset("cataract-101"), SplitConfig())
    assert [*cataract.values()] == ["train"] * 51 + ["val"] * 10 + ["test"] * 40
    for name in ("cholect45", "cholect50"):  # the test sets of a cross-validation are a partition
        spec = load_dataset(name)
        folds = [spec.splits[f"crossval-{fold}"].test for fold in range(1, 6)]
        assert sorted(one for fold in folds for one in fold) == sorted(IDS[name])
    sar = assign_splits(IDS["sar-rarp50"], load_dataset("sar-rarp50"), SplitConfig())
    assert [one for one, part in sar.items() if part == "none"] == ["video_14"]


@pytest.mark.parametrize(("name", "sizes"), [("autolaparo", (10, 4, 7)), ("cataract-101", (51, 10, 40))])
def test_a_copy_of_full_size_is_split_as_published(name: str, sizes: tuple[int, int, int], tmp_path: Path) -> None:
    lines = ["VideoID;FrameNo;Phase"]
    for video_id in IDS[name]:
        video(tmp_path / f"videos/{video_id}.mp4", fps=2)
        rows = [f"{second}\t{1 + second // 3}" for second in range(1, 6)]
        if name == "autolaparo":
            text(tmp_path / f"labels/label_{video_id}.txt", ["Frame\tPhase", *rows])
        lines.append(f"{video_id.removeprefix('case_')};0;3")
    if name == "cataract-101":
        text(tmp_path / "annotations.csv", lines)
    index = build_index(tmp_path, load_dataset(name), DataConfig())
    assert [entry.id for entry in index.videos] == IDS[name]
    assert all(entry.phase_file for entry in index.videos)
    assert tuple(len(index.by_split(part)) for part in PARTS) == sizes


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("strasbypass70", {"SBP01": "train", "SBP09": "val", "SBP70": "test"}),
        (
            "multibypass140",
            {"SBP01": "train", "SBP09": "val", "SBP70": "test", "BBP01": "train", "BBP03": "val", "BBP70": "test"},
        ),
        ("petraw", {"001": "train", "002": "train", "091": "test"}),
        ("grasp", {"CASE001": "train", "CASE002": "train", "CASE041": "test"}),
    ],
)
def test_splits_are_read_from_the_copy(name: str, parts: dict[str, str], tmp_path: Path) -> None:
    make(name, tmp_path / "data")
    config = load_config("mini", [f"data.root={tmp_path / 'data'}", f"data.index={tmp_path / 'index.json'}"])
    config = config.model_copy(
        update={"data": config.data.model_copy(update={"dataset": name, "split": SplitConfig()})}
    )
    index = index_dataset(config)
    assert {entry.id: entry.split for entry in index.videos} == parts
    assert open_dataset(config).index == index  # the lists are recorded, not read again
    chosen = config.data.model_copy(update={"split": SplitConfig(rule="fold3")})
    if "fold3" in load_dataset(name).splits:
        with pytest.raises(UserError, match="made without the lists of split fold3"):
            open_dataset(config.model_copy(update={"data": chosen}))
        with pytest.raises(UserError, match=r"split fold3 of \w+: no file matches .*1fps_100_3"):
            build_index(tmp_path / "data", load_dataset(name), chosen)


def test_without_its_lists_the_usual_split_is_not_assigned(tmp_path: Path) -> None:
    make("bernbypass70", tmp_path)
    (tmp_path / "labels/bern/labels_by70_splits/labels/test/1fps_0.pickle").unlink()
    index = build_index(tmp_path, load_dataset("bernbypass70"), DataConfig())
    assert {entry.split for entry in index.videos} == {"none"}
    assert any("split 'fold0' of bernbypass70 is listed in files that are missing" in note for note in index.notes)


def test_the_list_of_every_hospital_is_needed_whose_videos_are_there(tmp_path: Path) -> None:
    make("multibypass140", tmp_path)
    spec, lists = load_dataset("multibypass140"), tmp_path / "labels/strasbourg/labels_by70_splits/labels"
    assert not [note for note in build_index(tmp_path, spec, DataConfig()).notes if note.startswith("split ")]
    for path in lists.glob("*/*.pickle"):
        path.unlink()
    index = build_index(tmp_path, spec, DataConfig())
    assert {entry.id[0]: entry.split != "none" for entry in index.videos} == {"B": True, "S": False}
    problem = (
        r"split fold0 of multibypass140: no file matches strasbourg/labels_by70_splits/labels/train/1fps_100_0.*, so "
    )
    problem += r"3 video\(s\) are in no list \(SBP01, SBP09, SBP70\)"
    (note,) = (note for note in index.notes if note.startswith("split "))
    assert re.fullmatch(f"{problem} and get split none", note)
    with pytest.raises(UserError, match=problem):
        build_index(tmp_path, spec, DataConfig(split=SplitConfig(rule="fold0")))
    shutil.rmtree(tmp_path / "StrasBypass70")  # a copy of one hospital needs no lists of the other
    shutil.rmtree(tmp_path / "labels/strasbourg")
    index = build_index(tmp_path, spec, DataConfig(split=SplitConfig(rule="fold0")))
    assert not [note for note in index.notes if note.startswith("split ")]


def test_a_pickle_that_is_no_list_of_videos_is_refused(tmp_path: Path) -> None:
    make("bernbypass70", tmp_path)
    path = tmp_path / "labels/bern/labels_by70_splits/labels/val/1fps_0.pickle"
    for content, message in (
        (pickle.dumps([1, 2]), "is not a mapping with the ids of videos as keys"),
        (b"cos\nsystem\n(S'true'\ntR.", "nothing in it was run"),
        (b"", "an empty file"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=message) as raised:
            build_index(tmp_path, load_dataset("bernbypass70"), DataConfig())
        assert str(path) in str(raised.value)


# ---------------------------------------------------------------------------------------------- unverified


def test_an_unverified_description_is_refused_unless_that_is_accepted(tmp_path: Path) -> None:
    make("phakir", tmp_path / "data")
    words = ["index", "--config", "mini", "--root", "data", "--out", "i.json", "--set", "data.dataset=phakir"]
    words += ["--set", "data.split.rule=50%/50%"]
    refused = run(words, tmp_path)
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert "data set phakir: its description is unverified: the columns of Video_NN_Phases.csv" in refused.stderr
    assert not (tmp_path / "i.json").exists()
    for more in (["--unverified"], ["--set", "data.unverified=true", "--force"]):
        done = run([*words, *more], tmp_path)
        assert done.returncode == 0, done.stderr
        assert "the description of phakir is unverified" in done.stdout + done.stderr
        index = Index.load(tmp_path / "i.json")
        assert index.dataset.unverified == load_dataset("phakir").unverified
