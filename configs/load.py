"""Load settings from a preset or a YAML file, apply `--set a.b=c`, and validate them. Errors name the wrong key."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from configs.ablation import AblationConfig
from configs.dataset_spec import DataSetSpec
from configs.encoder_comparison import EncoderComparison
from configs.encoder_spec import needs_missing_timm, own_preprocess
from configs.errors import UserError, did_you_mean, one_line
from configs.head_settings import DEFAULT_HEAD, HEAD_SETTINGS, HeadSettings
from configs.mapping import ClassMapping
from configs.overlap import Overlap, OverlapList
from configs.schema import DEFAULT_BACKBONE, Config

PRESETS = Path(__file__).resolve().parent
DEFAULT_PRESET = "cholec80"
MAX_YAML_BYTES = 256 << 10  # presets have up to 5 kB; PyYAML takes about 5 s for a file of this size
MAX_YAML_VALUES = 50_000
_HEAD_NAME = ("temporal", "head", "name")
_BACKBONE = ("cnn", "backbone")
_NUMBER_TAGS = {"tag:yaml.org,2002:int", "tag:yaml.org,2002:float"}
_OTHER_BASE = re.compile(r"[-+]?(0[0-7_]*[1-7]_*[0-7][0-7_]*|.*:.*)")  # YAML reads 010 as 8, and 1:30 as 90
Model = TypeVar("Model", bound=BaseModel)


def load_config(
    source: str | Path | None = None, overrides: Iterable[str] = (), changes: Mapping[str, object] | None = None
) -> Config:
    """Load settings from a YAML file or a preset, and apply overrides (texts `a.b=c`) and typed `changes`.

    The order of overrides and changes never matters: a block is the same as its values one by one, the name of a head
    is applied before the head's other settings, and two values for one key are refused. The value in an override is
    YAML (numbers, booleans, `null`, `[lists]`), except that it is taken literally if the setting is a path or a string.

    Raises UserError if the file is missing, unreadable or not YAML. Also raises UserError naming the key for an invalid
    value or an unknown key; for an unknown key, the message suggests the most similar one.
    """
    path = preset_path(source or DEFAULT_PRESET, PRESETS, "settings file or preset")
    tree = read_yaml(path)
    config = _read_config(tree, str(path))  # validate before the overrides, so that an error in the file names the file
    given = _given_values(overrides, changes or {})
    if not given:
        return config
    _apply(tree, given)
    return _read_config(tree, "--set")


class GivenKeys(NamedTuple):
    """The dotted keys that the user set with `--set`, and in a file that is not one of this project's presets."""

    by_set: frozenset[str] = frozenset()
    in_file: frozenset[str] = frozenset()

    def any_of(self, *keys: str) -> list[str]:
        """Return those of `keys` that the user set, with `--set` or in a file."""
        return [key for key in keys if key in self.by_set | self.in_file]


NO_KEYS = GivenKeys()


def keys_given(source: str | Path | None, overrides: Iterable[str]) -> GivenKeys:
    """Return the keys that the user set, given the same arguments as `load_config`."""
    path = preset_path(source or DEFAULT_PRESET, PRESETS, "settings file or preset")
    own = {} if path.resolve().parent == PRESETS else flatten(read_yaml(path))
    return GivenKeys(frozenset(".".join(keys) for keys in _given_values(overrides, {})), frozenset(own))


def load_dataset(name: str) -> DataSetSpec:
    """Load the description of a data set, by its name in `configs/datasets` or from a YAML file.

    Raises UserError naming the file, and the key that is wrong.
    """
    path = preset_path(name, PRESETS / "datasets", "data set file, and no data set of that name")
    return _validate(DataSetSpec, read_yaml(path), str(path))


def dataset_names() -> list[str]:
    """Return the names of the data sets in `configs/datasets`, sorted."""
    return sorted(path.stem for path in (PRESETS / "datasets").glob("*.yaml"))


@functools.cache
def known_overlaps() -> tuple[Overlap, ...]:
    """Return the list of operations that occur in several public data sets."""
    path = PRESETS / "overlaps" / "public.yaml"
    return _validate(OverlapList, read_yaml(path), str(path)).overlaps


def load_mapping(source: str | Path) -> ClassMapping:
    """Load a mapping of classes, by its name in `configs/mappings` or from a YAML file.

    Raises UserError naming the file, and the key that is wrong.
    """
    path = preset_path(source, PRESETS / "mappings", "mapping file, and no mapping of that name")
    return _validate(ClassMapping, read_yaml(path), str(path))


