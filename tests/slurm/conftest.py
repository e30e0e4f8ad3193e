"""Fixtures of the tests on a cluster; without one (`make test-slurm` starts it) no test here is collected."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.slurm.material import make_place

collect_ignore_glob = [] if os.environ.get("SURGSTAGE_TEST_CLUSTER") else ["test_*.py"]


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with five simulated operations, settings, an index and a frame cache; tests add runs of their own."""
    return make_place(tmp_path_factory.mktemp("place"))
