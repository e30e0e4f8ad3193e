"""The settings of heads."""

from __future__ import annotations

import pytest

from configs.head_settings import HEAD_SETTINGS, HeadSettings, read_head

SIZES = [
    (kind, name)
    for kind in HeadSettings.__subclasses__()
    for name, field in kind.model_fields.items()
    if kind.__module__ == HeadSettings.__module__ and field.annotation in (int, int | None)
]


@pytest.mark.parametrize(("kind", "name"), SIZES, ids=lambda one: getattr(one, "__name__", one))
def test_every_size_has_a_limit(kind: type[HeadSettings], name: str) -> None:
    known = next(head for head in HEAD_SETTINGS.names() if HEAD_SETTINGS.find(head) is kind)
    with pytest.raises(ValueError, match=f"{name}\n.*less than or equal to"):
        read_head({"name": known, name: 10**6})
