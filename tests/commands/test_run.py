"""`run` checks the settings of all stages before the first one works for hours."""

from __future__ import annotations

from pathlib import Path

import pytest

from commands.run import run_all
from configs.errors import UserError
from engine.stopping import StopRequest
from tests.onednn import cpu_with_bf16
from tests.stage1_cnn.material import make_world


@pytest.mark.parametrize("setting", ["cnn.precision", "extract.precision", "temporal.precision", "temporal.projection"])
def test_a_precision_that_a_later_stage_does_not_compute_is_refused_first(tmp_path: Path, setting: str) -> None:
    world = make_world(tmp_path, tmp_path / "nothing")
    block, key = setting.split(".")
    config = world.set(**{block: {key: "bf16"}})
    with cpu_with_bf16(False), pytest.raises(UserError, match=f"^{setting}=bf16: .* set {setting}=fp32 or auto$"):
        run_all(config, world.run, StopRequest())
    assert list(tmp_path.iterdir()) == []
    with cpu_with_bf16(True), pytest.raises(UserError, match="no such folder"):  # the next error: there is no data
        run_all(config, world.run, StopRequest())
