"""Settings: presets, overrides, and errors that name the key."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import UserError
from configs.load import PRESETS, differences, load_config, load_dataset, to_yaml
from configs.schema import DataSetSpec

PRESET_NAMES = sorted(path.stem for path in PRESETS.glob("*.yaml"))
DATASET_NAMES = sorted(path.stem for path in (PRESETS / "datasets").glob("*.yaml"))


@pytest.mark.parametrize("name", PRESET_NAMES)
def test_every_preset_is_valid_and_survives_a_round_trip(name: str, tmp_path: Path) -> None:
    config = load_config(name)
    saved = tmp_path / "resolved.yaml"
    saved.write_text(to_yaml(config))
    assert load_config(saved) == config
    load_dataset(config.data.dataset)


@pytest.mark.parametrize("name", DATASET_NAMES)
def test_every_data_set_is_valid(name: str) -> None:
    assert load_dataset(name).name == name


def test_cholec80_has_the_published_settings() -> None:
    config = load_config()
    assert (config.preprocess.resize_px, config.preprocess.crop_px) == (250, 224)
    assert (config.cnn.backbone, config.cnn.optim.name, config.cnn.optim.lr) == ("resnet50", "sgd", 1e-3)
    assert config.cnn.backbone_lr_factor == 0.1
    assert config.data.split.rule is None
    assert load_dataset(config.data.dataset).default_split == "32/8/40"


def test_overrides_are_yaml_and_the_last_one_wins() -> None:
    config = load_config("mini", ["seed=3", "seed=4", "cnn.augment.flip=false", "data.split.train=[video01, video02]"])
    assert config.seed == 4
    assert config.cnn.augment.flip is False
    assert config.data.split.train == ("video01", "video02")


def test_another_head_drops_the_settings_of_the_first() -> None:
    config = load_config("mini", ["temporal.head.name=tcn", "temporal.head.maps=16"])
    assert config.temporal.head.model_dump() == {"name": "tcn", "stages": 2, "layers": 8, "maps": 16, "dropout": 0.5}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("temporal.head.hiden=3", "did you mean temporal.head.hidden"),
        ("temporal.hidden=3", "did you mean temporal.head.hidden"),
        ("tempral.epochs=3", "did you mean temporal?"),
        ("cnn.epochs=many", "cnn.epochs"),
        ("cnn.epochs=0", "cnn.epochs"),
        ("preprocess.crop_px=300", "larger than resize_px"),
        ("seed", "expected key=value"),
        ("=3", "expected key=value"),
        ("seed.a=3", "seed"),
        ("seed={", "not YAML"),
        ("temporal.head.name=transformer", "temporal.head"),
    ],
)
def test_wrong_overrides_are_one_line_that_names_the_key(override: str, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config("mini", [override])
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["a: [", "- 1", "\t\tx", "a: &a [*a]", "\x00", "x: !!python/object/apply:os.system [ls]"]
)
def test_broken_files_name_the_file(text: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"broken\.yaml"):
        load_config(path)


def test_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean cholec80"):
        load_config("cholec8")


def test_differences_name_keys_and_both_values() -> None:
    assert differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 3, "c": 2}, "d": 4}) == [
        "a.b: 1 there, 3 now",
        "d: absent there, 4 now",
    ]


TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=8), children, max_size=3),
    max_leaves=12,
)


@given(st.dictionaries(st.sampled_from(["seed", "data", "cnn", "temporal", "x", ""]), TREES, max_size=4))
@settings(deadline=None, max_examples=150)
def test_any_tree_is_a_config_or_a_user_error(tmp_path_factory: pytest.TempPathFactory, tree: dict) -> None:
    path = tmp_path_factory.mktemp("any") / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    with contextlib.suppress(UserError):  # anything else, a traceback for the user, fails the test
        load_config(path)


@pytest.mark.parametrize("name", ["=cmd|' /C calc'!A0", "@SUM(A1)", "+1", "-1", "\tx"])
@pytest.mark.parametrize("kind", ["phases", "tools"])
def test_a_class_that_a_spreadsheet_would_compute_is_refused(kind: str, name: str) -> None:
    """Prediction files have a column `phase_name`, and people open CSV files with spreadsheets."""
    tree = load_dataset("cholec80").model_dump() | {"phase_orders": {}}
    tree[kind] = (name, *tree[kind][1:])
    with pytest.raises(ValueError, match="a formula to a spreadsheet"):
        DataSetSpec(**tree)
