"""Read which phase each number means, for files that contain phase numbers instead of names.

Checkpoints, pickles, TFRecords and exported ids number the phases, and several orders are in use: Cholec80's
GallbladderPackaging and GallbladderRetraction are 4 and 6, or 6 and 4. The order is therefore never assumed; the user
must give it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from configs.dataset_spec import DataSetSpec, class_ids, folded_name
from configs.errors import UserError
from engine.files import read_bounded
from features.dataset.annotations import text_lines

DATASET_ORDER = "dataset"  # the order in which the data set's description lists its phases
MAX_FILE_BYTES = 1 << 16
_NUMBER = re.compile(r"^\s*\d+\s*[\s:=,;.]\s*")


def parse_phase_order(text: str | None, spec: DataSetSpec, needed_by: str) -> tuple[str, ...]:
    """Return the names of phases 0, 1, ... in another program's file, from the user's `--phase-order`.

    `text` is one of the data set's `phase_orders`, `dataset` (the order of its description), a file (one name per line,
    numbered or not), or comma-separated names. `needed_by` is the file with the numbers, for the message. Raises
    UserError if nothing was given, or if a phase is missing, unknown or repeated.
    """
    if not text:
        raise UserError(
            f"{needed_by}: contains phase numbers, not names; give their order with --phase-order {_forms(spec)}"
        )
    if text in spec.phase_orders:
        return spec.phase_orders[text]
    if text == DATASET_ORDER:
        return spec.phases
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
        problem = f"names {repeated[0]} twice" if repeated else f"lacks {missing[0]}"
        raise UserError(f"--phase-order: {problem}; name every phase of {spec.name} once")
    return tuple(order)


def _forms(spec: DataSetSpec) -> str:
    named = ", ".join([*spec.phase_orders, DATASET_ORDER])
    return f"NAME ({named}), FILE or comma-separated names"


def _names_in_file(path: Path) -> list[str]:
    lines = text_lines(read_bounded(path, MAX_FILE_BYTES), path)
    return [_NUMBER.sub("", line).strip().strip(",") for line in lines if line.strip() and not line.startswith("#")]


def ids_of_order(order: Sequence[str], classes: Sequence[str]) -> NDArray[np.int64]:
    """Return (C,), the index in `classes` of each phase of `order`, so that `ours = ids_of_order(...)[theirs]`."""
    return np.array([classes.index(name) for name in order], dtype=np.int64)


def describe_order(order: Sequence[str]) -> str:
    """Return an order as shown to the user: `0 Preparation, 1 CalotTriangleDissection, ...`."""
    return ", ".join(f"{number} {name}" for number, name in enumerate(order))
