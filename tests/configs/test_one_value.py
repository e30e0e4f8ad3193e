"""Setting one value changes only that value, for every setting, and the order of two never matters."""

from __future__ import annotations

import functools
import itertools
import json
import random
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, get_args

import pytest
from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from configs import load
from configs.errors import UserError
from configs.head_settings import GruHead
from configs.load import PRESETS, load_config, read_yaml
from configs.schema import Config, JointStepConfig

PRESET_NAMES = sorted(path.stem for path in PRESETS.glob("*.yaml"))
QUICK = ("cholec80", "mtrcnet_cl")
RANDOM_PAIRS = 500
LEFT_OUT: dict[str, Any] = {"": None}  # a block that is not written, since all its values are the defaults
NAME = "temporal.head.name"  # determines which other keys exist


@pytest.fixture(autouse=True)
def files_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """YAML takes longer than all else here."""
    read = functools.cache(read_yaml)
    monkeypatch.setattr(load, "read_yaml", lambda path: dict(read(path)))


def models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in models_in(part)]


def fields_of(model: type[BaseModel], values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every leaf of the schema with its dotted key, those of the blocks that are left out too."""
    for name, field in model.model_fields.items():
        key, blocks = f"{above}{name}", models_in(field.annotation)
        inside = values.get(name) or {}
        if field.discriminator:
            blocks = [kind for kind in blocks if inside["name"] in get_args(kind.model_fields["name"].annotation)]
        if blocks:
            yield from fields_of(blocks[0], inside, f"{key}.")
        else:
            yield key, field


def leaves(values: dict[str, Any]) -> dict[str, Any]:
    """The value of every leaf, those that are left out at their defaults too; none for those of blocks left out."""
    found = {}
    for key, field in fields_of(Config, values):
        *above, leaf = key.split(".")
        block = functools.reduce(lambda at, name: at and at.get(name, LEFT_OUT), above, values)
        found[key] = block and block.get(leaf, field.default)
    return {key: value for key, value in found.items() if value is not None}


def literals(annotation: Any) -> list[Any]:
    return [word for part in get_args(annotation) for word in (literals(part) or [part])]


def candidates(field: FieldInfo, now: Any) -> list[Any]:
    """Other values that the field takes, simple ones first."""
    tried = [not now if isinstance(now, bool) else None, *literals(field.annotation)]
    if isinstance(now, int | float):
        tried += [now - 1, now + 1, now / 2, now * 2]
    tried += [0.5, 1, 3, 320, 400, 200, "1/1/1", "video", [0.4, 0.3, 0.2], [0.5, 1.0]]
    tried += [["video77"], ["phases", "steps"], {"video77": "torn"}]
    kind = TypeAdapter(Annotated[(field.annotation, None, *field.metadata)])
    found = []
    for value in tried:
        try:
            taken = kind.dump_python(kind.validate_python(value), mode="json")
        except ValidationError:
            continue
        if taken != now and taken not in found:
            found.append(taken)
    return found


def outcome(preset: str, *given: str) -> Config | str:
    try:
        return load_config(preset, given)
    except UserError as error:
        return str(error)


def other_value(preset: str, key: str, field: FieldInfo, now: Any) -> str:
    """`key=value` with a value that this preset takes, or one that it refuses because of another setting."""
    other = [f"{key}={json.dumps(value)}" for value in (["gru"] if key == NAME else candidates(field, now))]
    assert other, f"{key}: this test knows no other value; teach `candidates` one"
    return next((given for given in other if not isinstance(outcome(preset, given), str)), other[0])


@pytest.mark.parametrize(
    "preset",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in PRESET_NAMES],
)
def test_one_value_changes_nothing_else(preset: str) -> None:
    before = load_config(preset).model_dump(mode="json")
    flat = leaves(before)
    given = {key: other_value(preset, key, field, flat.get(key)) for key, field in fields_of(Config, before)}
    for key, override in given.items():
        result = outcome(preset, override)
        if isinstance(result, str) and key == "cnn.augment.crop":
            assert "windows lie anywhere" in result  # of a preset with windows of random size
            continue
        if isinstance(result, str) and "early_stop_epochs has no place with keep_epoch=last" in result:
            assert key.endswith(("keep_epoch", "early_stop_epochs"))  # of a preset with the other one
            continue
        if isinstance(result, str) and key in ("temporal.decoding.lag_s", "temporal.decoding.min_duration_s"):
            assert "has no effect with mode=filter" in result  # of a preset that decodes so
            continue
        if isinstance(result, str):  # steps of the schedule ask for branches of the net
            assert key.startswith("joint.")
            assert key.split(".")[1] in result
            assert flat.get(key) is None or key.startswith("joint.net.")
            continue
        after = leaves(result.model_dump(mode="json"))
        changed = {name for name in {*flat, *after} if flat.get(name) != after.get(name)}
        if key == NAME:  # another head has other settings, at their defaults
            assert all(name.startswith("temporal.head.") for name in changed)
            assert result.temporal.head == GruHead(name="gru")
        else:
            assert changed == {key}
    assert_order_never_matters(preset, list(given.values()))


def assert_order_never_matters(preset: str, given: list[str]) -> None:
    """Pairs within a block, and pairs of any."""
    blocks: dict[str, list[str]] = {}
    for override in given:
        blocks.setdefault(override.partition("=")[0].rpartition(".")[0], []).append(override)
    rng = random.Random(preset)
    pairs = [pair for block in blocks.values() for pair in itertools.combinations(block, 2)]
    pairs += [(one, other) for one, other in (rng.sample(given, 2) for _ in range(RANDOM_PAIRS))]
    for one, other in pairs:
        assert outcome(preset, one, other) == outcome(preset, other, one)


def test_every_block_has_its_own_defaults() -> None:
    """Otherwise a value given inside a block would bring the defaults of the class, not those of the block's
    position.
    """
    waiting: list[type[BaseModel]] = [Config]
    while waiting:
        model = waiting.pop()
        for name, field in model.model_fields.items():
            kinds = models_in(field.annotation)
            waiting += kinds
            if kinds and field.default is not None:
                default = field.get_default(call_default_factory=True)
                assert default == type(default)(), f"{model.__name__}.{name}"
                assert isinstance(default, kinds[0])


@pytest.mark.parametrize(
    "pair",
    [
        ("seed=3", "seed=4"),
        ("joint.mapping=null", "joint.mapping.epochs=3"),
        ("temporal.head={name: gru, hidden: 4}", "temporal.head.hidden=3"),
        ("temporal.head=null", "temporal.head.hidden=3"),
        ("temporal.optim={lr: 0.1}", "temporal.optim.lr=0.2"),
        ("temporal={head: {name: tcn}}", "temporal.head.name=gru"),
    ],
)
def test_a_contradiction_is_refused_in_either_order(pair: tuple[str, str]) -> None:
    result = outcome("cholec80", *pair)
    assert isinstance(result, str)
    assert "given both as" in result or "cannot be combined with" in result
    assert outcome("cholec80", *reversed(pair)) == result


def test_a_block_equals_its_values_one_by_one() -> None:
    values = ["temporal.optim.lr=0.2", "temporal.optim.name=sgd"]
    assert load_config("cholec80", ["temporal.optim={name: sgd, lr: 0.2}"]) == load_config("cholec80", values)
    mapping = load_config("cholec80", ["joint.net.mapping=true", "joint.mapping={}"])
    assert mapping.joint.mapping == JointStepConfig()
