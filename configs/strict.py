"""Base classes of all pydantic models: unknown keys are errors, and instances are immutable."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, model_serializer


class Strict(BaseModel):
    """Base class of all blocks: unknown keys are errors, and instances are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class OmitsDefaults(Strict):
    """A model that is serialised without the fields in OMITTED, as long as these have their default values.

    Such fields were added after the first release. Files that do not need them keep the same bytes and digests.
    """

    OMITTED: ClassVar[frozenset[str]] = frozenset()

    @model_serializer(mode="wrap")
    def _without_defaults(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields = type(self).model_fields
        return {
            name: value
            for name, value in dump(self).items()
            if name not in self.OMITTED or getattr(self, name) != fields[name].default
        }
