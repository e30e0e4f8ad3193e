"""Convert dataclasses to JSON objects and back. Results and the descriptions in checkpoints are such dataclasses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from functools import cache
from typing import Any, TypeVar

from pydantic import BaseModel, GetCoreSchemaHandler, TypeAdapter
from pydantic_core import CoreSchema, core_schema

FLAT = {"flat": True}  # metadata of a dictionary field whose keys are written directly into the JSON object

T = TypeVar("T", bound="Record")


class Record:
    """Base class of dataclasses that are stored as JSON objects. A field with default None is omitted if it is None."""

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object, with keys in the order of the fields."""
        tree: dict[str, Any] = {}
        for one in _fields(type(self)):
            value = as_json(getattr(self, one.name))
            if value is not None or one.default is not None:
                tree |= value if one.metadata == FLAT else {one.name: value}
        return tree

    @classmethod
    def from_json(cls: type[T], tree: Any) -> T:
        """Build the dataclass from a JSON object that `to_json` made, in this version or an earlier one.

        Raises ValueError for any other value.
        """
        found: T = _adapter(cls).validate_python(tree)  # type: ignore[arg-type]  # a class is hashable
        return found

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        inner: dict[str, Any] = {**handler(source)}
        # The reference must be that of the whole schema: where a class occurs again, pydantic uses what it refers to.
        reference = inner.pop("ref", None)
        return core_schema.no_info_before_validator_function(cls._by_field, inner, ref=reference)  # type: ignore[arg-type]

    @classmethod
    def _by_field(cls, tree: Any) -> Any:
        """Return the values of the fields in a JSON object.

        Keys that are not fields become the value of the last field marked FLAT, if there is one.
        """
        if not isinstance(tree, Mapping):
            return tree
        flat = next((one.name for one in reversed(_fields(cls)) if one.metadata == FLAT), None)
        named = [one for one in _fields(cls) if one.name != flat]
        rest = {key: value for key, value in tree.items() if key not in {one.name for one in named}}
        required = [one.name for one in named if one.default is MISSING and one.default_factory is MISSING]
        found = {one.name: tree[one.name] for one in named if one.name in tree}
        return dict.fromkeys(required) | found | ({flat: rest} if flat and rest else {})


def _fields(cls: Any) -> tuple[Field[Any], ...]:
    return fields(cls)


@cache
def _adapter(cls: Any) -> TypeAdapter[Any]:
    return TypeAdapter(cls)


def as_json(value: Any) -> Any:
    """Return `value` as plain JSON values; records and settings inside mappings and sequences are converted too."""
    if isinstance(value, Record):
        return value.to_json()
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return {key: as_json(item) for key, item in value.items()}
    return [as_json(item) for item in value] if isinstance(value, list | tuple) else value
