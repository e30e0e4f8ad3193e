"""`make fuzz`: many hostile inputs for every parser, with seeds and totals; exit code 1 if a promise is broken.

python -m tests.fuzz.campaign [--inputs N] [--seed S] [--only NAME] [--findings DIR] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.fuzz.harness import Child, Finding
from tests.fuzz.inputs import hostile_inputs
from tests.fuzz.parsers import PARSERS

ROUND = 2500  # inputs per seed, since hypothesis keeps track of what it has tried
MOST_FINDINGS = 25


@dataclass
class Tally:
    """The outcome of one parser's inputs."""

    parser: str
    seeds: list[int] = field(default_factory=list)
    inputs: int = 0
    refused: int = 0
    seconds: float = 0.0
    broken: bool = False
    findings: list[Finding] = field(default_factory=list)

    def line(self) -> str:
        rest = self.inputs - self.refused - len(self.findings)
        return (
            f"{self.parser:22} {self.inputs:7,} inputs, {self.refused:7,} refused in one line, {rest:6,} read, "
            f"{len(self.findings):3} finding(s), {self.seconds:6.1f} s, seeds {self.seeds[0]} to {self.seeds[-1]}"
        )


def attack(parser: str, inputs: int, first_seed: int) -> Tally:
    """Give a parser `inputs` hostile files; different ones for each seed, the same ones for the same seed."""
    tally, started = Tally(parser), time.monotonic()
    described = PARSERS[parser]
    strategy = hostile_inputs(described.seeds(), described.words, described.marks, described.mend)
    known: set[str] = set()
    with Child(parser) as child:
        while tally.inputs < inputs and len(tally.findings) < MOST_FINDINGS and not tally.broken:
            number = first_seed + len(tally.seeds)
            tally.seeds.append(number)

            @seed(number)
            @settings(
                max_examples=min(ROUND, inputs - tally.inputs),
                deadline=None,
                database=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @given(content=strategy)
            def one_round(content: bytes) -> None:
                if tally.broken or len(tally.findings) >= MOST_FINDINGS:
                    return
                tally.inputs += 1
                try:
                    what = child.read(content)
                except RuntimeError as error:  # it cannot even read valid files; the other parsers are still tested
                    what, tally.broken = str(error), True
                if what is not None and _kind(what) not in known:
                    known.add(_kind(what))
                    tally.findings.append(Finding(parser, content, what))

            one_round()
        tally.refused = child.refused
    tally.seconds = time.monotonic() - started
    return tally


def main(arguments: list[str] | None = None) -> int:
    options = argparse.ArgumentParser(prog="python -m tests.fuzz.campaign", description=__doc__.splitlines()[0])
    options.add_argument("--inputs", type=int, default=10_000, help="a parser")
    options.add_argument("--seed", type=int, default=int(time.time()) % 1_000_000)
    options.add_argument("--only", action="append", choices=list(PARSERS), help="repeatable; default: every parser")
    options.add_argument("--findings", type=Path, help="folder for the inputs that broke a promise")
    options.add_argument("--json", type=Path, help="write the totals here")
    options.add_argument("--workers", type=int, default=1, help="parsers at once, each with a child process")
    given_options = options.parse_args(arguments)
    started = time.monotonic()
    print(f"seed {given_options.seed}, {given_options.inputs:,} inputs a parser", flush=True)
    names = given_options.only or list(PARSERS)
    tallies = []
    with ThreadPoolExecutor(given_options.workers) as pool:
        for tally in pool.map(lambda name: attack(name, given_options.inputs, given_options.seed), names):
            print(tally.line(), flush=True)
            for number, finding in enumerate(tally.findings):
                print(f"    {finding.what}", flush=True)
                _keep(finding, number, given_options.findings)
            tallies.append(tally)
    findings = sum(len(tally.findings) for tally in tallies)
    inputs = sum(tally.inputs for tally in tallies)
    print(f"{inputs:,} inputs, {len(tallies)} parsers, {findings} finding(s), {time.monotonic() - started:.0f} s")
    if given_options.json:
        given_options.json.write_text(json.dumps([_plain(tally) for tally in tallies], indent=1) + "\n")
    return 1 if findings else 0


def _kind(what: str) -> str:
    """Findings with the same exception raised at the same place count as one; their numbers and texts may differ."""
    return f"{what.partition(':')[0]} {what.rpartition('(')[2]}" if what.endswith(")") else what.partition(":")[0]


def _keep(finding: Finding, number: int, folder: Path | None) -> None:
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        name = finding.parser.replace(" ", "-").replace(",", "")
        (folder / f"{name}-{number}").write_bytes(finding.content)


def _plain(tally: Tally) -> dict[str, Any]:
    found = [finding.what for finding in tally.findings]
    return {**tally.__dict__, "findings": found}


if __name__ == "__main__":
    sys.exit(main())
