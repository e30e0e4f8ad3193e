"""Which phase a number means in files that hold numbers and no names: never assumed, always asked for.

Checkpoints, pickles, TFRecords and exported ids number the phases; lists in circulation differ (Cholec80's
GallbladderPackaging and GallbladderRetraction are 4 and 6, or 6 and 4).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from configs.errors import UserError
from configs.schema import DataSetSpec, class_ids, folded_name

MAX_FILE_BYTES = 1 << 16
_NUMBER = re.compile(r"^\s*\d+\s*[\s:=,;.]\s*")


def parse_phase_order(text: str | None, spec: DataSetSpec, needed_by: str) -> tuple[str, ...]:
    """The names of phases 0, 1, ... in a foreign file, from what a user gave as `--phase-order`.

    `text`: one of the data set's `phase_orders`, a file (one name per line, numbered or not), or comma-separated names.
    `needed_by` names the file that holds numbers. Raises UserError when nothing was given or a phase is missing,
    unknown or there twice.
    """
    if not text:
        raise UserError(
            f"{needed_by}: holds numbers of phases, not names; say which is which with --phase-order {_forms(spec)}"
        )
    if text in spec.phase_orders:
        return spec.phase_orders[text]
    names = _names_in_file(Path(text)) if Path(text).is_file() else [part.strip() for part in text.split(",")]
    if len(names) == 1 and not Path(text).is_file():
        raise UserError(f"--phase-order {text}: no such order or file; give {_forms(spec)}")
    known = class_ids(spec.phases, spec.phase_aliases)
    order = []
    for name in names:
        found = known.get(folded_name(name))
        if found is None:
            raise UserError(f"--phase-order: unknown phase {name[:60]!r}; {spec.name} has {', '.join(spec.phases)}")
        order.append(spec.phases[found])
    repeated = sorted({name for name in order if order.count(name) > 1})
    missing = [name for name in spec.phases if name not in order]
    if repeated or missing:
        problem = f"{repeated[0]} twice" if repeated else f"not {missing[0]}"
        raise UserError(f"--phase-order: names {problem}; every phase of {spec.name} is wanted once")
    return tuple(order)


def _forms(spec: DataSetSpec) -> str:
    return (
        f"NAME ({', '.join(spec.phase_orders)}), FILE or comma-separated names"
        if spec.phase_orders
        else "FILE or comma-separated names"
    )


def _names_in_file(path: Path) -> list[str]:
    try:
        with path.open("rb") as stream:
            content = stream.read(MAX_FILE_BYTES + 1)
        if len(content) > MAX_FILE_BYTES:
            raise UserError(f"{path}: too long for a list of phases")
        lines = content.decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a list of phases ({error})") from error
    return [_NUMBER.sub("", line).strip().strip(",") for line in lines if line.strip() and not line.startswith("#")]


def ids_of_order(order: Sequence[str], classes: Sequence[str]) -> NDArray[np.int64]:
    """For each number of a foreign order, our number of the same phase: `ours = ids_of_order(...)[theirs]`."""
    return np.array([classes.index(name) for name in order], dtype=np.int64)


def describe_order(order: Sequence[str]) -> str:
    """What is shown wherever an order is used: `0 Preparation, 1 CalotTriangleDissection, ...`."""
    return ", ".join(f"{number} {name}" for number, name in enumerate(order))
