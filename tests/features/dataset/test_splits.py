"""Splits: every rule gives each video one split, and the message about a rule that does not fit names one that does."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.dataset_spec import DataSetSpec
from configs.errors import UserError
from configs.load import load_dataset
from configs.schema import SplitConfig
from features.dataset.splits import assign_splits, usual_split_problem

CHOLEC80 = load_dataset("cholec80")
M2CAI = load_dataset("m2cai16-workflow")


def ids(count: int) -> list[str]:
    return [f"video{number:02d}" for number in range(1, count + 1)]


def by_rule(count: int, rule: str | None, spec: DataSetSpec = CHOLEC80, **more: object) -> dict[str, str]:
    return assign_splits(ids(count), spec, SplitConfig(rule=rule, **more))


def members(splits: dict[str, str], part: str) -> list[str]:
    return [video_id for video_id, split in splits.items() if split == part]


# ---------------------------------------------------------------------------------------------- counts and shares


def test_the_three_splits_in_use_are_counts_in_the_order_of_numbers() -> None:
    for rule, counts in (("32/8/40", (32, 8, 40)), ("40/40", (40, 0, 40)), ("40/8/32", (40, 8, 32))):
        splits = by_rule(80, rule)
        assert list(splits) == ids(80)
        assert tuple(len(members(splits, part)) for part in ("train", "val", "test")) == counts
        assert members(splits, "train") + members(splits, "val") + members(splits, "test") == ids(80)


def test_the_usual_split_needs_no_setting() -> None:
    assert by_rule(80, None) == by_rule(80, "32/8/40")
    assert usual_split_problem(ids(80), CHOLEC80, SplitConfig()) is None


def test_without_a_fitting_usual_split_none_is_assigned_with_a_reason() -> None:
    assert by_rule(5, None) == dict.fromkeys(ids(5), "none")
    problem = usual_split_problem(ids(5), CHOLEC80, SplitConfig())
    assert problem is not None
    assert "32/8/40 needs 80 videos, but there are 5" in problem
    assert usual_split_problem(ids(5), CHOLEC80, SplitConfig(rule="3/1/1")) is None


def test_counts_that_do_not_sum_to_the_videos_are_refused_with_numbers() -> None:
    with pytest.raises(UserError) as caught:
        by_rule(7, "32/8/40")
    assert str(caught.value) == (
        "data.split.rule: 32/8/40 needs 80 videos, but there are 7 (video01 to video07); choose counts that sum to 7, "
        "percentages such as 60%/20%/20%, or lists"
    )


@pytest.mark.parametrize(
    ("count", "rule", "counts"),
    [
        (5, "60%/20%/20%", (3, 1, 1)),
        (10, "60%/20%/20%", (6, 2, 2)),
        (3, "60%/20%/20%", (1, 1, 1)),
        (4, "80%/10%/10%", (2, 1, 1)),
        (80, "50%/50%", (40, 0, 40)),
        (7, "33.3%/33.3%/33.4%", (2, 2, 3)),
        (4, "100%/0%/0%", (4, 0, 0)),
    ],
)
def test_percentages_are_rounded_by_largest_remainder_and_leave_no_part_empty(
    count: int, rule: str, counts: tuple[int, int, int]
) -> None:
    splits = by_rule(count, rule)
    assert tuple(len(members(splits, part)) for part in ("train", "val", "test")) == counts
    assert members(splits, "train") + members(splits, "val") + members(splits, "test") == ids(count)


@settings(deadline=None, max_examples=200)
@given(count=st.integers(3, 200), train=st.integers(1, 98), val=st.integers(1, 98))
def test_percentages_give_every_video_one_split_within_one_of_exact(count: int, train: int, val: int) -> None:
    if train + val >= 100:
        train, val = 100 - train, 100 - val
        if train + val >= 100:
            return
    shares = (train, val, 100 - train - val)
    splits = by_rule(count, "/".join(f"{share}%" for share in shares))
    sizes = [len(members(splits, part)) for part in ("train", "val", "test")]
    assert sum(sizes) == count
    assert min(sizes) >= 1
    if all(share * count >= 100 for share in shares):
        assert all(abs(size - share * count / 100) < 1 for size, share in zip(sizes, shares, strict=True))


@pytest.mark.parametrize(
    ("count", "rule", "problem"),
    [
        (5, "60%/20%/30%", "the percentages of 60%/20%/30% sum to 110 %"),
        (2, "60%/20%/20%", "needs at least 3 videos, but there are 2 (video01, video02)"),
        (5, "60/20/20", "60/20/20 needs 100 videos, but there are 5"),
        (5, "half", "data.split.rule: 'half' is none of: A/B/C"),
        (5, "3-1-1", "'3-1-1' is none of"),
        (5, "60%/20/20", "is none of"),
        (5, "1/1/1/2", "is none of"),
    ],
)
def test_rules_that_make_no_sense_are_refused(count: int, rule: str, problem: str) -> None:
    with pytest.raises(UserError) as caught:
        by_rule(count, rule)
    assert problem in str(caught.value)


# ---------------------------------------------------------------------------------------------- lists


def test_lists_take_ids_and_patterns_and_leave_the_rest_out() -> None:
    splits = by_rule(12, "lists", train=("video0[1-4]",), val=("video05",), test=("video1*",))
    assert members(splits, "train") == ids(4)
    assert members(splits, "val") == ["video05"]
    assert members(splits, "test") == ["video10", "video11", "video12"]
    assert members(splits, "none") == ["video06", "video07", "video08", "video09"]
    assert by_rule(12, None, train=("video0[1-4]",), val=("video05",), test=("video1*",)) == splits


@pytest.mark.parametrize(
    ("lists", "problem"),
    [
        ({"train": ("video1",)}, "data.split.train: there is no video 'video1'; did you mean video01?"),
        ({"train": ("video01",), "test": ("case*",)}, "data.split.test: there is no video 'case*'"),
        ({"train": ("video01", "video01")}, "data.split: video01 is twice in train"),
        ({"train": ("video01",), "val": ("video01",)}, "data.split: video01 is in train and val"),
        ({"train": ("video0*",), "test": ("video05",)}, "data.split: video05 is in train and test"),
        ({}, "data.split: no video is listed"),
    ],
)
def test_lists_with_unknown_or_repeated_videos_are_refused(lists: dict[str, tuple[str, ...]], problem: str) -> None:
    with pytest.raises(UserError) as caught:
        by_rule(6, "lists", **lists)
    assert problem in str(caught.value)


def test_lists_together_with_another_rule_are_refused() -> None:
    with pytest.raises(UserError, match=r"lists of videos are given, but data.split.rule is 3/1/1"):
        by_rule(5, "3/1/1", train=("video01",))


def test_a_published_split_is_selected_by_name_and_skips_missing_videos() -> None:
    names = [f"test_workflow_video_{n:02d}" for n in range(1, 15)] + [f"workflow_video_{n:02d}" for n in range(1, 28)]
    splits = assign_splits(names, M2CAI, SplitConfig())
    assert members(splits, "test") == names[:14]
    assert members(splits, "train") == names[14:]
    assert assign_splits(names, M2CAI, SplitConfig(rule="official")) == splits
    assert assign_splits(["workflow_video_03"], M2CAI, SplitConfig()) == {"workflow_video_03": "train"}
    with pytest.raises(UserError, match=r"split 'official' of m2cai16-workflow: no video is listed"):
        assign_splits(["video01"], M2CAI, SplitConfig(rule="official"))


# ---------------------------------------------------------------------------------------------- folds


@settings(deadline=None, max_examples=200)
@given(
    count=st.integers(4, 90),
    folds=st.integers(2, 10),
    val_videos=st.integers(0, 3),
    seed=st.none() | st.integers(0, 5),
)
def test_each_video_is_tested_in_exactly_one_fold(count: int, folds: int, val_videos: int, seed: int | None) -> None:
    folds = min(folds, count)
    tested: Counter[str] = Counter()
    sizes = []
    for fold in range(folds):
        config = SplitConfig(rule="kfold", folds=folds, fold=fold, val_videos=val_videos, seed=seed)
        if val_videos >= count - (count * (fold + 1) // folds - count * fold // folds):
            with pytest.raises(UserError, match="left for training"):
                assign_splits(ids(count), CHOLEC80, config)
            return
        splits = assign_splits(ids(count), CHOLEC80, config)
        assert splits == assign_splits(ids(count), CHOLEC80, config)
        assert list(splits) == ids(count)
        tested.update(members(splits, "test"))
        sizes.append(len(members(splits, "test")))
        assert len(members(splits, "val")) == val_videos
        assert len(members(splits, "train")) == count - sizes[-1] - val_videos
    assert tested == Counter(ids(count))
    assert max(sizes) - min(sizes) <= 1


def test_folds_are_blocks_in_order_and_the_videos_after_a_block_validate() -> None:
    splits = by_rule(6, "kfold", folds=3, fold=2, val_videos=1)
    assert splits == {
        "video01": "val",
        "video02": "train",
        "video03": "train",
        "video04": "train",
        "video05": "test",
        "video06": "test",
    }


def test_a_seed_shuffles_videos_between_folds() -> None:
    assert len({str(by_rule(20, "kfold", seed=seed)) for seed in (None, 0, 1, 2)}) == 4


def test_leave_one_out_tests_one_video() -> None:
    splits = by_rule(5, "leave_one_out", fold=4, val_videos=2)
    assert members(splits, "test") == ["video05"]
    assert members(splits, "val") == ["video01", "video02"]
    assert members(splits, "train") == ["video03", "video04"]


@pytest.mark.parametrize(
    ("count", "settings_", "problem"),
    [
        (4, {"rule": "kfold", "folds": 5}, "data.split.folds: 5 folds need 5 videos, but there are 4"),
        (6, {"rule": "kfold", "folds": 3, "fold": 3}, "data.split.fold: 3 is not one of the 3 folds 0 to 2"),
        (4, {"rule": "leave_one_out", "fold": 4}, "data.split.fold: 4 is not one of the 4 folds"),
        (
            4,
            {"rule": "leave_one_out", "val_videos": 3},
            "data.split.val_videos: with 3 for validation, no video is left for training of the 3 outside",
        ),
        (
            1,
            {"rule": "leave_one_out", "val_videos": 0},
            "data.split.val_videos: with 0 for validation, no video is left for training of the 0",
        ),
    ],
)
def test_folds_that_cannot_be_are_refused(count: int, settings_: dict, problem: str) -> None:
    with pytest.raises(UserError) as caught:
        assign_splits(ids(count), CHOLEC80, SplitConfig(**settings_))
    assert problem in str(caught.value)
