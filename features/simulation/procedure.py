"""Draw label sequences of simulated cholecystectomies from a small table of aggregate statistics.

The table (`configs/simulation/cholec80.yaml`) says which phases occur, in which order and for how long, which sets of
tools are present in each phase, and how long a tool stays. An operation has one label per second of operating time:

- Phases: a walk over the table's transitions in which no phase occurs twice (as in Cholec80). Lengths are log-normal,
  clipped to the observed minimum and maximum.
- Tools: a Markov chain over sets of tools, whose stationary distribution is that of the phase. In every second each
  tool may appear or disappear (flip). A flip is accepted by the rule of Metropolis et al. (J. Chem. Phys. 1953), with
  which the distribution is exact at any rate of flips. Real tools are often present for a short time and sometimes for
  a long time. Therefore a tool's rate changes from minute to minute (log-normal), with parameters fitted to the median
  and mean time of presence.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from pydantic import Field

import configs
from configs.dataset_spec import DataSetSpec
from configs.errors import UserError
from configs.strict import Strict

TABLE_PATH = Path(configs.__file__).parent / "simulation" / "cholec80.yaml"
# The largest number of tools in a set that the table does not list, since there are four trocars.
_MOST_TOOLS_AT_ONCE = 4
_PACE_SPAN_S = 90


class SegmentLength(Strict):
    """The length of a phase's segments in seconds. `log_mean` and `log_std` are those of its natural logarithm."""

    segments: int = Field(ge=0)
    min: float = Field(gt=0)
    median: float = Field(gt=0)
    max: float = Field(gt=0)
    log_mean: float
    log_std: float = Field(ge=0)


class ToolSet(Strict):
    """A set of tools and the fraction of a phase's seconds in which it is present."""

    p: float = Field(ge=0, le=1)
    tools: tuple[str, ...]


class RunLength(Strict):
    """The lengths of a tool's runs (uninterrupted presences) in seconds."""

    runs: int = Field(ge=0)
    median: float = Field(gt=0)
    mean: float = Field(gt=0)


class Pace(Strict):
    """How often a tool attempts to flip: the mean attempts per second, and the standard deviation of its logarithm."""

    rate: float = Field(gt=0)
    spread: float = Field(ge=0)


class ProcedureTable(Strict):
    """The aggregate statistics that simulated operations follow."""

    title: str
    attribution: str
    videos: int = Field(ge=1)
    last_phase: dict[str, int]
    segments_s: dict[str, SegmentLength]
    transitions: dict[str, dict[str, float]]
    tools_given_phase: dict[str, dict[str, float]]
    tool_sets_given_phase: dict[str, tuple[ToolSet, ...]]
    tool_runs_s: dict[str, RunLength]
    pace: dict[str, Pace]

    @property
    def phases(self) -> tuple[str, ...]:
        return tuple(self.segments_s)

    @property
    def tools(self) -> tuple[str, ...]:
        return tuple(self.tool_runs_s)


@lru_cache(maxsize=1)
def load_table() -> ProcedureTable:
    """Load the table that is part of this project."""
    return ProcedureTable.model_validate(yaml.safe_load(TABLE_PATH.read_text(encoding="utf-8")))


def check_spec(spec: DataSetSpec) -> None:
    """Raise UserError unless the data set has the same classes as the table, in any order."""
    table = load_table()
    for kind, names, known in (("phases", spec.phases, table.phases), ("tools", spec.tools, table.tools)):
        if set(names) != set(known):
            odd = sorted(set(names) ^ set(known))
            raise UserError(
                f"data set {spec.name}: its {kind} are not those of the simulated operations (they differ in "
                f"{', '.join(odd)}); give it the same {kind}, in any order"
            )


@dataclass(frozen=True)
class Operation:
    """The labels of one operation, one per second of operating time, with classes in the data set's order."""

    phase: np.ndarray  # (S,) int8
    tools: np.ndarray  # (S, K) int8, 0 or 1

    @property
    def length_s(self) -> int:
        return len(self.phase)


def draw_operation(rng: np.random.Generator, spec: DataSetSpec) -> Operation:
    """Draw the labels of one operation. `spec` gives the order of the classes."""
    table = load_table()
    phases, tools = [], []
    rates = _FlipRates(rng, table)
    for name in _draw_order(rng, table):
        seconds = _draw_length_s(rng, table.segments_s[name])
        phases.append(np.full(seconds, spec.phases.index(name), dtype=np.int8))
        tools.append(_draw_tools(rng, tool_set_p(name), rates, seconds))
    column = [table.tools.index(name) for name in spec.tools]
    return Operation(np.concatenate(phases), np.concatenate(tools)[:, column])


def frame_seconds(operation: Operation, fps: int, speed_up: float) -> np.ndarray:
    """Return the second of operating time that each frame shows, (T,) int64, in a video at `fps` sped up `speed_up`
    times.
    """
    frames = max(1, int(operation.length_s * fps / speed_up))
    return np.minimum((np.arange(frames) * speed_up / fps).astype(np.int64), operation.length_s - 1)


# ---------------------------------------------------------------------------------------------- phases


