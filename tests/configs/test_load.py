"""Settings: presets, overrides, and errors that name the key."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.dataset_spec import DataSetSpec
from configs.errors import UserError
from configs.head_settings import GruHead
from configs.load import PRESETS, differences, load_ablation, load_config, load_dataset, to_yaml
from configs.schema import Config, JointStepConfig

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


def test_overrides_are_yaml() -> None:
    config = load_config("mini", ["seed=3", "cnn.augment.flip=false", "data.split.train=[video01, on]"])
    assert config.seed == 3
    assert config.cnn.augment.flip is False
    assert config.data.split.train == ("video01", "on")


@pytest.mark.parametrize("text", ["/data/set #2", "2024", "on", "~", "a: b", "[x]", "1e3", "None", "don't", "@x", " x"])
def test_paths_and_names_are_literal(text: str) -> None:
    config = load_config("mini", [f"data.root={text}", f"cnn.weights={text}", f"data.split.rule={text}"])
    assert config.data.root == Path(text)
    assert config.cnn.weights == config.data.split.rule == text
    assert load_config("mini", changes={"data.root": Path(text)}).data.root == Path(text)


def test_null_and_quotes_in_paths_are_yaml() -> None:
    assert load_config("demo", ["data.root=null"]).data.root is None
    assert load_config("demo", ["data.root="]).data.root is None
    assert load_config("demo", ["data.root='null'"]).data.root == Path("null")
    assert load_config("demo", ['data.root="a #b"']).data.root == Path("a #b")


def test_a_mapping_with_free_keys_is_one_value(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("data: {exclude: {video01: torn}}\n")
    assert load_config(file, ["data.exclude={}"]).data.exclude == {}
    assert load_config(file, ["data.exclude={02: no}"]).data.exclude == {"02": "no"}
    assert load_config(file, ["data.exclude=[03]"]).data.exclude == {"03": ""}


def test_words_of_a_choice_are_strings() -> None:
    assert load_config("mini", ["extract.decode_ahead=on"]).extract.decode_ahead == "on"
    assert load_config("mini", ["data.frame_base=1"]).data.frame_base == 1


@pytest.mark.parametrize("orders", [(0, 1), (1, 0)])
def test_another_head_drops_the_settings_of_the_preset_in_any_order(orders: tuple[int, int]) -> None:
    given = ["temporal.head.name=tcn", "temporal.head.maps=16"]
    config = load_config("mini", [given[place] for place in orders])
    assert config.temporal.head.model_dump() == {"name": "tcn", "stages": 2, "layers": 8, "maps": 16, "dropout": 0.5}
    given = ["temporal.head.name=gru", "temporal.head.hidden=32"]
    assert load_config("mini", [given[place] for place in orders]).temporal.head == GruHead(name="gru", hidden=32)
    given = ["temporal.head={name: gru}", "temporal.head.hidden=32"]
    assert load_config("mini", [given[place] for place in orders]).temporal.head == GruHead(name="gru", hidden=32)


def test_a_value_in_a_file_does_not_change_others_of_its_block(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text(
        "joint: {sequence: {batch: 4}, multitask: {optim: {lr: 0.01}}, net: {mapping: true}, mapping: {epochs: 3}}\n"
        "temporal: {head: {hidden: 32}}\n"
    )
    changed = differences(Config().model_dump(), load_config(file).model_dump())
    assert [line for line in changed if "joint.mapping" not in line] == [
        "temporal.head.hidden: 512 there, 32 now",
        "joint.net.mapping: False there, True now",
        "joint.sequence.batch: 10 there, 4 now",
        "joint.multitask.optim.lr: 0.001 there, 0.01 now",
    ]
    assert load_config(file).joint.mapping == JointStepConfig(epochs=3)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("temporal.head.hiden=3", "did you mean temporal.head.hidden"),
        ("temporal.hidden=3", "did you mean temporal.head.hidden"),
        ("tempral.epochs=3", "did you mean temporal?"),
        ("cnn.epochs=many", "cnn.epochs"),
        ("cnn.epochs=0", "cnn.epochs"),
        ("cnn.epochs=yes", "cnn.epochs: expected a number, got true"),
        ("preprocess.crop_px=300", "larger than resize_px"),
        ("seed", "expected key=value"),
        ("=3", "expected key=value"),
        ("seed.a=3", "seed"),
        ("seed={", "not YAML"),
        ("temporal.head.name=transformer", "temporal.head"),
        ("temporal.head.maps=3", "unknown key temporal.head.maps: lstm has hidden, layers"),
        ("temporal.head.hidden=0", "temporal.head.hidden: Input"),
        ("cnn.optim={name: sgd, nesterov: true, momentum: 0}", "cnn.optim: nesterov=true needs momentum above 0"),
        ("device=gpu", "device: Input should be 'auto', 'cpu', 'cuda' or 'mps'"),
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


def test_a_key_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    """The second block would silently replace the first one."""
    path = tmp_path / "own.yaml"
    path.write_text("temporal: {epochs: 5}\nseed: 1\ntemporal: {head: {name: gru}}\n")
    with pytest.raises(UserError, match=r"own\.yaml: .*temporal is given twice, in lines 1 and 3"):
        load_config(path)
    with pytest.raises(UserError, match="lr is given twice"):
        load_config("mini", ["temporal.optim={lr: 0.1, lr: 0.2}"])


@pytest.mark.parametrize("number", ["012", "-0_17", "1:30", "1:30.5"])
def test_numbers_that_yaml_reads_in_another_base_are_refused(number: str, tmp_path: Path) -> None:
    """YAML 1.1 reads 012 as 10 and 1:30 as 90."""
    path = tmp_path / "own.yaml"
    path.write_text(f"temporal: {{epochs: {number}}}\n")
    with pytest.raises(UserError, match=rf"own\.yaml: .*YAML reads {number} as a number in base 8 or 60; .* base 10"):
        load_config(path)
    with pytest.raises(UserError, match=rf"--set temporal\.epochs={number}: .*base 8 or 60"):
        load_config("mini", [f"temporal.epochs={number}"])


@pytest.mark.parametrize(("text", "value"), [("1e-4", 1e-4), ("1.5e-3", 1.5e-3), (".5", 0.5), ("0", 0), ("0.05", 0.05)])
def test_numbers_are_read_as_everywhere_else(text: str, value: float) -> None:
    """`1e-4` is a string to YAML 1.1."""
    assert load_config("mini", [f"temporal.optim.weight_decay={text}"]).temporal.optim.weight_decay == value
    assert load_config("mini", ["temporal.epochs=08", "seed=007"]).temporal.epochs == 8
    assert load_config("mini", ["data.exclude={'012': blurred}"]).data.exclude == {"012": "blurred"}


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
def test_class_names_that_are_spreadsheet_formulas_are_refused(kind: str, name: str) -> None:
    """Prediction files have a column `phase_name`, and people open CSV files with spreadsheets."""
    tree = load_dataset("cholec80").model_dump() | {"phase_orders": {}}
    tree[kind] = (name, *tree[kind][1:])
    with pytest.raises(ValueError, match="as a formula"):
        DataSetSpec(**tree)


def test_a_value_in_place_of_a_block_is_refused_with_an_example() -> None:
    refused = r"^--set: temporal: must hold settings of its own, for example temporal\.\w+, got 3$"
    with pytest.raises(UserError, match=refused):
        load_config("mini", ["temporal=3"])


def test_a_settings_file_is_no_ablation(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("seed: 3\ntemporal: {epochs: 3}\n")
    with pytest.raises(UserError, match=rf"^{file}: is a settings file, not an ablation; "):
        load_ablation(file)
    file.write_text("base: mini\nseed: [3]\nspace: {temporal.epochs: [3]}\n")
    with pytest.raises(UserError, match=rf"^{file}: unknown key seed; did you mean seeds"):
        load_ablation(file)


def test_an_empty_reason_of_an_excluded_video_is_refused(tmp_path: Path) -> None:
    refused = r"data\.exclude: video01 has no reason; give one, or list the ids without reasons: \[video01\]$"
    file = tmp_path / "own.yaml"
    file.write_text("data: {exclude: {video01: }}\n")
    for source, overrides in (("mini", ["data.exclude={video01: }"]), ("mini", ["data.exclude.video01="]), (file, [])):
        with pytest.raises(UserError, match=refused):
            load_config(source, overrides)
    listed = load_config("mini", ["data.exclude=[video01]"])
    file.write_text(to_yaml(listed))
    assert load_config(file) == listed


@pytest.mark.parametrize("backbone", ["resnet50", "efficientnet_lite1", "timm:vit_tiny_patch16_224"])
@pytest.mark.parametrize(
    "values", [[], ["preprocess.interpolation=bilinear", "preprocess.short_side_px=null", "preprocess.resize_px=250"]]
)
def test_settings_mean_the_same_when_they_are_written_and_read_again(
    backbone: str, values: list[str], tmp_path: Path
) -> None:
    """Also where a value is the default of `preprocess` but not that of the encoder."""
    config = load_config("cholec80", [f"cnn.backbone={backbone}", *values])
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert load_config(str(tmp_path / "again.yaml")) == config
    assert Config.model_validate(config.model_dump()) == config
    assert Config.model_validate(config.model_dump(mode="json")) == config
