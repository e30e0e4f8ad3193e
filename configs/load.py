"""Reading settings: a preset or a file, then `--set a.b=c`, checked against the schema; errors name the key."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from configs.errors import UserError
from configs.schema import AblationConfig, Config, DataSetSpec

PRESETS = Path(__file__).resolve().parent
DEFAULT_PRESET = "cholec80"
MAX_YAML_BYTES = 256 << 10  # ours have 5 kB; PyYAML takes about 5 s for so many
MAX_YAML_VALUES = 50_000
Model = TypeVar("Model", bound=BaseModel)


def load_config(source: str | Path | None = None, overrides: Iterable[str] = ()) -> Config:
    """Settings from a YAML file or the name of a preset, with `a.b=c` overrides laid over it.

    Values of overrides are YAML: numbers, booleans, `null`, `[lists]`. Raises UserError for a missing or broken file
    and for every unknown key or wrong value, naming the key and, for unknown ones, the nearest right key.
    """
    path = preset_path(source or DEFAULT_PRESET, PRESETS, "preset")
    tree = read_yaml(path)
    config = _validate(Config, tree, str(path))  # before the overrides, so that an error is blamed on the right place
    wanted = list(overrides)
    if not wanted:
        return config
    for override in wanted:
        _lay_over(tree, override)
    return _validate(Config, tree, "--set")


def load_dataset(name: str) -> DataSetSpec:
    """A data set's description, from the name of one shipped or from a YAML file."""
    path = preset_path(name, PRESETS / "datasets", "data set")
    return _validate(DataSetSpec, read_yaml(path), str(path))


def load_ablation(source: str | Path) -> AblationConfig:
    """An ablation, from the name of one shipped or from a YAML file."""
    path = preset_path(source, PRESETS / "ablations", "ablation")
    return _validate(AblationConfig, read_yaml(path), str(path))


def preset_path(source: str | Path, folder: Path, what: str) -> Path:
    """The file that `source` means: an existing file as it is, otherwise a name below `folder`."""
    path = Path(source)
    if path.is_file():
        return path
    named = folder / f"{source}.yaml"
    if named.is_file() and path.name == str(source):
        return named
    known = sorted(entry.stem for entry in folder.glob("*.yaml"))
    hint = _nearest(str(source), known)
    raise UserError(f"{source}: no such {what} file, and no {what} of that name{hint} (shipped: {', '.join(known)})")


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file's mapping. Raises UserError naming the line of a syntax error."""
    try:
        with path.open("rb") as stream:
            content = stream.read(MAX_YAML_BYTES + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if len(content) > MAX_YAML_BYTES:
        raise UserError(f"{path}: larger than {MAX_YAML_BYTES >> 10} KiB, which no file of settings is; name another")
    try:
        tree = _parse_yaml(content.decode("utf-8-sig"))
    except ValueError as error:
        raise UserError(f"{path}: not a YAML file: {' '.join(str(error).split())}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected keys and values, found {type(tree).__name__}")
    return tree


def _parse_yaml(text: str) -> Any:
    """Plain values of a YAML text. Raises ValueError for anything else, and for aliases that multiply what is there."""
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _require_small(node)
        return loader.construct_document(node)
    except Exception as error:  # PyYAML raises KeyError, AttributeError and more on values that belie their tags
        raise ValueError(str(error) or type(error).__name__) from error


def _require_small(root: yaml.Node) -> None:
    """Raise ValueError where aliases, written out, make a tree that no file of settings has, or one without end."""
    sizes: dict[int, int] = {}  # by node, written out; 0 while what is below it is being counted
    waiting = [root]
    while waiting:
        node = waiting[-1]
        below: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            below = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            below = node.value
        if id(node) not in sizes:
            sizes[id(node)] = 0
            if any(sizes.get(id(part)) == 0 for part in below):
                raise ValueError("an alias that holds itself")
            waiting += (part for part in below if id(part) not in sizes)
            continue
        waiting.pop()
        sizes[id(node)] = 1 + sum(sizes[id(part)] for part in below)
        if sizes[id(node)] > MAX_YAML_VALUES:
            raise ValueError(f"aliases that come to more than {MAX_YAML_VALUES:,} values")


def to_yaml(model: BaseModel) -> str:
    """Every setting, defaults included, as YAML in the schema's order."""
    return yaml.safe_dump(model.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as `{"a.b": value}`."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{name}."))
        else:
            flat[name] = value
    return flat


def differences(there: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """`key: old there, new now` for every setting in which two trees of settings differ."""
    old, new = flatten(there), flatten(now)
    return [
        f"{key}: {old.get(key, 'absent')} there, {new.get(key, 'absent')} now"
        for key in dict.fromkeys([*old, *new])
        if old.get(key) != new.get(key)
    ]


def _lay_over(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    keys = key.strip().split(".")
    if not equals or not all(keys):
        raise UserError(f"--set {override}: expected key=value, for example --set temporal.head.hidden=256")
    try:
        value = _parse_yaml(text) if text.strip() else None
    except ValueError as error:
        raise UserError(f"--set {override}: the value is not YAML: {' '.join(str(error).split())}") from error
    node = tree
    for name in keys[:-1]:
        child = node.setdefault(name, {})
        if not isinstance(child, dict):
            raise UserError(f"--set {override}: {name} holds a value, not keys")
        node = child
    # Another kind of head has other settings: those of the preset's head do not carry over.
    if keys[-1] == "name" and node.get("name", "lstm") != value and keys[:-1] == ["temporal", "head"]:
        node.clear()
    node[keys[-1]] = value


def _validate(model: type[Model], tree: dict[str, Any], where: str) -> Model:
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        problems = [_explain(model, problem) for problem in error.errors()]
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise UserError(f"{where}: {'; '.join(problems[:3])}{more}") from error
    except RecursionError as error:
        raise UserError(f"{where}: nested too deeply") from error


def _explain(model: type[BaseModel], problem: Mapping[str, Any]) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "union_tag_invalid":
        told = problem["ctx"]
        which = told["discriminator"].strip("'")
        return f"{key}.{which}: {told['tag']!r} is none of {told['expected_tags']}"
    if problem["type"] != "extra_forbidden":
        given = problem.get("input")
        shown = f", got {given!r}" if isinstance(given, str | int | float | bool) else ""
        return f"{key or 'settings'}: {problem['msg'].removeprefix('Value error, ')}{shown}"
    known = _key_names(model)
    leaf = str(problem["loc"][-1])
    full = ".".join(str(part) for part in problem["loc"] if part not in _HEAD_TAGS)
    same_leaf = [name for name in known if name.rsplit(".", 1)[-1] == leaf]
    return f"unknown key {full}{_nearest(full, same_leaf or known)}"


_HEAD_TAGS = frozenset({"lstm", "gru", "tcn", "linear"})


@functools.cache
def _key_names(model: type[BaseModel]) -> Sequence[str]:
    """Every settable key of a schema, dotted."""
    names: list[str] = []
    for name, field in model.model_fields.items():
        names.append(name)
        for child in _models_in(field.annotation):
            names.extend(f"{name}.{key}" for key in _key_names(child))
    return list(dict.fromkeys(names))


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    parts = get_args(annotation)  # first: on Python 3.10 `tuple[str, ...]` counts as a type, but not for issubclass
    if not parts and isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in parts for model in _models_in(part)]


def _nearest(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""
