"""A short run of `make fuzz`: the same inputs each time, eighty per parser."""

from __future__ import annotations

import pytest

from tests.fuzz.campaign import attack
from tests.fuzz.parsers import PARSERS

INPUTS = 80


@pytest.mark.parametrize("parser", PARSERS)
def test_hostile_input_is_read_or_refused_in_one_line(parser: str) -> None:
    tally = attack(parser, INPUTS, first_seed=7)
    assert tally.inputs >= 0.9 * INPUTS
    assert [finding.what for finding in tally.findings] == []
