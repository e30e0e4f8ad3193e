"""The user gives phase numbers their names; they are never guessed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import UserError
from configs.load import load_dataset
from features.dataset.phase_order import describe_order, ids_of_order, parse_phase_order

CHOLEC80 = load_dataset("cholec80")


def test_named_orders_swap_packaging_and_retraction() -> None:
    assert parse_phase_order("mtrcnet", CHOLEC80, "a.pth") == CHOLEC80.phases
    swapped = parse_phase_order("tf-cholec80", CHOLEC80, "a.pth")
    assert ids_of_order(swapped, CHOLEC80.phases).tolist() == [0, 1, 2, 3, 6, 5, 4]


def test_the_order_of_the_description_must_be_asked_for() -> None:
    spec = load_dataset("autolaparo")
    assert parse_phase_order("dataset", spec, "a.pkl") == spec.phases
    with pytest.raises(UserError, match=r"give their order with --phase-order NAME \(dataset\), FILE"):
        parse_phase_order(None, spec, "a.pkl")


def test_nothing_given_is_an_error_that_names_the_file_and_the_choices() -> None:
    with pytest.raises(
        UserError, match=r"a\.pth: contains phase numbers.*--phase-order NAME \(mtrcnet, tf-cholec80, dataset\)"
    ):
        parse_phase_order(None, CHOLEC80, "a.pth")


@given(st.permutations(CHOLEC80.phases))
def test_names_with_commas_translate_there_and_back(order: list[str]) -> None:
    parsed = parse_phase_order(", ".join(order), CHOLEC80, "a")
    assert list(parsed) == order
    ids = ids_of_order(parsed, CHOLEC80.phases)
    assert [CHOLEC80.phases[i] for i in ids] == order
    assert np.array_equal(np.argsort(ids)[ids], np.arange(7))


@pytest.mark.parametrize("number", ["", "{i} ", "{i}: ", "{i}\t", "{i}, "])
def test_a_file_holds_one_name_per_line_with_or_without_numbers(tmp_path: Path, number: str) -> None:
    order = CHOLEC80.phases[::-1]
    path = tmp_path / "phases.txt"
    path.write_text("# our lab\n" + "".join(f"{number.format(i=i)}{name.lower()}\n" for i, name in enumerate(order)))
    assert parse_phase_order(str(path), CHOLEC80, "a") == order


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("mtrcnt", "no such order or file"),
        (",".join(CHOLEC80.phases[:-1]), "lacks GallbladderRetraction"),
        (",".join([*CHOLEC80.phases, "Preparation"]), "Preparation twice"),
        (",".join([*CHOLEC80.phases[:-1], "Lunch"]), "unknown phase 'Lunch'"),
    ],
)
def test_what_is_no_order_is_refused(text: str, match: str) -> None:
    with pytest.raises(UserError, match=match):
        parse_phase_order(text, CHOLEC80, "a")


def test_a_file_that_is_no_list_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "order.txt"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8 text"):
        parse_phase_order(str(path), CHOLEC80, "a")
    path.write_bytes(b"a\n" * 100_000)
    with pytest.raises(UserError, match="larger than 65,536 bytes"):
        parse_phase_order(str(path), CHOLEC80, "a")


def test_description_shows_numbers() -> None:
    assert describe_order(["A", "B"]) == "0 A, 1 B"


def test_the_named_orders_hold_for_simulated_operations_too() -> None:
    """They have Cholec80's phases, but `--phase-order mtrcnet` used to be refused on the demo's data."""
    for name, order in load_dataset("cholec80").phase_orders.items():
        assert parse_phase_order(name, load_dataset("simulated"), "file") == order