def load_ablation(source: str | Path) -> AblationConfig:
    """Load an ablation, by its name in `configs/ablations` or from a YAML file.

    Raises UserError naming the file, and the key that is wrong.
    """
    path = preset_path(source, PRESETS / "ablations", "ablation file, and no ablation of that name")
    tree = read_yaml(path)
    if "base" not in tree and not tree.keys().isdisjoint(Config.model_fields):
        raise UserError(
            f"{path}: is a settings file, not an ablation; write a file that names it as base and lists in space the "
            "settings to compare, as those in configs/ablations do"
        )
    if "encoders" in tree:
        raise UserError(f"{path}: compares encoders; run it with compare-encoders")
    return _validate(AblationConfig, tree, str(path))


def load_encoder_comparison(source: str | Path) -> EncoderComparison:
    """Load a file for `compare-encoders`, by its name in `configs/ablations` or from a YAML file.

    Raises UserError naming the file, and the key that is wrong.
    """
    path = preset_path(source, PRESETS / "ablations", "file for compare-encoders, and none of that name")
    tree = read_yaml(path)
    if "encoders" not in tree:
        raise UserError(f"{path}: names no encoders; compare-encoders needs base, encoders and heads, as in encoders")
    return _validate(EncoderComparison, tree, str(path))


def preset_path(source: str | Path, folder: Path, what: str) -> Path:
    """Return the file `source` if it exists, otherwise the YAML file with that name in `folder`.

    Raises UserError, which says that there is no such `what`, with the most similar name if neither exists.
    """
    path = Path(source)
    if path.is_file():
        return path
    named = folder / f"{source}.yaml"
    if named.is_file() and path.name == str(source):
        return named
    known = sorted(entry.stem for entry in folder.glob("*.yaml"))
    hint = did_you_mean(str(source), known)
    raise UserError(f"{source}: no such {what}{hint} (known: {', '.join(known)})")


def read_yaml(path: Path) -> dict[str, Any]:
    """Read the mapping in a YAML file; an empty file gives an empty mapping.

    Raises UserError if the file is missing, unreadable, larger than MAX_YAML_BYTES, not YAML (naming the line) or not a
    mapping.
    """
    try:
        with path.open("rb") as stream:
            content = stream.read(MAX_YAML_BYTES + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if len(content) > MAX_YAML_BYTES:
        raise UserError(f"{path}: larger than {MAX_YAML_BYTES >> 10} KiB, the limit for settings; choose another file")
    try:
        tree = _parse_yaml(content.decode("utf-8-sig"))
    except ValueError as error:
        raise UserError(f"{path}: not a YAML file: {one_line(error, most=None)}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected keys and values, found {type(tree).__name__}")
    return tree


def _parse_yaml(text: str, kind: type[yaml.SafeLoader | yaml.BaseLoader] = yaml.SafeLoader) -> Any:
    """Parse a YAML text that contains plain values only.

    Raises ValueError for tags of other types, for a key that occurs twice in a mapping, for numbers in base 8 or 60,
    and for aliases that contain themselves or expand to more than MAX_YAML_VALUES values.
    """
    try:
        loader = kind(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _expanded_size(node, {})
        return loader.construct_document(node)
    except Exception as error:  # PyYAML raises KeyError, AttributeError and others if a value does not fit its tag
        raise ValueError(str(error) or type(error).__name__) from error


def _expanded_size(node: yaml.Node, sizes: dict[int, int]) -> int:
    """Count the values below a node, with aliases expanded.

    `sizes` stores the counts by node id. A count of 0 marks a node that is still being counted: meeting such a node
    again means that an alias contains itself.
    """
    if isinstance(node, yaml.ScalarNode):
        if node.tag in _NUMBER_TAGS and node.style is None and _OTHER_BASE.fullmatch(node.value):
            raise ValueError(f"YAML reads {node.value} as a number in base 8 or 60; write it in base 10, or quote it")
        return 1
    if id(node) not in sizes:
        sizes[id(node)] = 0
        children = node.value
        if isinstance(node, yaml.MappingNode):
            _require_unique_keys([key for key, _ in node.value if isinstance(key, yaml.ScalarNode)])
            children = [child for pair in node.value for child in pair]
        sizes[id(node)] = 1 + sum(_expanded_size(child, sizes) for child in children)
    if not sizes[id(node)]:
        raise ValueError("an alias contains itself")
    if sizes[id(node)] > MAX_YAML_VALUES:
        raise ValueError(f"its aliases expand to more than {MAX_YAML_VALUES:,} values")
    return sizes[id(node)]


def _require_unique_keys(keys: Sequence[yaml.ScalarNode]) -> None:
    """Raise ValueError for a key that occurs twice in a mapping: PyYAML would silently drop the first value."""
    lines: dict[tuple[str, str], int] = {}
    for key in keys:
        line = key.start_mark.line + 1
        if (key.tag, key.value) in lines:
            raise ValueError(f"{key.value} is given twice, in lines {lines[key.tag, key.value]} and {line}")
        lines[key.tag, key.value] = line


def to_yaml(model: BaseModel) -> str:
    """Return all settings, including defaults, as YAML in the order of the schema.

    A comment says so if the frames of the encoder are not known here, since a later use of the text would fix them.
    """
    text = yaml.safe_dump(model.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)
    if isinstance(model, Config) and needs_missing_timm(model.cnn.backbone):
        return f"# note: timm is not installed, so preprocess.* may not be what {model.cnn.backbone} documents\n{text}"
    return text


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one mapping with dotted keys: `{"a.b": value}`."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{name}."))
        else:
            flat[name] = value
    return flat


