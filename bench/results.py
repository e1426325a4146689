# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a module of bench has found: a table for people, JSON for machines, targets met or not."""

import dataclasses
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

Cell = float | str | None


@dataclass(frozen=True, kw_only=True)
class Target:
    """What a ratio or a time should be."""

    what: str
    measured: float
    limit: float
    at_least: bool = False
    unit: str = ""

    @property
    def met(self) -> bool:
        """Whether it is so."""
        return self.measured >= self.limit if self.at_least else self.measured <= self.limit

    def __str__(self) -> str:
        bound = "at least" if self.at_least else "at most"
        return (
            f"{self.what}: {number(self.measured)}{self.unit} "
            f"({bound} {self.limit:g}{self.unit}: {'met' if self.met else 'NOT MET'})"
        )


@dataclass(kw_only=True)
class Result:
    """One table."""

    title: str
    columns: list[str]
    """After the first one, which has the names of the rows."""
    rows: dict[str, list[Cell]] = field(default_factory=dict)
    targets: list[Target] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @classmethod
    def load(cls, told: dict[str, Any]) -> Self:
        """Be what dataclasses.asdict() made of another one."""
        return cls(**told | {"targets": [Target(**each) for each in told["targets"]]})

    def text(self) -> str:
        """The table as a terminal shows it."""
        cells = [["", *self.columns]]
        cells += [[name, *map(shown, row)] for name, row in self.rows.items()]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [self.title]
        for name, *rest in cells:
            right = (cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))
            lines.append("  ".join([name.ljust(widths[0]), *right]).rstrip())
        return "\n".join([*lines, *map(str, self.targets), *self.notes, ""])

    def markdown(self) -> str:
        """The table as a document has it."""
        lines = [
            f"|  | {' | '.join(self.columns)} |",
            f"|---|{'---:|' * len(self.columns)}",
            *(f"| {name} | {' | '.join(map(shown, row))} |" for name, row in self.rows.items()),
        ]
        if self.targets or self.notes:
            lines += ["", *(f"- {each}" for each in [*map(str, self.targets), *self.notes])]
        return "\n".join(lines)


def alone(measure: Callable[[], Result]) -> None:
    """Be a module of bench that is run by itself."""
    print(measure().text())


def dumped(results: dict[str, Result], machine: dict[str, str]) -> str:
    """All results as JSON."""
    told = {name: dataclasses.asdict(each) for name, each in results.items()}
    return json.dumps({"machine": machine, "results": told}, indent=2) + "\n"


def loaded(text: str) -> tuple[dict[str, Result], dict[str, str]]:
    """What `dumped` was given."""
    told = json.loads(text)
    return {name: Result.load(each) for name, each in told["results"].items()}, told["machine"]


def median(seconds: Sequence[float]) -> float:
    """In milliseconds."""
    return statistics.median(seconds) * 1000


def percentile(seconds: Sequence[float], which: int) -> float:
    """In milliseconds; the worst where there are too few."""
    if len(seconds) < 2:
        return max(seconds) * 1000
    return statistics.quantiles(seconds, n=100, method="inclusive")[which - 1] * 1000


def shown(cell: Cell) -> str:
    """A cell as people read it."""
    if cell is None:
        return "-"
    return cell if isinstance(cell, str) else number(cell)


def number(value: float) -> str:
    """A number with three digits that mean something."""
    for limit, digits in ((0.995, 3), (9.95, 2), (99.5, 1)):
        if abs(value) < limit:
            return f"{value:.{digits}f}"
    return f"{value:.0f}"
