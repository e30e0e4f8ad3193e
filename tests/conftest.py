"""Shared by all tests: the real data next to the project, or a reason to skip if there are none."""

from __future__ import annotations

import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import absl.logging
import pytest
from hypothesis import HealthCheck, settings

import configs  # noqa: F401, before any test imports torch: idle threads do not spin, as in every command
from tests.cli import PROJECT, Forks, shared_forks

# absl, which NNCF imports, closes its stream when logging is configured anew, as submitit does: never that of pytest.
absl.logging.get_absl_handler().python_handler.setStream(sys.__stderr__)

# A test must not depend on the speed or load of the machine.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


def find_shared_data() -> Path | None:
    """The folder of real Cholec80 material: `SURGSTAGE_SHARED`/data, `shared/data` beside the checkout by default."""
    shared = Path(os.environ.get("SURGSTAGE_SHARED", PROJECT.parent / "shared"))
    return shared / "data" if (shared / "data").is_dir() else None


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data; without it tests are skipped on a user's machine and fail in CI."""
    data = find_shared_data()
    if data is not None:
        return data
    reason = "no real material: set SURGSTAGE_SHARED to the folder that holds data/"
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with long tests first, so that no process still has one of them when the others have finished."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture(scope="session")
def forks() -> Forks:
    """A process that forks commands."""
    return shared_forks()


# Without these a fresh Chromium connects to its vendor before it has opened a page.
CHROMIUM_OPTIONS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """The machine's own Chromium, headless; without it tests are skipped on a user's machine and fail in CI."""
    program = shutil.which("chromium")
    if program is None:
        reason = "no chromium on this machine: install Debian's package chromium"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=CHROMIUM_OPTIONS)
        yield browser
        browser.close()