def differences(there: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Describe each setting in which two nested mappings differ, as `key: OLD there, NEW now`."""
    old, new = flatten(there), flatten(now)
    return [
        f"{key}: {old.get(key, 'absent')} there, {new.get(key, 'absent')} now"
        for key in dict.fromkeys([*old, *new])
        if old.get(key) != new.get(key)
    ]


def _given_values(overrides: Iterable[str], changes: Mapping[str, object]) -> dict[tuple[str, ...], object]:
    """Return the given values by key, sorted, with blocks split into single values.

    Raises UserError if two values conflict.
    """
    given: dict[tuple[str, ...], object] = {}
    pairs = [_read_override(override) for override in sorted(overrides)]
    pairs += [(tuple(key.split(".")), value) for key, value in changes.items()]
    for keys, value in (leaf for pair in pairs for leaf in _leaves(*pair)):
        one, other = sorted((_shown(given.setdefault(keys, value)), _shown(value)))
        if one != other:
            raise UserError(f"--set {'.'.join(keys)}: given both as {one} and as {other}; give it once")
    for keys in sorted(given):
        for length in range(1, len(keys)):
            if (above := given.get(keys[:length], {})) != {}:
                block = ".".join(keys[:length])
                raise UserError(f"--set {'.'.join(keys)}: cannot be combined with {block}={_shown(above)}")
    return dict(sorted(given.items()))


def _shown(value: object) -> str:
    return "null" if value is None else str(value)


def _read_override(override: str) -> tuple[tuple[str, ...], object]:
    key, equals, text = override.partition("=")
    keys = tuple(key.strip().split("."))
    if not equals or not all(keys):
        raise UserError(f"--set {override}: expected key=value, for example --set temporal.head.hidden=256")
    try:
        return keys, _read_value(text, {kind for field in _fields_at(keys) for kind in _types_in(field.annotation)})
    except ValueError as error:
        raise UserError(f"--set {override}: the value is not YAML: {one_line(error, most=None)}") from error


def _read_value(text: str, kinds: set[Any]) -> object:
    """Convert the text of an override to a value, for a setting with these types.

    Paths and names are taken literally, except that quotes are removed and `null` means None; other types are YAML.
    """
    word = text.strip()
    if word in {"", "null"}:
        return None
    quoted = len(word) > 1 and word[0] == word[-1] and word[0] in "'\""
    if not quoted and (kinds & {str, Path} or word in kinds):
        return text
    words = kinds & {tuple[str, ...], dict[str, str]}  # contain strings, so do not parse numbers, dates or booleans
    value = _parse_yaml(text, yaml.BaseLoader if words else yaml.SafeLoader)
    # BaseLoader reads a missing value as an empty string
    return {key: part or None for key, part in value.items()} if words and isinstance(value, dict) else value


def _leaves(keys: tuple[str, ...], value: object) -> list[tuple[tuple[str, ...], object]]:
    """Return the single values inside a block with their keys.

    An empty block, or a value that is not a block, is returned unchanged with its own key.
    """
    if not (isinstance(value, Mapping) and value and _is_block(keys)):
        return [(keys, value)]
    return [leaf for name, child in value.items() for leaf in _leaves((*keys, str(name)), child)]


def _apply(tree: dict[str, Any], given: Mapping[tuple[str, ...], object]) -> None:
    for keys in sorted(given, key=lambda keys: (keys not in (_HEAD_NAME, _BACKBONE), keys)):  # names come first
        node = tree
        for name in keys[:-1]:
            child = {} if node.get(name) is None else node[name]  # an optional block may be absent
            if not isinstance(child, dict):
                raise UserError(f"--set {'.'.join(keys)}: {name} is a value, not a block")
            node[name] = node = dict(child)  # copy the block, which other blocks may share through a YAML alias
        if keys == _BACKBONE and given[keys] != node.get("backbone", DEFAULT_BACKBONE):
            _drop_preprocess(tree, str(given[keys]))
        # If the name of the head changes, drop the settings that the file gives for its own head.
        if keys == _HEAD_NAME and node.get("name", DEFAULT_HEAD) != given[keys]:
            node.clear()
        if not (given[keys] == {} and _is_block(keys) and node.get(keys[-1])):
            node[keys[-1]] = given[keys]


def _drop_preprocess(tree: dict[str, Any], backbone: str) -> None:
    """Drop what the file says about the images of its own backbone, if `backbone` states its own preprocessing."""
    block = tree.get("preprocess")
    if isinstance(block, dict) and own_preprocess(backbone):
        tree["preprocess"] = {key: value for key, value in block.items() if key == "cut_margin"}


def _read_config(tree: dict[str, Any], where: str) -> Config:
    """Validate the settings in a tree of plain values.

    Booleans (also YAML's `yes` and `on`) in place of numbers are refused, since pydantic would convert them.
    """
    config = _validate(Config, tree, where)
    for key, value in flatten(tree).items():
        if isinstance(value, bool):
            parsed: object = config
            for name in key.split("."):
                parsed = getattr(parsed, name, value)
            if not isinstance(parsed, bool):
                raise UserError(f"{where}: {key}: expected a number, got {str(value).lower()}")
    return config


def _is_block(keys: tuple[str, ...]) -> bool:
    return any(_models_in(field.annotation) for field in _fields_at(keys))


@functools.cache
def _fields_at(keys: tuple[str, ...]) -> Sequence[FieldInfo]:
    """Return the schema's fields for a dotted key: none if the key is unknown, several if several heads have it."""
    models: Sequence[type[BaseModel]] = [Config]
    for key in keys:
        fields = [model.model_fields[key] for model in models if key in model.model_fields]
        models = [model for field in fields for model in _models_in(field.annotation)]
    return fields


def _types_in(annotation: Any) -> list[Any]:
    """Return the types that a setting can have, and for a Literal its values."""
    if get_origin(annotation) in {tuple, list, dict}:
        return [annotation]
    return [kind for part in get_args(annotation) for kind in _types_in(part)] or [annotation]


def _validate(model: type[Model], tree: dict[str, Any], where: str) -> Model:
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        problems = [_explain(model, tree, problem) for problem in error.errors()]
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise UserError(f"{where}: {'; '.join(problems[:3])}{more}") from error
    except RecursionError as error:
        raise UserError(f"{where}: nested too deeply") from error


def _explain(model: type[BaseModel], tree: Mapping[str, Any], problem: Mapping[str, Any]) -> str:
    keys = [str(part) for part in problem["loc"]]
    key = ".".join(keys)
    if problem["type"] != "extra_forbidden":
        given = problem.get("input")
        shown = f", got {given!r}" if isinstance(given, str | int | float | bool) else ""
        if problem["type"] == "model_type":
            example = next((name for name in _key_names(model) if name.startswith(f"{key}.")), f"{key}.KEY")
            return f"{key}: must hold settings of its own, for example {example}{shown}"
        return f"{key or 'settings'}: {problem['msg'].removeprefix('Value error, ')}{shown}"
    if model is Config and keys[:-1] == [*_HEAD_NAME[:-1]]:
        head = str(tree["temporal"]["head"].get("name", DEFAULT_HEAD))
        fields = [name for name in HEAD_SETTINGS.find(head).model_fields if name != "name"]
        near = did_you_mean(keys[-1], fields).replace("mean ", "mean temporal.head.")
        return f"unknown key {key}{near or f': {head} has ' + (', '.join(fields) or 'no settings')}"
    known = _key_names(model)
    same_leaf = [name for name in known if name.rsplit(".", 1)[-1] == keys[-1]]
    return f"unknown key {key}{did_you_mean(key, same_leaf or known)}"


@functools.cache
def _key_names(model: type[BaseModel]) -> Sequence[str]:
    """Return all dotted keys of a schema."""
    names: list[str] = []
    for name, field in model.model_fields.items():
        names.append(name)
        for child in _models_in(field.annotation):
            names.extend(f"{name}.{key}" for key in _key_names(child))
    return list(dict.fromkeys(names))


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    parts = get_args(annotation)  # before isinstance: in Python 3.10, `tuple[str, ...]` is an instance of type
    if annotation is HeadSettings:
        return [HEAD_SETTINGS.find(name) for name in HEAD_SETTINGS.names()]
    if not parts and isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in parts for model in _models_in(part)]