def _draw_order(rng: np.random.Generator, table: ProcedureTable) -> list[str]:
    """Draw the phases of one operation in order, each at most once."""
    occurs = {
        phase for phase, length in table.segments_s.items() if rng.random() < min(1.0, length.segments / table.videos)
    }
    candidates = {phase: count for phase, count in table.last_phase.items() if phase in occurs}
    last = _choose(rng, candidates)
    # Start with the first phase of the table that occurs; no transition leads back to it.
    order = [next(phase for phase in table.phases if phase in occurs)]
    left = occurs - {order[0]}
    while left:
        ways = {
            phase: p
            for phase, p in table.transitions[order[-1]].items()
            if p > 0 and phase in left and _completes(table, phase, left - {phase}, last)
        }
        order.append(_choose(rng, ways))
        left -= {order[-1]}
    return order


def _completes(table: ProcedureTable, phase: str, left: set[str], last: str) -> bool:
    """Whether a walk from `phase` can visit each phase in `left` once and end in `last`."""
    if not left:
        return phase == last
    return any(
        p > 0 and following in left and _completes(table, following, left - {following}, last)
        for following, p in table.transitions[phase].items()
    )


def _choose(rng: np.random.Generator, weights: dict[str, Any]) -> str:
    names = list(weights)
    p = np.array([weights[name] for name in names], dtype=float)
    return names[int(rng.choice(len(names), p=p / p.sum()))]


def _draw_length_s(rng: np.random.Generator, length: SegmentLength) -> int:
    drawn = np.exp(rng.normal(length.log_mean, length.log_std))
    return round(float(np.clip(drawn, length.min, length.max)))


# ---------------------------------------------------------------------------------------------- tools


@lru_cache(maxsize=32)
def tool_set_p(phase: str) -> np.ndarray:
    """Return the distribution over sets of tools in a phase, (2^K,); bit k of the index says whether tool k is present.

    The table lists the ten most common sets. The remaining probability is distributed over the other sets by iterative
    proportional fitting (Deming and Stephan 1940), so that each tool is as frequent in the phase as in the table.
    """
    table = load_table()
    tools = table.tools
    member = ((np.arange(2 ** len(tools))[:, None] >> np.arange(len(tools))) & 1).astype(bool)  # (2^K, K)
    p = np.zeros(len(member))
    for entry in table.tool_sets_given_phase[phase]:
        p[sum(1 << tools.index(tool) for tool in entry.tools)] = entry.p
    rest = max(0.0, 1.0 - p.sum())
    open_sets = (p == 0) & (member.sum(axis=1) <= _MOST_TOOLS_AT_ONCE)
    wanted = np.array([table.tools_given_phase[phase][tool] for tool in tools]) - p @ member  # (K,)
    if rest > 1e-3:
        p += rest * _fit_marginals(open_sets.astype(float), member, np.clip(wanted / rest, 0.0, 0.95))
    return p / p.sum()


def _fit_marginals(start: np.ndarray, member: np.ndarray, marginal: np.ndarray, sweeps: int = 200) -> np.ndarray:
    """Return the distribution closest to `start` in which tool k has the probability `marginal[k]`."""
    p = start / start.sum()
    for _ in range(sweeps):
        for k, wanted in enumerate(marginal):
            now = p[member[:, k]].sum()
            p = np.where(member[:, k], p * (wanted / max(now, 1e-12)), p * ((1 - wanted) / max(1 - now, 1e-12)))
    return p / p.sum()


class _FlipRates:
    """The flip rates of the tools during one operation, with a new log-normal factor every `_PACE_SPAN_S` seconds."""

    def __init__(self, rng: np.random.Generator, table: ProcedureTable) -> None:
        self._rng = rng
        self._rate = np.array([table.pace[tool].rate for tool in table.tools])
        self._spread = np.array([table.pace[tool].spread for tool in table.tools])

    def draw(self, seconds: int) -> np.ndarray:
        """Draw the probability that each tool attempts to flip in each second, (seconds, K)."""
        spans = -(-seconds // _PACE_SPAN_S)
        factor = np.exp(self._rng.normal(size=(spans, len(self._rate))) * self._spread - self._spread**2 / 2)
        return np.minimum(np.repeat(self._rate * factor, _PACE_SPAN_S, axis=0)[:seconds], 1.0)


def _draw_tools(rng: np.random.Generator, p: np.ndarray, rates: _FlipRates, seconds: int) -> np.ndarray:
    """Draw the tools of one segment, (seconds, K) int8, with a chain that starts in its stationary distribution `p`."""
    tries = rng.random((seconds, p.size.bit_length() - 1)) < rates.draw(seconds)
    chance = rng.random(tries.shape)
    present = int(rng.choice(p.size, p=p))
    sets = np.empty(seconds, dtype=np.int64)
    for second in range(seconds):
        for k in np.flatnonzero(tries[second]):
            flipped = present ^ (1 << int(k))
            if chance[second, k] * p[present] < p[flipped]:
                present = flipped
        sets[second] = present
    return ((sets[:, None] >> np.arange(tries.shape[1])) & 1).astype(np.int8)
