"""What every test may use: the real material beside the project, and where it is not, a reason to skip."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent


def find_shared_data() -> Path | None:
    """The folder of real Cholec80 material: `SURGSTAGE_SHARED`/data, `../shared/data` by default."""
    shared = Path(os.environ.get("SURGSTAGE_SHARED", PROJECT.parent / "shared"))
    return shared / "data" if (shared / "data").is_dir() else None


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real material; a user's machine skips without it, CI must have it."""
    data = find_shared_data()
    if data is not None:
        return data
    reason = "no real material: set SURGSTAGE_SHARED to the folder that holds data/"
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)
